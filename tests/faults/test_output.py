"""Output under pressure, through all of it: a flood beside heartbeats, readers that do not read, endless lines, a hundred at once.

One control plane that asks for a beat each second and one daemon with a small spool, with a proxy between them, serve all tests of this
module. FAULTS_LONG=1 lets the flood last a minute instead of seconds.

Hand mutants, each tried, and each red: a follower that gets each block but its last byte; a daemon that keeps its beats for itself.
"""

import asyncio
import hashlib
import json
import os
import re
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio

from protocol.limits import MIB
from protocol.records import RecordKind, records
from tests.support.proxy import Proxy, Way
from tests.support.stand import ANSWER_S, RUNNER, Stand, poll

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

LONG: Final = os.environ.get("FAULTS_LONG") == "1"
FLOOD_S: Final = 60.0 if LONG else 4.0
FLOOD_BYTES_PER_S: Final = 8_000_000
"""What the line takes of a flood: much less than `yes` writes, so the spool is full at once."""
SPOOL_BYTES: Final = 16 * MIB
SEGMENT_BYTES: Final = MIB
SPOOL_SLACK_BYTES: Final = 2 * SEGMENT_BYTES
"""The segment that is written when the limit is met, and the one that begins behind the gap."""
GROWTH_MIB: Final = 48
"""Of a process, from when it is warm: its windows and its allocator, not what flowed."""
STOP_S: Final = 10.0
"""From the order of a stop to its settlement, on two cores that a flood shares."""
BEAT_GAP_S: Final = 5.0
"""Between two beats of one a second, while everything else wants the machine."""
CROWD: Final = 100
UNREAD_BYTES: Final = 16 * MIB
LINE_BYTES: Final = 1_000_000
PLANE: Final = """
import functools, sys
from controlplane import server
server.ControlPlane.open = functools.partial(server.ControlPlane.open, beat_ms=1000)
from controlplane.cli import main
sys.argv[0] = "runner-control"
main()
"""
"""The control plane, except that it asks for a beat each second."""
COUNTED: Final = """
import sys
for n in range(int(sys.argv[1]) // 64):
    sys.stdout.write(f"{n:063d}\\n")
"""
LINES: Final = f"""
import sys
for n in range(5):
    sys.stdout.write(chr(97 + n) * {LINE_BYTES} + "\\n")
sys.stdout.write("z" * {LINE_BYTES})
"""
CROWDED: Final = """
import sys
name = sys.argv[1]
for n in range(400):
    print(name, n, "." * 80)
    if n % 50 == 0:
        print(name, "err", n, file=sys.stderr, flush=True)
"""


class Quick(Stand):
    """A stand whose plane beats quickly."""

    async def start(self, name: str, *argv: str) -> asyncio.subprocess.Process:
        """As it is, but for the plane."""
        return await super().start(name, *(("python", "-c", PLANE, *argv[1:]) if name == "plane" else argv))


@dataclass
class Line:
    """What the tests of this module stand on."""

    system: Quick
    proxy: Proxy
    beats: list[float] = field(default_factory=list)
    """When each came past."""

    async def watch(self) -> None:
        """Note the beats of this line until cancelled."""
        while True:
            count = self.proxy.seen[Way.UP]["beat"]
            self.beats += [time.monotonic()] * (count - len(self.beats))
            await asyncio.sleep(0.01)

    async def python(self, script: str, *argv: str, **extra: Any) -> str:
        """Order a script."""
        return await self.system.order(sys.executable, "-I", "-S", "-c", script, *argv, **extra)

    async def at_plane(self, execution: str, size: int) -> None:
        """Wait until so much of a log is there."""

        async def there() -> bool:
            return bool((await self.system.get(f"/executions/{execution}"))["log"]["end"] >= size)

        await poll(there, f"{size} bytes of {execution}")

    def rss_mib(self, name: str) -> float:
        """What a process holds."""
        status = Path(f"/proc/{self.system.pid(name)}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) / 1024

    def spool_bytes(self, execution: str) -> int:
        """Of one execution, on the runner's disk; what goes meanwhile is not there."""
        size, log = 0, self.system.state / "x" / f"{execution}.1" / "log"
        for path in log.iterdir():
            with suppress(FileNotFoundError):
                size += path.stat().st_size
        return size


@pytest_asyncio.fixture(scope="module", loop_scope="module", name="shared")
async def shared_line() -> AsyncIterator[Line]:
    """Plane, proxy and daemon, which may run a crowd."""
    system = Quick()
    try:
        await system.start_plane()
        async with Proxy(system.port) as proxy:
            await system.enroll(port=proxy.port)
            policy = system.home / "policy.toml"
            policy.write_text(re.sub(r"(?m)^concurrent = \d+", f"concurrent = {2 * CROWD}", policy.read_text()))
            await system.start_daemon(
                LOCAL_RUNNER_SPOOL_BYTES=str(SPOOL_BYTES), LOCAL_RUNNER_SEGMENT_BYTES=str(SEGMENT_BYTES)
            )
            await system.online()
            system.http.headers["Connection"] = "close"
            line = Line(system, proxy)
            watching = asyncio.ensure_future(line.watch())
            yield line
            watching.cancel()
    finally:
        await system.close()


@pytest.fixture(name="line")
def fresh_line(shared: Line) -> Iterator[Line]:
    """With an honest network, before and after; whoever fails shows what was going on."""
    yield shared
    shared.proxy.heal()
    print(shared.proxy, shared.system.log_tail("daemon"), shared.system.log_tail("plane"), sep="\n---\n")


# --- a flood ------------------------------------------------------------------------------------------------------------


async def test_a_flood_delays_no_beat_and_no_stop_and_fills_nothing(line: Line) -> None:
    """`yes` on a line that takes less than it writes: beats keep their time, memory and spool their bounds, a stop works at once.

    What arrived is proven by the signed digests, and what did not is a gap that the log names.
    """
    system = line.system
    line.proxy.trickle(FLOOD_BYTES_PER_S, Way.UP)
    flood = await system.order("yes")
    await line.at_plane(flood, FLOOD_BYTES_PER_S)
    before = {name: line.rss_mib(name) for name in ("daemon", "plane")}
    began, spooled, ends = time.monotonic(), [], time.monotonic() + FLOOD_S
    while time.monotonic() < ends:
        await asyncio.sleep(0.25)
        spooled.append(line.spool_bytes(flood))
    beats = [at for at in line.beats if at >= began]
    after = {name: line.rss_mib(name) for name in ("daemon", "plane")}
    asked = time.monotonic()
    await system.post(f"/executions/{flood}/stop", {"start_token": 1})

    async def settled() -> Any:
        return (await system.get(f"/executions/{flood}"))["settlement"]

    settlement = await poll(settled, "the settlement")
    assert time.monotonic() - asked < STOP_S
    assert settlement["verdict"] == "stopped"
    gaps_s = [late - early for early, late in zip([began, *beats], [*beats, asked], strict=True)]
    assert max(gaps_s) < BEAT_GAP_S and len(beats) >= FLOOD_S / 2, gaps_s
    assert max(spooled) <= SPOOL_BYTES + SPOOL_SLACK_BYTES
    assert {name: after[name] - before[name] < GROWTH_MIB for name in after} == {"daemon": True, "plane": True}
    line.proxy.heal()
    ended = await system.ended(flood)
    assert ended["log"]["end"] == settlement["log"]["end"]
    await _is_what_was_signed(line, flood, settlement)


async def _is_what_was_signed(line: Line, execution: str, settlement: dict[str, Any]) -> None:
    """What the runner kept is proven, and what it dropped is named; beyond that the plane has what came before it was dropped.

    Of those pieces nothing is signed, so the plane does not say that they are proven; nothing outside of them is in doubt.
    """
    status, said, err = await line.system.finished("runner", "logs", "--verify", execution)
    assert (status, err) == (0, ""), said
    assert "what is stored is what was signed" in said and "dropped to make room for the newest, as was signed" in said
    dropped = settlement["log"]["dropped"]
    proof = (await line.system.get(f"/executions/{execution}/digests"))["proof"]
    doubted = [
        tuple(map(int, found)) for one in proof["wrong"] for found in re.findall(r"bytes (\d+) to (\d+) are", one)
    ]
    assert len(doubted) == len(proof["wrong"]), proof["wrong"]
    assert all(dropped["start"] <= start <= end <= dropped["end"] for start, end in doubted), (dropped, doubted)
    assert f"bytes 0 to {dropped['start']}: every segment is named by one that was signed" in proof["proven"]
    at, pieces = 0, [bytearray()]
    for record in records((await line.system.http.get(f"/executions/{execution}/log")).content, 0):
        if record.kind == RecordKind.GAP:
            at += 1
            pieces.append(bytearray())
        elif record.kind == RecordKind.STDOUT:
            pieces[-1] += record.payload
    assert at > 0 and sum(map(len, pieces)) < settlement["streams"]["stdout"]["bytes"]
    assert all(_of_yes(piece) for piece in pieces)


def _of_yes(piece: bytearray) -> bool:
    """Whether `yes` wrote that, without a hole."""
    return bytes(piece) in (
        (b"y\n" * (len(piece) // 2 + 1))[: len(piece)],
        (b"\ny" * (len(piece) // 2 + 1))[: len(piece)],
    )


# --- readers that do not read -------------------------------------------------------------------------------------------


async def _sleeper(line: Line, execution: str) -> socket.socket:
    """Somebody who asks for the log's stream and takes nothing of it."""
    deaf = socket.socket()
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    deaf.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(deaf, ("127.0.0.1", line.system.port))
    token = line.system.http.headers["Authorization"]
    asked = f"GET /v1/executions/{execution}/log?follow=true HTTP/1.1\r\nHost: x\r\nAuthorization: {token}\r\n\r\n"
    await loop.sock_sendall(deaf, asked.encode())
    return deaf


async def _stdout_of(deaf: socket.socket) -> bytes:
    """What it reads in the end: the chunks of a stream, and of those the payloads of stdout."""
    reader, writer = await asyncio.open_connection(sock=deaf)
    await reader.readuntil(b"\r\n\r\n")
    body = bytearray()
    while size := int(await reader.readline(), 16):
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    writer.close()
    return b"".join(bytes(one.payload) for one in records(bytes(body), 0) if one.kind == RecordKind.STDOUT)


async def test_readers_that_do_not_read_stall_nobody_and_miss_nothing(line: Line) -> None:
    """Of one log two take nothing, and a third all of it at once; others work; then the two read, and get every byte."""
    system = line.system
    go = system.home / "go"
    wait = f"import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.02)\n"
    execution = await line.python(wait + COUNTED, str(UNREAD_BYTES), overflow="block")
    deaf = await _sleeper(line, execution)
    stuck = await system.pipe("stuck", "runner-control", "logs", "-f", execution)
    reading = await system.pipe("reading", "runner-control", "logs", "-f", execution)
    before = line.rss_mib("plane")
    go.touch()
    out, err = await asyncio.wait_for(reading.communicate(), ANSWER_S)
    truth = b"".join(b"%063d\n" % n for n in range(UNREAD_BYTES // 64))
    assert (out == truth, err, reading.returncode) == (True, b"", 0)
    short = await system.ran("sh", "-c", "echo short")
    assert await system.output(short["id"]) == {"stdout": b"short\n", "stderr": b""}
    assert stuck.returncode is None and line.rss_mib("plane") - before < GROWTH_MIB
    late, silent = await asyncio.wait_for(stuck.communicate(), ANSWER_S)
    assert (late == truth, silent, stuck.returncode) == (True, b"", 0)
    assert await asyncio.wait_for(_stdout_of(deaf), ANSWER_S) == truth


# --- long lines ---------------------------------------------------------------------------------------------------------


async def _printed(line: Line, *argv: str) -> bytes:
    """stdout of one of our programs."""
    t0 = time.monotonic()
    program = await line.system.pipe("printed", *argv)
    out, err = await asyncio.wait_for(program.communicate(), ANSWER_S)
    assert (program.returncode, err) == (0, b"")
    print("TT", argv, time.monotonic() - t0)
    return out


@pytest.mark.parametrize("reader", ["runner", "runner-control"])
async def test_lines_of_a_megabyte_are_lines(line: Line, reader: str) -> None:
    """Plain, the last one, with times, as JSON: five of them, and one without an end."""
    execution = await line.python(LINES)
    await line.system.ended(execution)
    wanted = [bytes([97 + n]) * LINE_BYTES for n in range(5)] + [b"z" * LINE_BYTES]
    plain, last, lines, objects = await asyncio.gather(
        *(
            _printed(line, reader, "logs", *how, execution)
            for how in ([], ["--tail", "1"], ["--timestamps"], ["--json"])
        )
    )
    assert (plain == b"\n".join(wanted), last == wanted[-1]) == (True, True)
    stamped = lines.split(b"\n")
    assert [one[31:] for one in stamped] == wanted
    assert all(one[:4].isdigit() and one[29:31] == b"Z " for one in stamped)
    told = [json.loads(one) for one in objects.splitlines()]
    assert "".join(one["data"] for one in told if one["kind"] == "stdout").encode() == b"\n".join(wanted)
    assert told[-1]["kind"] == "exit"


# --- many at once -------------------------------------------------------------------------------------------------------


async def test_a_hundred_that_print_at_once_are_kept_apart(line: Line) -> None:
    """Each log is complete, byte-exact and its own."""
    began = time.monotonic()
    ordered = await asyncio.gather(*(line.python(CROWDED, f"n{number}") for number in range(CROWD)))

    async def all_over() -> dict[str, Any] | None:
        listed = (await line.system.get("/executions", runner=RUNNER, limit=CROWD))["executions"]
        over = {one["id"]: one for one in listed if one["state"] == "settled" and one["log"]["complete"]}
        return over if over.keys() == set(ordered) else None

    ended = await poll(all_over, "the end of each")
    for number, execution in enumerate(ordered):
        name = f"n{number}"
        out = "".join(f"{name} {n} {'.' * 80}\n" for n in range(400)).encode()
        err = "".join(f"{name} err {n}\n" for n in range(0, 400, 50)).encode()
        assert await line.system.output(execution) == {"stdout": out, "stderr": err}
        assert ended[execution]["log"]["short_bytes"] == 0
        streams = ended[execution]["settlement"]["streams"]
        assert [streams[one]["sha256"] for one in ("stdout", "stderr")] == [
            hashlib.sha256(data).hexdigest() for data in (out, err)
        ]
    print(f"{CROWD} executions in {time.monotonic() - began:.1f} s")
