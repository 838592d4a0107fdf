"""A shim outlives the daemon that started it: what one says of terminals and the other does not know is passed over, and nothing breaks.

Older shims stand here as the real one, built anew without the words of viewers; older daemons as a connection that knows none of them.
Hand mutants, each tried, and each red: a link, and a shim, that break at a type they do not know.
"""

import asyncio
import os
import shutil
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from protocol.choices import Background, SizePolicy
from protocol.ids import Attempt
from protocol.limits import PTY_AHEAD_BYTES
from runner.adapters import forkserver
from runner.adapters.shimlink import ShimLink
from runner.core.inputs import AttemptExited
from runner.core.plans import TerminalPlan
from runner.shim import wire
from runner.shim.terminal import QUEUE_BYTES
from tests.support.shim import ENTRY, Shim
from tests.support.shims import Shims, a_plan, shims, sweep_all
from tests.support.viewer import Viewer

EX = Attempt.parse("ex_1.1")
WITHOUT_VIEWERS = f"""

_with_viewers = obey


def obey(guard, link, kind, body):
    if kind < {wire.VIEW}:
        _with_viewers(guard, link, kind, body)
"""
TYPED = 400_000
"""More than a shim holds for a program that does not read."""
PIECE = 60_000


@pytest_asyncio.fixture
async def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Shims]:
    """A daemon whose shims do not know what viewers say."""
    package = tmp_path / "old" / "runner"
    shutil.copytree(ENTRY.parent, package / "shim", ignore=shutil.ignore_patterns("__pycache__"))
    (package / "__init__.py").touch()
    with (package / "shim" / "hearing.py").open("a") as hearing:
        hearing.write(WITHOUT_VIEWERS)
    state = tmp_path / "state"
    with monkeypatch.context() as patched:
        patched.setattr(forkserver, "_MAIN", package / "shim" / "__main__.py")
        async with shims(state) as daemon:
            yield daemon
    await sweep_all(state)


async def test_a_shim_that_knows_no_viewers_is_held_by_a_daemon_that_does(old: Shims) -> None:
    """1. It is adopted. 2. Every word of viewers is passed over, and has no answer: it is kept where it came from. 3. It is stopped."""
    size = TerminalPlan(rows=24, cols=80, size_policy=SizePolicy.LATEST, background=Background.SWEEP)
    await old.start(a_plan("ex_1.1", "cat", terminal=size))
    taken: list[Any] = []
    async with shims(old.state_dir) as daemon:
        daemon.adapter.on_taken = lambda *told: taken.append(told)
        assert await daemon.adapter.adopt(EX)
        assert daemon.adapter.type("ex_1.1", "v", 0, b"never\n") is not None
        assert daemon.adapter.resize("ex_1.1", "v", 1, 30, 100, redraw=True)
        daemon.adapter.seen("ex_1.1", 0)
        daemon.adapter.leave("ex_1.1", "v")
        daemon.adapter.stop(EX, 100, "cmd_stop")
        record = (await daemon.told(AttemptExited)).exit
        assert daemon.cut == [], "the connection stood"
    assert (record.verdict, record.cause_kind, record.cause_by) == ("stopped", "stop", "cmd_stop")
    assert taken == []
    log = b"".join(path.read_bytes() for path in (old.state_dir / "x" / "ex_1.1" / "log").glob("*.seg"))
    assert b"never" not in log and struct.pack("<HH", 30, 100) not in log


async def test_a_daemon_that_knows_no_viewers_holds_a_pty_like_any_other_attempt(tmp_path: Path) -> None:
    """It hears of its growth and its end among words that it passes over; nobody tells what was seen, so nothing waits for that."""
    await asyncio.to_thread(_held_by_an_old_daemon, tmp_path)


def _held_by_an_old_daemon(root: Path) -> None:
    os.mkfifo(root / "gate")
    script = (
        f"stty raw -echo; echo ready; read -r _ <{root}/gate; head -c {TYPED} | wc -c; yes | head -c 600000; exec cat"
    )
    shim = Shim(root, None, argv=["sh", "-c", script], tty={"rows": 24, "cols": 80}, segment_bytes=1 << 20)
    try:
        shim.start()
        daemon = shim.connect()
        daemon.hello()
        daemon.wait(wire.STARTED)
        viewer = Viewer(shim)
        viewer.shows(b"ready")
        received = 0
        # Until there is no room: then everybody is told once there is.
        while (taken := viewer.give(received, b"x" * PIECE)[0]) > received:
            received = taken
        (root / "gate").write_text("\n")
        assert wire.unpack_taken(daemon.wait(wire.TAKEN))[1] == received
        while received < TYPED:
            received = viewer.give(received, b"x" * min(PIECE, TYPED - received))[0]
        viewer.shows(b"%d" % TYPED)
        end = 0
        while end < 2 * PTY_AHEAD_BYTES:
            daemon.send(wire.ARM, wire.OFFSET_BODY.pack(end))
            end = wire.unpack_offset(daemon.wait(wire.BELL))
        daemon.send(wire.STOP, wire.STOP_BODY.pack(300) + b"old")
        daemon.wait(wire.EXIT)
        daemon.send(wire.COLLECTED)
        shim.wait_gone()
        assert shim.exit_file()["cause"]["by"] == "old"
    finally:
        shim.close()


async def test_a_shim_passes_over_what_a_later_daemon_says(tmp_path: Path) -> None:
    """Every type that there is not yet, of any length, and bodies with more in them; what comes behind is heard."""
    await asyncio.to_thread(_told_by_a_later_daemon, tmp_path)


def _told_by_a_later_daemon(root: Path) -> None:
    shim = Shim(root, None, argv=["cat"], tty={"rows": 24, "cols": 80}, segment_bytes=1 << 20)
    try:
        shim.start()
        daemon = shim.connect()
        daemon.hello()
        for kind in range(wire.LEAVE + 1, 129):
            daemon.send(kind, b"later" * kind)
        daemon.sock.sendall(wire.pack(wire.RESIZE, wire.pack_resize(b"v", 1, 30, 100, redraw=False)[5:] + b"later"))
        daemon.sock.sendall(wire.pack_type(b"v", 0, b"once\r"))
        assert wire.unpack_taken(daemon.wait(wire.TAKEN)) == (b"v", 5, 5 + QUEUE_BYTES, False)
        shim.wait_log(lambda log: log.pty.count(b"once") == 2, "its echo, and what cat wrote")
        assert shim.log().sizes[-1] == (30, 100)
    finally:
        shim.close()


class Heard:
    """Who listens to a link."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda _link, *args, **more: self.told.append((name, *args, *more.values()))


def test_a_daemon_passes_over_what_a_later_shim_says() -> None:
    """Types that there are not yet, and bodies with more in them, between those that it knows, cut anywhere."""
    said = wire.pack_welcome(phase=3, first=0, end=0, lease_token=0, pid=7, start=8)
    for kind in (*range(1, 129), *range(wire.TAKEN + 1, 256)):
        said += wire.pack(kind, b"\xff" * (kind % 50))
    said += wire.pack(wire.TAKEN, wire.pack_taken(b"v", 3, 9, closed=False)[5:] + b"later")
    said += wire.pack(wire.BELL, wire.OFFSET_BODY.pack(77) + b"later")
    for step in (1, 7, len(said)):
        heard = Heard()
        link = ShimLink("ex_1.1", heard)
        for at in range(0, len(said), step):
            link.data_received(said[at : at + step])
        assert heard.told == [("shim_welcomed", 7, 8), ("shim_taken", "v", 3, 9, False), ("shim_rang", 77)]
