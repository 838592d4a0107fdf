"""Disks that refuse: the floor that output leaves, and every write of a shim on a disk that is full, over quota or broken.

The child is never blocked, the verdict is right, the record is written as soon as there is room, and nothing spins meanwhile.

Mutants that died by hand: the floor is asked for every record, or once only; the log goes on at the first byte above the floor; the
exit record respects the floor; EDQUOT is raised; a child is ended because `meta.json` could not be written; a shim whose end is settled
tries again and again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import posix
import select
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.adapters.attemptfiles import read_attempt
from runner.shim import output, records, system, wire
from tests.support import shimclock
from tests.support.shim import Log, Shim, read_log, wait_for

pytestmark = pytest.mark.slow

StartShim = Callable[..., Shim]
MIB = 1 << 20
ATTEMPT = b"ex_1.1"
QUIET_S = 2.5
WAKE_UPS_MAX = 12
TICKS_MAX = 20
"""In QUIET_S: a look each second, and what a busy machine makes of it; a spin is thousands, and a quarter of a second of CPU."""


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Make file systems in memory, with the options of `mount`."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small tmpfs")
    mounted: list[Path] = []

    def make(options: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        if done.returncode != 0:
            pytest.skip(f"cannot mount a tmpfs here: {done.stderr.decode().strip()}")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def free(disk: Path) -> int:
    """Bytes that are left."""
    told = os.statvfs(disk)
    return told.f_bavail * told.f_frsize


def fill(disk: Path, name: str = "ballast", *, leave: int = 0) -> Path:
    """Fill the disk but for `leave` bytes."""
    path = disk / name
    with open(path, "wb", buffering=0) as file:
        try:
            while free(disk) > leave:
                file.write(bytes(4096))
        except OSError:
            pass
    return path


def activity(pid: int) -> tuple[int, int]:
    """How often a process was woken, and how many ticks of CPU it has used."""
    status = Path(f"/proc/{pid}/status").read_text()
    woken = int(next(line for line in status.splitlines() if line.startswith("voluntary")).split()[1])
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return woken, int(fields[11]) + int(fields[12])


def assert_quiet(pid: int) -> None:
    """The process does next to nothing for a while; a measurement, so it takes its time."""
    before = activity(pid)
    time.sleep(QUIET_S)
    after = activity(pid)
    assert after[0] - before[0] <= WAKE_UPS_MAX
    assert after[1] - before[1] <= TICKS_MAX


# --- the floor --------------------------------------------------------------------------------------------------------


def test_output_leaves_the_disk_its_floor(start_shim: StartShim, mount: Callable[..., Path]) -> None:
    """Keeping stops near the floor, reading does not; what was kept is whole and the end is told in the log."""
    disk = mount("size=16m")
    count = 12 * MIB
    shim = start_shim(disk, argv=["head", "-c", str(count), "/dev/zero"], floor_bytes=8 * MIB, segment_bytes=MIB)
    record = shim.run()
    log = shim.log()
    assert record["streams"]["stdout"]["bytes"] == count
    assert free(disk) > 8 * MIB - output.FLOOR_ASK_BYTES - 2 * len(system.Warm().buffer)
    assert 4 * MIB < len(log.stdout) < 9 * MIB
    assert len(log.holes) == 1
    assert (log.exit["code"], record["log"]["end"]) == (0, log.end)
    assert shim.exit_file() == record


def test_a_floor_that_cannot_be_met_keeps_nothing_but_the_end(
    start_shim: StartShim, mount: Callable[..., Path]
) -> None:
    """A disk that is too small from the start: the attempt runs, its end is told."""
    shim = start_shim(mount("size=2m"), argv=["head", "-c", "100000", "/dev/zero"], floor_bytes=64 * MIB)
    record = shim.run()
    log = shim.log()
    assert (record["code"], record["streams"]["stdout"]["bytes"]) == (0, 100_000)
    assert (log.stdout, log.exit["code"], record["log"]["end"]) == (b"", 0, log.end)


def test_output_is_kept_again_above_the_floor(start_shim: StartShim, mount: Callable[..., Path]) -> None:
    """Room that somebody else makes is noticed within a second of output, and the log goes on behind its hole."""
    disk = mount("size=8m")
    ballast = fill(disk, leave=2 * MIB)
    script = "echo lost; while [ -e ballast ]; do sleep .02; done; while ! [ -e done ]; do echo kept; sleep .02; done"
    shim = start_shim(
        disk, argv=["sh", "-c", script], cwd=str(disk), floor_bytes=4 * MIB, segment_bytes=64 * 1024
    )  # fmt: skip
    pid = shim.start()
    shim.controller.send(wire.ARM, struct.pack("<Q", 0))
    shim.controller.wait(wire.BELL)
    assert shim.log().segments == []
    ballast.unlink()
    wait_for(lambda: list((shim.dir / "log").iterdir()), "the first segment", wait_s=10)
    (disk / "done").touch()
    assert shim.exit()["code"] == 0
    log = shim.log()
    assert b"kept\n" in log.stdout and b"lost" not in log.stdout
    assert log.holes[0][0] == 0 < log.segments[0][0]
    assert pid


class Disk:
    """The kernel's calls, with the answers of a disk that a test controls. Stands in for `os` in the log."""

    def __init__(self) -> None:
        self.free = 1 << 40
        self.asked = 0
        self.refuse: dict[str, int] = {}
        """Error number by the name of the call."""

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name in self.refuse:
                raise OSError(self.refuse[name], os.strerror(self.refuse[name]))
            return getattr(posix, name)(*args, **kwargs)

        return getattr(posix, name) if name.isupper() else call

    def fstatvfs(self, fd: int) -> os.statvfs_result:
        """Room as the test wants it."""
        self.asked += 1
        if "fstatvfs" in self.refuse:
            raise OSError(self.refuse["fstatvfs"], "")
        told = list(posix.fstatvfs(fd))
        told[1], told[4] = 1, self.free
        return os.statvfs_result(tuple(told))


class Writer:
    """A log over a disk of the test, in this process."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **limits: int) -> None:
        self.disk = Disk()
        self.folder = folder / "log"
        self.folder.mkdir()
        monkeypatch.setattr(output, "os", self.disk)
        self.dirfd = os.open(self.folder, os.O_RDONLY)
        sizes = {"segment_bytes": 64 * MIB, "spool_bytes": 1 << 40} | limits
        self.log = output.Log(self.dirfd, ATTEMPT, warm=system.Warm(), **sizes)
        self.pipe, self.door = os.pipe()
        self.now_ms = 5_000

    def write(self, data: bytes) -> None:
        """The child writes."""
        for at in range(0, len(data), 32_768):
            os.write(self.door, data[at : at + 32_768])
            assert self.log.copy(self.pipe, records.STDOUT, 1, self.now_ms) > 0

    def end(self) -> Log:
        """The exit record, and the log as it is read back."""
        self.log.finish(b"{}", 1)
        found = read_log(self.folder, ATTEMPT)
        assert found.end == self.log.end
        assert found.chain == self.log.chain.hex()
        for fd in (self.dirfd, self.pipe, self.door):
            os.close(fd)
        return found


def test_the_floor_is_asked_for_once_a_mebibyte_or_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flood asks per MiB, a trickle per second, silence not at all."""
    writer = Writer(tmp_path, monkeypatch, floor_bytes=1)
    writer.write(bytes(8 * MIB))
    assert 8 <= writer.disk.asked <= 10
    asked = writer.disk.asked
    for _ in range(50):
        writer.now_ms += 100
        writer.write(b"x")
    assert 4 <= writer.disk.asked - asked <= 6
    assert writer.end().holes == []


def test_no_floor_asks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero is no floor."""
    writer = Writer(tmp_path, monkeypatch, floor_bytes=0)
    writer.disk.free = 0
    writer.write(bytes(4 * MIB))
    assert (writer.disk.asked, len(writer.end().stdout)) == (0, 4 * MIB)


def test_the_log_goes_on_with_a_segments_room_above_the_floor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that hovers at its floor does not make a row of tiny segments."""
    writer = Writer(tmp_path, monkeypatch, floor_bytes=100 * MIB, segment_bytes=MIB)
    writer.write(b"first")
    for kept, room in ((False, 100 * MIB - 1), (False, 100 * MIB), (False, 101 * MIB - 1), (True, 101 * MIB)):
        writer.disk.free = room
        writer.now_ms += 1_001
        writer.write(b"later")
        assert (len(list(writer.folder.iterdir())) == 2) is kept
    assert writer.end().stdout == b"firstlater"


def test_a_disk_that_does_not_tell_its_room_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer is no reason to lose output."""
    writer = Writer(tmp_path, monkeypatch, floor_bytes=MIB)
    writer.disk.refuse["fstatvfs"] = errno.EIO
    writer.write(b"all of it")
    assert writer.end().stdout == b"all of it"


# --- a log that cannot be written -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG])
@pytest.mark.parametrize("call", ["write", "open"])
def test_a_disk_that_refuses_makes_a_hole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    """ENOSPC, EDQUOT, EIO, EFBIG at a record or at a new segment: counted, digested, not kept, and tried again."""
    writer = Writer(tmp_path, monkeypatch, segment_bytes=4_096)
    writer.write(b"first\n")
    writer.disk.refuse[call] = number
    writer.write(bytes(9_000))
    writer.disk.refuse.clear()
    writer.write(b"too soon\n")
    writer.now_ms += output.RETRY_MS
    writer.write(b"last\n")
    log = writer.end()
    assert log.stdout.startswith(b"first\n") and log.stdout.endswith(b"last\n")
    assert b"too soon" not in log.stdout
    assert len(log.holes) == 1
    assert writer.log.streams[records.STDOUT].bytes == 6 + 9_000 + 9 + 5


# --- a whole shim -----------------------------------------------------------------------------------------------------


def test_a_full_disk_with_a_silent_child_costs_nothing(start_shim: StartShim, mount: Callable[..., Path]) -> None:
    """A hole is looked into when there is output, not by the clock."""
    disk = mount("size=1m")
    script = "head -c 2000000 /dev/zero; echo done >&2; sleep 600"
    shim = start_shim(disk, argv=["sh", "-c", script], cwd="/")
    shim.start()
    # A torn record was taken back: the room of one may be left.
    wait_for(lambda: free(disk) < 2 * records.PAYLOAD_MAX, "the disk to be full")
    assert_quiet(shim.pid)
    shim.stop()
    assert shim.exit()["verdict"] == "stopped"


@pytest.mark.parametrize("inodes", range(4, 14))
def test_a_disk_without_inodes_refuses_a_start_or_loses_output(
    mount: Callable[..., Path], tmp_path: Path, inodes: int
) -> None:
    """Wherever the next file cannot be made (lock, socket, log, meta, exit record, segment): nothing ran, or all of it did."""
    ran = tmp_path / "ran"
    shim = Shim(mount(f"nr_inodes={inodes}"), None, argv=["sh", "-c", f"echo out; echo ran > {ran}"])
    told = b""
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            shim.release()
            while not told and (message := shim.controller.receive()) is not None:
                told = message[1] if message[0] == wire.EXIT else b""
            shim.controller.send(wire.COLLECTED)
        shim.wait_gone()
        seen = read_attempt(shim.dir)
        if told:
            assert json.loads(told)["verdict"] == ("exited" if ran.exists() else "never_started")
        else:
            # Nobody said how it ended: then its files prove that it was never let go.
            assert (ran.exists(), seen.phase in ("none", "ready"), seen.exit) == (False, True, None)
    finally:
        shim.close()


def test_a_disk_that_is_full_at_the_release_starts_nothing(start_shim: StartShim, mount: Callable[..., Path]) -> None:
    """Without `released` on disk nothing may run; the record has its room since the beginning."""
    disk = mount("size=1m")
    shim = start_shim(disk, argv=["true"])
    wait_for(lambda: (shim.dir / "exit.json.tmp").exists(), "the last file that a shim makes before its start")
    fill(disk)
    record = shim.run()
    assert (record["verdict"], record["cause"]["kind"]) == ("never_started", "shim_failed")
    assert "No space left" in record["cause"]["detail"]
    assert shim.exit_file() == record


def test_a_disk_that_is_full_behind_the_spawn_ends_no_child(start_shim: StartShim, mount: Callable[..., Path]) -> None:
    """1. The shim stands still right behind the spawn. 2. The disk fills. 3. `running` cannot be written, the child goes on."""
    disk = mount("size=1m")
    shim = start_shim(disk, argv=["sh", "-c", "sleep .2; exit 5"], fail={"spawned": "stop"})
    wait_for(lambda: (shim.dir / "exit.json.tmp").exists(), "the last file that a shim makes before its start")
    shim.release()
    wait_for(
        lambda: Path(f"/proc/{shim.pid}/stat").read_text().rpartition(") ")[2][0] == "T", "the shim to stand still"
    )
    ballast = fill(disk)
    os.kill(shim.pid, signal.SIGCONT)
    shim.controller.wait(wire.STARTED)
    record = shim.exit()
    assert (record["verdict"], record["code"], record["cause"]["kind"]) == ("exited", 5, "none")
    assert shim.meta()["phase"] == "released"
    assert shim.exit_file() == record
    assert ballast.exists()


@pytest.fixture
def unrecorded(mount: Callable[..., Path], tmp_path: Path) -> Iterator[tuple[Shim, shimclock.Clock, Path]]:
    """An attempt that has ended, and whose record does not fit on the disk, its room having been taken away."""
    disk = mount("size=1m")
    (disk / "hold").touch()
    script = "while [ -e hold ]; do sleep .02; done; exit 5"
    shim = Shim(disk, None, entry=shimclock.ENTRY, argv=["sh", "-c", script], cwd=str(disk))
    shim.start()
    # The clock must go on when the disk is full: it is elsewhere.
    (shim.dir / shimclock.NAME).symlink_to(tmp_path / shimclock.NAME)
    clock = shimclock.Clock(tmp_path)
    (shim.dir / "exit.json.tmp").unlink()
    ballast = fill(disk)
    (disk / "hold").unlink()
    yield shim, clock, ballast
    shim.close()


def test_the_record_is_written_once_there_is_room(unrecorded: tuple[Shim, shimclock.Clock, Path]) -> None:
    """Who listens is told at once; the file follows, and nothing spins until it can."""
    shim, _clock, ballast = unrecorded
    record = shim.exit()
    assert (record["verdict"], record["code"]) == ("exited", 5)
    assert_quiet(shim.pid)
    assert not (shim.dir / "exit.json").exists()
    ballast.unlink()
    assert shim.exit_file() == record


def test_a_record_that_never_finds_room_is_given_up_with_the_shim(
    unrecorded: tuple[Shim, shimclock.Clock, Path],
) -> None:
    """Nobody listens and the disk stays full: the shim goes in the end, and the files say `lost`."""
    shim, clock, _ballast = unrecorded
    shim.controller.wait(wire.EXIT)
    shim.controller.close()

    def gone() -> bool:
        clock.pass_by(20_000)
        return bool(select.select([shim.pidfd], [], [], 0.2)[0])

    wait_for(gone, "the shim's end")
    assert read_attempt(shim.dir).state == "lost"


def test_a_settled_end_needs_no_record(unrecorded: tuple[Shim, shimclock.Clock, Path]) -> None:
    """COLLECTED on a full disk: one try, and the shim is gone; it does not try again and again."""
    shim, _clock, _ballast = unrecorded
    shim.controller.wait(wire.EXIT)
    shim.controller.send(wire.COLLECTED)
    shim.wait_gone(5)
