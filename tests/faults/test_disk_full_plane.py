"""A control plane whose disk refuses: nothing is acked that is not stored, the runner keeps it, and with room again all of it arrives.

What a shim does on such a disk is in `tests/unit/runner/shim/test_shim_full.py` and `test_shim_disk.py`, what the daemon does in
`tests/faults/test_full_disk.py`; here it is the other end of the line: its logs, and the database beside them.

Hand mutants, each tried, and each red: `Log._go_back` does nothing; `Log.sync` moves `durable` before the row is saved.
"""

import asyncio
import errno
import hashlib
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from controlplane import logstore
from controlplane.channels import Channels
from controlplane.errors import StoreFailed
from controlplane.logstore import LogStore
from controlplane.rows import LogRow
from protocol.limits import MIB
from protocol.messages import Ack, Credit, Gap, LogClosed, LogOpen, Resume, Watch
from runner.adapters.uplink import Uplink
from tests.support.full_disk import fill
from tests.support.spool import Spool
from tests.support.stand import Stand, poll

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

DEADLINE_S = 20.0
ATTEMPT = "ex_1.1"
DISK_MIB = 24
MORE_BYTES = 12 * MIB
"""What one execution prints on a disk that is full: it fits when there is room again."""
PRINTER = """
import os, random, sys, time
rng = random.Random(7)
while not os.path.exists(sys.argv[1]):
    time.sleep(0.02)
for _ in range(int(sys.argv[2]) // 65536):
    sys.stdout.buffer.write(rng.randbytes(65536))
"""


class Disk:
    """The kernel's calls as `logstore` makes them, on a disk that a test breaks. What was not synced when it broke is gone from it.

    That is what kernels do: pages that cannot be written are dropped, the next sync says that all is well.
    """

    def __init__(self) -> None:
        self.refuse: dict[str, int] = {}
        """Error number by the name of the call."""
        self.refused = 0
        self.synced: dict[str, int] = {}
        """Sizes that the disk has for sure, by file."""

    def __getattr__(self, name: str) -> Any:
        call = getattr(os, name)
        if name not in ("open", "pwrite", "fdatasync"):
            return call

        def through(*args: Any, **kwargs: Any) -> Any:
            if name not in self.refuse:
                done = call(*args, **kwargs)
                if name == "fdatasync":
                    path = os.readlink(f"/proc/self/fd/{args[0]}")
                    self.synced[path] = os.fstat(args[0]).st_size
                return done
            self.refused += 1
            if name == "fdatasync":
                self._drop(args[0])
            raise OSError(self.refuse[name], os.strerror(self.refuse[name]))

        return through

    def _drop(self, fd: int) -> None:
        safe, size = self.synced.get(os.readlink(f"/proc/self/fd/{fd}"), 0), os.fstat(fd).st_size
        os.pwrite(fd, bytes(size - safe), safe)


class Road:
    """A runner's uplink and a plane's channels, with the plane's sessions ending as the gateway ends them."""

    def __init__(self, directory: Path, disk: Disk) -> None:
        self.disk = disk
        self.spool = Spool(directory / "x" / "log")
        self.uplink = Uplink(wake=lambda: None, arm=lambda *_: None, trim=lambda *_: None, failed=self._failed)
        self.rows: dict[str, LogRow] = {}
        self.refuse_rows = False
        self.store = LogStore(directory / "logs", self.rows.get, self._save)
        self.file = directory / "logs" / f"{ATTEMPT}.log"
        self.said: list[Resume | Ack | Credit | Watch] = []
        self.acked = 0
        self.sessions = 0
        self._channels: Channels | None = None
        self.uplink.track(ATTEMPT, directory / "x")

    def _failed(self, name: str, detail: str) -> None:
        raise AssertionError(f"the log of {name} is whole: {detail}")

    async def _save(self, row: LogRow) -> None:
        if self.refuse_rows:
            raise StoreFailed("OperationalError")
        self.rows[row.attempt] = row

    def meet(self) -> Channels:
        """The session there is, or a new one."""
        if self._channels is None:
            self.sessions += 1
            self.said.clear()
            self._channels = Channels("rn", self.store, lambda _: "rn", self.said.append)
            self.uplink.connected()
        return self._channels

    def turn(self) -> None:
        """Both sides say what they have to; a disk that refuses ends the session, and its runner dials again."""
        channels = self.meet()
        try:
            for message in self.uplink.messages():
                match message:
                    case LogOpen():
                        channels.open(message)
                    case Gap():
                        channels.gap(message)
                    case LogClosed():
                        channels.closed(message)
                    case _:
                        channels.blocked(message)
            for _ in range(4):
                if (frame := self.uplink.next_frame()) is not None:
                    channels.data(frame)
        except StoreFailed:
            channels.release()
            self.uplink.disconnected()
            self._channels = None
            return
        for said in self.said:
            if isinstance(said, Ack):
                self._is_safe(said.offset)
            self.uplink.heard(said)
        self.said.clear()

    def _is_safe(self, offset: int) -> None:
        """What an ack names is on the disk, byte for byte, and so is the row that says so."""
        self.acked = max(self.acked, offset)
        if offset:
            assert self.rows[ATTEMPT].end >= offset and self.disk.synced[str(self.file)] >= offset
            assert self.file.read_bytes()[:offset] == self.truth[:offset]

    @property
    def truth(self) -> bytes:
        """The log as its shim wrote it."""
        return b"".join(self.spool.kept[at] for at in sorted(self.spool.kept))

    async def until(self, holds: Callable[[], bool], what: str) -> None:
        """Let both sides go on until something is so."""
        async with asyncio.timeout(DEADLINE_S):
            while not holds():
                self.turn()
                await asyncio.sleep(0.005)
        assert holds(), what


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """The disk under the plane's logs."""
    under = Disk()
    monkeypatch.setattr(logstore, "os", under)
    monkeypatch.setattr(logstore, "SYNC_AGE_MS", 20)
    return under


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["open", "pwrite", "fdatasync", "row"])
async def test_what_the_disk_of_a_plane_refuses_is_not_acked_and_comes_again(
    tmp_path: Path, disk: Disk, call: str, number: int
) -> None:
    """1. Some is stored. 2. The disk refuses a while. 3. No ack moves. 4. It takes again: everything is there, in order, and acked."""
    road = Road(tmp_path, disk)
    running = asyncio.ensure_future(road.store.run())
    try:
        for size in (10_000, 60_000, 7):
            road.spool.write(random.Random(size).randbytes(size))
        await road.until(lambda: road.acked == road.spool.end, "the first records")
        safe = road.acked
        disk.refuse = {call: number} if call != "row" else {}
        road.refuse_rows = call == "row"
        for size in (60_000, 60_000, 60_000):
            road.spool.write(random.Random(size).randbytes(size))
        road.uplink.grew(ATTEMPT, road.spool.end)
        sessions = road.sessions
        await road.until(
            lambda: (
                disk.refused > 2 or road.sessions > sessions + 2 or (call == "row" and road.file.stat().st_size > safe)
            ),
            "a refusal",
        )
        for _ in range(20):
            road.turn()
            await asyncio.sleep(0.005)
        assert road.acked == safe
        disk.refuse, road.refuse_rows = {}, False
        road.spool.write(b"the last of it")
        road.uplink.finish(ATTEMPT)
        await road.until(lambda: road.rows[ATTEMPT].complete and road.uplink.acked(ATTEMPT) is None, "the whole log")
        assert road.rows[ATTEMPT].end == road.spool.end
        assert road.file.read_bytes() == road.truth
    finally:
        running.cancel()
        road.uplink.close()


# --- a whole system ---------------------------------------------------------------------------------------------------


@pytest.fixture
def mount() -> Iterator[Callable[[Path], None]]:
    """Put a small file system of its own where the plane is to have its data."""
    if os.geteuid() != 0:
        pytest.skip("a small file system of its own needs the right to mount")
    mounted: list[Path] = []

    def on(place: Path) -> None:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", place], capture_output=True)
        if done.returncode != 0:
            pytest.skip(f"cannot mount a tmpfs here: {done.stderr.decode().strip()}")
        mounted.append(place)

    yield on
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=False)


async def _printer(system: Stand, go: Path, size: int) -> str:
    """Work that waits for `go` and then prints so much."""
    return await system.order(sys.executable, "-I", "-S", "-c", PRINTER, str(go), str(size))


async def test_a_plane_on_a_full_disk_loses_nothing(mount: Callable[[Path], None]) -> None:
    """1. Work runs. 2. The plane's disk fills. 3. It prints and ends. 4. There is room. 5. Logs and settlements are there, once, exact.

    Control plane and daemon are the same processes all the time.
    """
    async with small_plane(mount) as system:
        pids = {name: system.pid(name) for name in ("plane", "daemon")}
        go = system.home / "go"
        executions = [await _printer(system, go, MORE_BYTES), await _printer(system, go, 65536)]

        async def all_run() -> bool:
            attempts = (await system.json("runner", "ps"))["attempts"]
            return sum(one["state"] == "running" for one in attempts) == len(executions)

        await poll(all_run, "the work to run")
        fill(system.home / "plane" / "ballast")
        go.touch()

        async def ended_here() -> bool:
            return all((system.state / "x" / f"{one}.1" / "exit.json").exists() for one in executions)

        await poll(ended_here, "the end of the work")
        await poll(_refused(system), "the refusal of the disk")
        stored = {one: (system.home / "plane" / "logs" / f"{one}.1.log") for one in executions}
        for one, path in stored.items():
            acked = (await system.get(f"/executions/{one}"))["log"]["end"]
            assert acked <= (path.stat().st_size if path.exists() else 0)
        assert [(await system.get(f"/executions/{one}"))["log"]["complete"] for one in executions] != [True, True]
        (system.home / "plane" / "ballast").unlink()
        for one, size in zip(executions, (MORE_BYTES, 65536), strict=True):
            ended = await system.ended(one)
            data = _printed(size)
            assert (ended["exit_status"], ended["log"]["short_bytes"]) == (0, 0)
            assert (await system.output(one))["stdout"] == data
            assert ended["settlement"]["streams"]["stdout"]["sha256"] == hashlib.sha256(data).hexdigest()
            kinds = [said["kind"] for said in (await system.get(f"/receipts/{one}"))["statements"]]
            assert sorted(kinds) == ["receipt", "settlement"]
            await system.run("runner-control", "logs", "--verify", one)
        assert {name: system.pid(name) for name in pids} == pids


def _printed(size: int) -> bytes:
    """What the printer writes."""
    rng = random.Random(7)
    return b"".join(rng.randbytes(65536) for _ in range(size // 65536))


def _refused(system: Stand) -> Callable[[], Awaitable[bool]]:
    """Whether the plane has said that its disk does not take something."""

    async def told() -> bool:
        said = (system.home / "plane.log").read_text()
        return "store.failed" in said or "log.sync_failed" in said

    return told


@asynccontextmanager
async def small_plane(mount: Callable[[Path], None]) -> AsyncIterator[Stand]:
    """A stand whose plane has a small disk of its own."""
    system = Stand()
    try:
        mount(system.home / "plane")
        await system.start_plane()
        await system.enroll()
        await system.start_daemon()
        await system.online()
        yield system
    except BaseException:
        print(system.log_tail("daemon"), system.log_tail("plane"), sep="\n--- plane\n")
        raise
    finally:
        await system.close()
