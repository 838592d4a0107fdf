"""The second and third promise on a bad network: whatever the link does, nothing is lost or doubled, and the runner comes back by itself.

One control plane and one daemon, with a proxy between them, serve all tests of this module; each test orders executions of its own and
leaves an honest network behind. FAULTS_LONG=1 takes the plane away for minutes instead of seconds.

Not asked for: that `open`, `closed` and `gap` of logs may be reordered, or `open` and `resume` lost. They come once, and the order of
one connection is what they mean.

Hand mutants, each tried, and each red: no `watch`, a `watch` that does not break the connection or takes a pong for the only sign of
life; a close without a bound; no TCP_NOTSENT_LOWAT; no second sending of what had no answer; a late `resume` that goes behind what is
safe, lowers the credit or is not forgiven its acks; an ack that is taken for the next log of its channel's number.
"""

import asyncio
import hashlib
import json
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from protocol.errors import RemoteError
from protocol.frames import decode_data
from protocol.limits import CHANNEL_WINDOW_BYTES, CHANNEL_WINDOW_BYTES_MAX, DATA_SLICE_BYTES_MAX
from protocol.messages import SUBPROTOCOL, Ack, LogClosed, LogOpen, Resume
from runner.adapters import websocket
from runner.adapters.uplink import Uplink
from runner.adapters.websocket import QUIET_S, SIGN_S, ConnectionLost, PlaneConnection, dial
from tests.support.proxy import Action, Proxy, Way
from tests.support.spool import Spool
from tests.support.stand import RUNNER, Stand, poll, stand

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

LONG: Final = os.environ.get("FAULTS_LONG") == "1"
AWAY_S: Final = 180.0 if LONG else 2.0
"""How long the plane is gone with a full outbox."""
SEED: Final = 20261122
WAITING: Final = 304
"""Executions that end while nobody can be told."""
LINES: Final = 75
PACE_S: Final = 0.02
"""Between two lines: slow enough that a fault meets living executions."""
BACK_S: Final = 45.0
"""The longest delay before a dial is 30 s; then there are connections that must first be found dead."""
DEADLINE_S: Final = 15.0
"""Of a test that needs no stand."""
SHORT_S: Final = 0.25
"""Stands for every bound of a connection where one test meets all of them."""
PRINTER: Final = f"""
import sys, time
name, code, started = sys.argv[1], int(sys.argv[2]), sys.argv[3]
with open(started, "a") as file:
    file.write(name + "\\n")
for i in range({LINES}):
    print(name, "out", i, "." * 200, flush=True)
    if i % 3 == 0:
        print(name, "err", i, file=sys.stderr, flush=True)
    time.sleep({PACE_S})
sys.exit(code)
"""


@dataclass
class Job:
    """One execution and what it must have come to."""

    execution: str
    code: int
    stdout: bytes
    stderr: bytes = b""
    name: str = ""
    """Under which it tells that it started; empty when it does not."""


@dataclass
class Line:
    """A stand whose runner knows the plane by the port of a proxy."""

    system: Stand
    proxy: Proxy
    jobs: list[Job] = field(default_factory=list)
    """Of the test that runs."""
    _serial: int = 0

    async def printer(self) -> Job:
        """Order one execution that prints for a while, and says when it starts."""
        self._serial += 1
        name, code = f"p{self._serial}", self._serial % 7
        out = "".join(f"{name} out {i} {'.' * 200}\n" for i in range(LINES))
        err = "".join(f"{name} err {i}\n" for i in range(0, LINES, 3))
        argv = (sys.executable, "-I", "-S", "-c", PRINTER, name, str(code), str(self.system.home / "started"))
        job = Job(await self.system.order(*argv), code, out.encode(), err.encode(), name)
        self.jobs.append(job)
        return job

    async def printers(self, count: int) -> None:
        """Order so many, and wait until some output of each is at the plane."""
        jobs = [await self.printer() for _ in range(count)]

        async def flowing() -> bool:
            shown = [await self.system.get(f"/executions/{job.execution}") for job in jobs]
            return all(execution["log"]["end"] > 2000 for execution in shown)

        await poll(flowing, "output of each")

    @property
    def sessions(self) -> int:
        """Sessions that ever began."""
        return self.system.daemon_log().count('"session.established"')

    async def session_after(self, count: int) -> None:
        """Wait for a session after the first `count`; both sides know of it."""

        async def began() -> bool:
            return self.sessions > count

        await poll(began, "another session")
        await self.system.online()

    # --- what must be true in the end ---------------------------------------------------------------------------

    async def proves(self) -> None:
        """Every job of this test was done once, told once, and all it wrote is there once."""
        ended = await poll(self._ended, "the end of each")
        gate = asyncio.Semaphore(8)

        async def one(job: Job) -> None:
            async with gate:
                await self._proves(job, ended[job.execution])

        async with asyncio.TaskGroup() as tasks:
            for job in self.jobs:
                tasks.create_task(one(job))
        self._told_once()
        started = Counter((self.system.home / "started").read_text().split())
        assert [started[job.name] for job in self.jobs if job.name] == [1 for job in self.jobs if job.name]

    async def _ended(self) -> dict[str, Any] | None:
        """What the plane has of every job, once each is over and its log complete; they are the newest it has."""
        listed = (await self.system.get("/executions", runner=RUNNER, limit=len(self.jobs)))["executions"]
        assert {shown["id"] for shown in listed} == {job.execution for job in self.jobs}, "nothing else was ordered"
        over = all(shown["log"]["complete"] or shown["state"] in ("refused", "cancelled") for shown in listed)
        settled = all(shown["state"] in ("settled", "refused", "cancelled") for shown in listed)
        return {shown["id"]: shown for shown in listed} if over and settled else None

    async def _proves(self, job: Job, ended: dict[str, Any]) -> None:
        settlement, out, err = ended["settlement"], job.stdout, job.stderr
        assert settlement is not None, ended
        assert (ended["exit_status"], settlement["verdict"]) == (job.code, "exited")
        assert await self.system.output(job.execution) == {"stdout": out, "stderr": err}
        assert settlement["streams"]["stdout"] == {"bytes": len(out), "sha256": hashlib.sha256(out).hexdigest()}
        assert settlement["streams"]["stderr"] == {"bytes": len(err), "sha256": hashlib.sha256(err).hexdigest()}
        assert ended["log"] == {"end": settlement["log"]["end"], "complete": True, "short_bytes": 0}
        if job.name:
            digests = await self.system.get(f"/executions/{job.execution}/digests")
            signed = {name: settlement["log"][name] for name in digests["log"]}
            assert (digests["chain_ok"], digests["log"]) == (True, signed)

        async def told() -> Any:
            kinds = [said["kind"] for said in (await self.system.get(f"/receipts/{job.execution}"))["statements"]]
            return kinds if "receipt" in kinds else None

        # The settlement may overtake the receipt on a bad network.
        assert sorted(await poll(told, "the receipt")) == ["receipt", "settlement"]

    def _told_once(self) -> None:
        """The daemon itself knows of one acceptance of each command and one settlement of each attempt."""
        attempts: Counter[str] = Counter()
        commands: Counter[str] = Counter()
        for said in map(json.loads, self.system.daemon_log().splitlines()):
            attempts[said.get("attempt", "")] += said["event"] == "attempt.settled"
            commands[said.get("cmd_id", "")] += said["event"] == "command.accepted"
        assert {attempts[f"{job.execution}.1"] for job in self.jobs} == {1}
        assert set(commands.values()) <= {0, 1}


@asynccontextmanager
async def lined() -> AsyncIterator[Line]:
    """A plane, a proxy and a daemon that is connected through it; its owner allows many executions at a time."""
    async with stand(enrolled=False) as system, Proxy(system.port, seed=SEED) as proxy:
        await system.enroll(port=proxy.port)
        policy = system.home / "policy.toml"
        policy.write_text(re.sub(r"(?m)^concurrent = \d+", f"concurrent = {WAITING + 64}", policy.read_text()))
        await system.start_daemon()
        (system.home / "started").touch()
        line = Line(system, proxy)
        await line.session_after(0)
        # The plane lets go of connections that rest, and a request may meet that: a network of its own is not what is tested here.
        system.http.headers["Connection"] = "close"
        yield line
        assert system.carriers() == []


@pytest_asyncio.fixture(scope="module", loop_scope="module", name="shared")
async def shared_line() -> AsyncIterator[Line]:
    """What all tests of this module stand on."""
    async with lined() as line:
        yield line


@pytest.fixture(name="line")
def fresh_line(shared: Line) -> Iterator[Line]:
    """Without jobs and with an honest network, before and after; whoever fails shows what was going on."""
    shared.jobs.clear()
    shared.proxy.did.clear()
    daemon = shared.system.pid("daemon")
    yield shared
    shared.proxy.heal()
    print(shared.proxy, shared.system.log_tail("daemon"), shared.system.log_tail("plane"), sep="\n---\n")
    assert shared.system.pid("daemon") == daemon, "no link makes a daemon end"


# --- faults of the link -------------------------------------------------------------------------------------------------


async def _dropped(line: Line) -> None:
    await line.proxy.drop()


async def _reset(line: Line) -> None:
    await line.proxy.reset()


async def _refused(line: Line) -> None:
    line.proxy.refuse()
    await line.proxy.drop()
    await asyncio.sleep(1)


async def _stalled(line: Line) -> None:
    line.proxy.stall()
    await asyncio.sleep(1)


async def _deaf_plane(line: Line) -> None:
    line.proxy.stall(Way.UP)
    await asyncio.sleep(1)


async def _deaf_runner(line: Line) -> None:
    line.proxy.stall(Way.DOWN)
    await asyncio.sleep(1)


async def _a_byte_a_second(line: Line) -> None:
    line.proxy.trickle(1)
    await asyncio.sleep(2)


async def _slow(line: Line) -> None:
    line.proxy.trickle(20_000)
    await asyncio.sleep(2)


async def _lost_in_the_handshake(line: Line) -> None:
    """A connection is taken and nothing is said on it, and it ends like that."""
    line.proxy.stall()
    for accepted in (line.proxy.accepted, line.proxy.accepted + 1):
        await line.proxy.reset()
        await line.proxy.until(lambda proxy, n=accepted: proxy.accepted > n, "a dial", BACK_S)  # type: ignore[misc]
    await line.proxy.drop()


async def _cut_at_every_welcome(line: Line) -> None:
    """Sessions that end as soon as they begin."""
    for _ in range(5):
        welcomes = line.proxy.seen[Way.DOWN]["welcome"]
        await line.proxy.drop()
        await line.proxy.until(lambda proxy, n=welcomes: proxy.seen[Way.DOWN]["welcome"] > n, "a welcome", BACK_S)  # type: ignore[misc]
    await line.proxy.drop()


ENDING: Final = (_dropped, _reset, _refused, _lost_in_the_handshake, _cut_at_every_welcome)
"""Faults that no session outlives."""
PASSING: Final = (_stalled, _deaf_plane, _deaf_runner, _a_byte_a_second, _slow)
"""Faults that a session outlives when they are short."""


@pytest.mark.parametrize("fault", [*ENDING, *PASSING], ids=lambda fault: fault.__name__.strip("_"))
async def test_a_fault_of_the_link_loses_and_doubles_nothing(
    line: Line, fault: Callable[[Line], Coroutine[Any, Any, None]]
) -> None:
    """With output flowing, and more executions ordered while the fault lasts; sessions end only when they must."""
    sessions = line.sessions
    await line.printers(4)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(fault(line))
        for _ in range(2):
            tasks.create_task(line.printer())
    line.proxy.heal()
    await line.proves()
    await line.system.online()
    assert (line.sessions > sessions) is (fault in ENDING)


# --- the plane is away ------------------------------------------------------------------------------------------------


async def test_a_full_outbox_arrives_when_the_plane_is_back(line: Line) -> None:
    """Hundreds of settlements wait in the journal while every dial is refused; then each arrives, once."""
    system = line.system
    os.mkfifo(system.home / "gate")
    # Held open for reading, too: a line waits in it for whoever is late.
    gate = os.open(system.home / "gate", os.O_RDWR)
    room = asyncio.Semaphore(16)

    async def order(number: int) -> Job:
        script = f"read line < {system.home}/gate; echo {number}; exit {number % 5}"
        async with room:
            return Job(await system.order("/bin/sh", "-c", script), number % 5, f"{number}\n".encode())

    before = system.daemon_log()

    async def all_of_them(event: str) -> None:
        async def done() -> bool:
            return system.daemon_log().count(event) >= before.count(event) + WAITING

        await poll(done, f"{event} of each")

    line.jobs += await asyncio.gather(*(order(number) for number in range(WAITING)))
    await all_of_them('"command.accepted"')
    sessions, reports = line.sessions, line.proxy.seen[Way.UP]["report"]
    line.proxy.refuse()
    await line.proxy.drop()
    gone_s = time.monotonic()
    os.write(gate, b"\n" * WAITING)
    await all_of_them('"attempt.settled"')
    os.close(gate)
    await asyncio.sleep(max(0.0, gone_s + AWAY_S - time.monotonic()))
    assert (line.sessions, line.proxy.seen[Way.UP]["report"]) == (sessions, reports)
    listed = (await system.get("/executions", runner=RUNNER, limit=500))["executions"]
    waiting = {job.execution for job in line.jobs}
    assert [shown["settlement"] for shown in listed if shown["id"] in waiting] == [None] * WAITING
    line.proxy.heal()
    await line.session_after(sessions)
    await line.proves()
    assert json.loads(await system.run("runner", "status", "--json"))["outbox"]["unanswered"] is False


# --- silence ----------------------------------------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="module", autouse=True, name="dead_line")
async def told_beside_the_others() -> AsyncIterator[asyncio.Task[float]]:
    """The story that takes longest, on a stand of its own, while the other tests run: the seconds until there was another session."""
    story = asyncio.create_task(_dead_line())
    yield story
    story.cancel()
    await asyncio.gather(story, return_exceptions=True)


async def _dead_line() -> float:
    async with lined() as line:
        await line.printers(2)
        data = random.Random(SEED).randbytes(4_000_000)
        (line.system.home / "data").write_bytes(data)
        line.proxy.trickle(500_000, Way.UP)
        line.jobs.append(Job(await line.system.order("cat", str(line.system.home / "data")), 0, data))
        flowed = line.proxy.passed_bytes[Way.UP] + 1_000_000
        await line.proxy.until(lambda proxy: proxy.passed_bytes[Way.UP] > flowed, "a megabyte", BACK_S)
        line.proxy.abandon(deaf=True)
        line.proxy.flow()
        gone_s = time.monotonic()
        await line.session_after(1)
        noticed_s = time.monotonic() - gone_s
        assert "the control plane fell silent" in line.system.daemon_log()
        await line.proves()
    return noticed_s


@dataclass
class Call:
    """The runner's end of a connection to a plane of the test's."""

    connection: PlaneConnection
    proxy: Proxy
    planes: list[ServerConnection]


@asynccontextmanager
async def called(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Call]:
    """A connection through a proxy, watched with short bounds; the other end reads all and says nothing."""
    for bound in ("QUIET_S", "SIGN_S", "CLOSE_TIMEOUT_S"):
        monkeypatch.setattr(websocket, bound, SHORT_S)
    planes: list[ServerConnection] = []

    async def hold(plane: ServerConnection) -> None:
        planes.append(plane)
        try:
            async for _ in plane:
                continue
        except ConnectionClosed:
            return

    async with (
        asyncio.timeout(DEADLINE_S),
        serve(
            hold, "127.0.0.1", 0, subprotocols=[Subprotocol(SUBPROTOCOL)], compression=None, close_timeout=0.1
        ) as server,
        Proxy(next(iter(server.sockets)).getsockname()[1]) as proxy,
        dial(f"ws://127.0.0.1:{proxy.port}/", None) as connection,
    ):
        yield Call(connection, proxy, planes)


SILENCES: Final[dict[str, Callable[[Proxy], None]]] = {
    "stalled": lambda proxy: proxy.stall(),
    "deaf_plane": lambda proxy: proxy.stall(Way.UP),
    "deaf_runner": lambda proxy: proxy.stall(Way.DOWN),
    "gone_behind_a_middlebox": lambda proxy: proxy.abandon(),
    "gone": lambda proxy: proxy.abandon(deaf=True),
}


@pytest.mark.parametrize("silence", SILENCES)
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
async def test_a_silent_connection_is_given_up(silence: str, busy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the bound, also while more waits to be sent than any buffer holds, and closing it takes no longer than its own."""

    async with called(monkeypatch) as call, asyncio.TaskGroup() as tasks:
        tasks.create_task(call.connection.watch())
        if busy:
            tasks.create_task(_flood(call.connection))
        await asyncio.sleep(SHORT_S / 2)
        SILENCES[silence](call.proxy)
        begun = time.monotonic()
        with pytest.raises(ConnectionLost, match="the control plane fell silent"):
            await call.connection.receive()
        assert time.monotonic() - begun < 2 * SHORT_S + 1
    assert time.monotonic() - begun < 3 * SHORT_S + 1


async def test_closing_a_stalled_connection_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although a close waits for its turn behind everything that is unsent."""
    async with called(monkeypatch) as call:
        call.proxy.stall()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(_flood(call.connection), 0.5)
        begun = time.monotonic()
    assert time.monotonic() - begun < SHORT_S + 1


async def test_a_connection_that_is_only_slow_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle, the answers to our pings are heard; busy, they wait behind what is unsent for too long, but other things are heard."""
    async with called(monkeypatch) as call, asyncio.TaskGroup() as tasks:
        watch = tasks.create_task(call.connection.watch())
        await asyncio.sleep(4 * SHORT_S)
        assert not watch.done()
        call.proxy.trickle(20_000, Way.UP)
        flood = tasks.create_task(_flood(call.connection))
        for _ in range(12):
            await call.planes[0].send("{}")
            await call.connection.receive()
            await asyncio.sleep(SHORT_S / 2)
        assert not watch.done()
        watch.cancel()
        flood.cancel()


async def _flood(connection: PlaneConnection) -> None:
    """Send more than any buffer holds, until the connection is over."""
    try:
        while True:
            await connection.send(bytes(65536))
    except ConnectionLost:
        return


# --- a slow link ------------------------------------------------------------------------------------------------------


async def test_a_settlement_does_not_wait_for_a_large_log(line: Line) -> None:
    """200 KB/s and 20 MiB of output under way: the settlement of another execution arrives within five seconds of its end."""
    system = line.system
    data = random.Random(SEED).randbytes(20 * 1024 * 1024)
    (system.home / "large").write_bytes(data)
    line.proxy.trickle(200_000, Way.UP)
    flowed = line.proxy.passed_bytes[Way.UP] + 500_000
    large = Job(await system.order("cat", str(system.home / "large")), 0, data)
    await line.proxy.until(lambda proxy: proxy.passed_bytes[Way.UP] > flowed, "the log", BACK_S)
    short = Job(await system.order("/bin/sh", "-c", "sleep 0.5; echo short"), 0, b"short\n")

    async def settled() -> Any:
        return (await system.get(f"/executions/{short.execution}"))["settlement"]

    settlement = await poll(settled, "the settlement")
    assert time.time() - settlement["ended_ms"] / 1000 < 5
    assert not (await system.get(f"/executions/{large.execution}"))["log"]["complete"]
    line.proxy.heal()
    line.jobs += [large, short]
    await line.proves()


# --- faults of messages -----------------------------------------------------------------------------------------------

COMMANDS: Final = ("command", "need")
REPORTS: Final = ("report", "reported")
BEATS: Final = ("beat", "beaten")
LOGS: Final = ("resume", "ack")
ALL: Final = (*COMMANDS, *REPORTS, *BEATS, *LOGS)
MESSAGES: Final[dict[str, Callable[[Proxy], None]]] = {
    "doubled": lambda proxy: proxy.twice(*ALL),
    "doubled_late": lambda proxy: proxy.twice(*ALL, late_s=0.3),
    "swapped": lambda proxy: proxy.swap(*ALL, chance=0.5),
    # Not commands: the stream goes on, but a `need` that is late in its turn costs a RETRY_MS each time.
    "late": lambda proxy: proxy.delay(*REPORTS, *BEATS, *LOGS, late_s=0.3, chance=0.5),
}


@pytest.mark.parametrize("fault", MESSAGES)
async def test_messages_that_come_twice_or_in_another_order_do_no_harm(line: Line, fault: str) -> None:
    """Commands, reports, beats, acks, resumes, and every answer to them; through a reconnect, too."""
    sessions = line.sessions
    await line.printers(2)
    MESSAGES[fault](line.proxy)
    await line.proxy.drop()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(6):
            tasks.create_task(line.printer())
    await line.session_after(sessions)
    await line.proves()
    assert {kind for _, kind in line.proxy.did} >= {"report", "reported", "resume", "ack"}, line.proxy
    assert fault == "late" or any(kind == "command" for _, kind in line.proxy.did)
    assert line.sessions == sessions + 1, "the session outlives it"


async def test_a_grant_that_comes_again_much_later_stops_no_log(line: Line) -> None:
    """The first `resume` once more, when everything it grants is sent long ago: had it its way, nothing would be granted again."""
    data = random.Random(SEED).randbytes(3 * CHANNEL_WINDOW_BYTES)
    (line.system.home / "windows").write_bytes(data)
    line.proxy.twice("resume", late_s=1)
    line.proxy.trickle(8_000_000, Way.UP)
    line.jobs.append(Job(await line.system.order("cat", str(line.system.home / "windows")), 0, data))
    await line.proves()
    assert line.proxy.did[Action.TWICE, "resume"] >= 1


async def test_a_grant_that_comes_again_takes_nothing_back(tmp_path: Path) -> None:
    """It may say that something was lost, so it is followed; but not behind what is safe, and its smaller credit does not count."""
    spool = Spool(tmp_path / "log")
    starts = []
    for _ in range(4):
        starts.append(spool.end)
        spool.roll()
        spool.write(b"x" * 60_000)
        starts.append(spool.end)
        spool.write(b"x" * 60_000)
    uplink = an_uplink()
    uplink.track("ex_1.1", tmp_path)
    assert list(uplink.messages()) == [LogOpen(channel=0, attempt="ex_1.1", first=0)]
    uplink.heard(Resume(channel=0, offset=0, credit=CHANNEL_WINDOW_BYTES_MAX))
    assert starts_of(uplink) == starts
    uplink.heard(Resume(channel=0, offset=0, credit=DATA_SLICE_BYTES_MAX))
    assert starts_of(uplink, 2) == starts[:2]
    uplink.heard(Ack(channel=0, offset=starts[7], credit=CHANNEL_WINDOW_BYTES_MAX))
    assert starts_of(uplink) == starts[7:]
    uplink.heard(Resume(channel=0, offset=0, credit=DATA_SLICE_BYTES_MAX))
    assert starts_of(uplink) == []
    with pytest.raises(RemoteError):
        uplink.heard(Ack(channel=0, offset=spool.end + 1, credit=CHANNEL_WINDOW_BYTES_MAX))
    uplink.close()


async def test_an_ack_of_a_log_that_is_done_does_not_touch_the_next_one(tmp_path: Path) -> None:
    """Its channel's number is taken by another log at once; what is said of that before its `resume` is about the old one."""
    uplink = an_uplink()
    for name in ("ex_1.1", "ex_2.1"):
        spool = Spool(tmp_path / name / "log")
        spool.write(b"x" * 1000)
        uplink.track(name, tmp_path / name, finished=True)
        assert list(uplink.messages()) == [LogOpen(channel=0, attempt=name, first=0)]
        if name == "ex_2.1":
            uplink.heard(Ack(channel=0, offset=spool.end, credit=CHANNEL_WINDOW_BYTES))
            assert (uplink.acked(name), starts_of(uplink)) == (0, [])
        uplink.heard(Resume(channel=0, offset=0, credit=CHANNEL_WINDOW_BYTES))
        assert starts_of(uplink) == [0]
        assert list(uplink.messages()) == [LogClosed(channel=0, end=spool.end)]
        uplink.heard(Ack(channel=0, offset=spool.end, credit=CHANNEL_WINDOW_BYTES))
        assert uplink.acked(name) is None


def an_uplink() -> Uplink:
    """On a connection, with nobody behind it."""

    def ignore(*_: object) -> None:
        return

    uplink = Uplink(wake=ignore, arm=ignore, trim=ignore, failed=ignore)
    uplink.connected()
    return uplink


def starts_of(uplink: Uplink, count: int = 100) -> list[int]:
    """Where the next data frames begin: as many as there are, at most `count`."""
    frames = takewhile(lambda frame: frame is not None, (uplink.next_frame() for _ in range(count)))
    return [decode_data(frame).offset for frame in frames if frame is not None]


async def test_messages_that_are_lost_are_sent_again(line: Line) -> None:
    """One of each kind that has an answer; what is not answered goes again, within the same session."""
    lost = (*REPORTS, *BEATS, "command", "ack")
    sessions = line.sessions
    await line.printers(2)
    for kind in lost:
        line.proxy.lose(kind, times=1)
    await line.proxy.drop()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(4):
            tasks.create_task(line.printer())
    await line.proves()
    assert line.proxy.did == {(Action.LOSE, kind): 1 for kind in lost}
    assert line.sessions == sessions + 1


# --- the end of the story told beside the others ------------------------------------------------------------------------


async def test_a_dead_line_under_full_load_is_noticed_in_time(dead_line: asyncio.Task[float]) -> None:
    """Nothing is taken and nothing comes, megabytes wait to be sent: after QUIET_S + SIGN_S the runner dials again, and all arrives."""
    assert await dead_line < QUIET_S + SIGN_S + 5
