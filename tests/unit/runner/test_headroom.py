"""What this machine has left: measured as the kernel tells it, and never an error of the daemon."""

import os
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runner.adapters import headroom
from runner.adapters.headroom import Gauge, descriptors_free, memory_available
from runner.core.plans import Headroom


def a_disk(free: int, total: int, inodes_free: int = 50, inodes: int = 100) -> Any:
    """What statvfs says, in blocks of 10 bytes."""
    return SimpleNamespace(f_bavail=free, f_blocks=total, f_frsize=10, f_favail=inodes_free, f_files=inodes)


@pytest.fixture
def disks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[Path, Any]:
    """File systems by directory: `a` and `b` are there."""
    found: dict[Path, Any] = {}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(headroom.os, "statvfs", lambda place: found[place])
    return found


def test_this_machine_can_be_measured(tmp_path: Path) -> None:
    """Every figure is there and plausible; nothing is complained of."""
    faults: list[str] = []
    room = Gauge([tmp_path], faults.append).measure()
    disk = os.statvfs(tmp_path)
    assert faults == []
    assert room.disk_total == disk.f_blocks * disk.f_frsize and 0 < (room.disk_free or 0) <= room.disk_total
    assert 0 < (room.memory_available or 0) < 2**50


def test_the_lesser_of_two_file_systems_counts(disks: dict[Path, Any], tmp_path: Path) -> None:
    """Space and inodes each by itself; a directory that is not there yet counts for nothing."""
    disks |= {tmp_path / "a": a_disk(7, 100, 90), tmp_path / "b": a_disk(9, 20, 10)}
    gauge = Gauge([tmp_path / "a", tmp_path / "b", tmp_path / "c"])
    room = gauge.measure()
    assert (room.disk_free, room.disk_total, room.inodes_free, room.inodes_total) == (70, 1000, 10, 100)


def test_a_file_system_without_a_number_of_inodes_does_not_run_out_of_them(
    disks: dict[Path, Any], tmp_path: Path
) -> None:
    """It says 0 of 0, which is not told as 0."""
    disks[tmp_path / "a"] = a_disk(1, 2, 0, 0)
    room = Gauge([tmp_path / "a"]).measure()
    assert (room.disk_free, room.inodes_free, room.inodes_total) == (10, None, None)


def test_open_files_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more open, one less left; no limit, no number. A kernel before 6.2 tells the same."""
    limits = (500, 1000)
    monkeypatch.setattr(resource, "getrlimit", lambda _what: limits)
    before = descriptors_free()
    assert before is not None
    fd = os.open("/dev/null", os.O_RDONLY)
    try:
        assert descriptors_free() == before - 1
        monkeypatch.setattr(headroom.os, "stat", lambda _path: SimpleNamespace(st_size=0))
        assert descriptors_free() == before - 1
    finally:
        os.close(fd)
    limits = (3, 3)
    assert descriptors_free() == 0
    limits = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    assert descriptors_free() is None


def test_what_cannot_be_measured_is_not_told_and_complained_of_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """1. No /proc: the rest is told. 2. It is told of once. 3. It works again, and fails again: told again."""
    faults: list[str] = []
    gauge = Gauge([tmp_path], faults.append)
    nowhere, there = tmp_path / "meminfo", headroom.MEMINFO
    monkeypatch.setattr(headroom, "MEMINFO", nowhere)
    for _ in range(3):
        room = gauge.measure()
        assert room.memory_available is None and room.disk_free is not None and room.fds_free is not None
    assert len(faults) == 1 and str(nowhere) in faults[0]
    monkeypatch.setattr(headroom, "MEMINFO", there)
    assert gauge.measure().memory_available == pytest.approx(memory_available(), rel=0.5)
    nowhere.write_text("MemTotal: 1 kB\n")
    monkeypatch.setattr(headroom, "MEMINFO", nowhere)
    gauge.measure()
    assert len(faults) == 2 and "no MemAvailable" in faults[1]


def test_a_machine_that_tells_nothing_refuses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No directory, no /proc."""
    monkeypatch.setattr(headroom, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(headroom, "DESCRIPTORS", str(tmp_path / "fd"))
    assert Gauge([tmp_path / "nowhere"]).measure() == Headroom()
