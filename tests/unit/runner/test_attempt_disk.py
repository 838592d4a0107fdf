"""Attempts on a disk that is really full: nothing ran, nothing is left, and the same attempt runs when there is room again."""

import contextlib
import errno
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from runner.adapters.attemptdir import FENCES_DIR, raise_fence
from tests.support.shims import Shims, a_plan, shims, sweep_all


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one mebibyte and few files."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small tmpfs")
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=64", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest_asyncio.fixture
async def world(disk: Path) -> AsyncIterator[Shims]:
    """An adapter on that disk."""
    (disk / "x").mkdir()
    async with shims(disk, segment_bytes=16_384, spool_bytes=65_536) as daemon:
        yield daemon
    await sweep_all(disk)


def fill(disk: Path) -> Path:
    """Leave no room for a byte; what took it may be removed again."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.tell() < 2 << 20:
            file.write(bytes(4096))
    assert os.statvfs(disk).f_bavail == 0
    return ballast


def crowd(disk: Path) -> list[Path]:
    """Leave room for no further file; those that took it may be removed again."""
    made: list[Path] = []
    with contextlib.suppress(OSError):
        while len(made) < 1000:
            (disk / f"file-{len(made)}").touch()
            made.append(disk / f"file-{len(made)}")
    assert os.statvfs(disk).f_favail == 0
    return made


async def test_a_spec_for_which_there_is_no_room_leaves_no_attempt(world: Shims, disk: Path) -> None:
    """The directory was made, and is gone again; with room the same attempt runs."""
    ballast = fill(disk)
    with pytest.raises(OSError, match="No space") as full:
        await world.adapter.prepare(a_plan("ex_1.1", "sleep", "300"), "/", again=False)
    assert full.value.errno == errno.ENOSPC and list((disk / "x").iterdir()) == []
    ballast.unlink()
    await world.start(a_plan("ex_1.1", "sleep", "300"))


async def test_a_directory_for_which_there_is_no_inode_is_none(world: Shims, disk: Path) -> None:
    """As above, one step sooner."""
    made = crowd(disk)
    with pytest.raises(OSError, match="No space"):
        await world.adapter.prepare(a_plan("ex_1.1", "sleep", "300"), "/", again=False)
    assert list((disk / "x").iterdir()) == []
    for one in made:
        one.unlink()
    await world.start(a_plan("ex_1.1", "sleep", "300"))


@pytest.mark.parametrize("short_of", ["bytes", "inodes"])
async def test_a_fence_that_cannot_be_raised_stops_the_successor_and_stands_as_it_was(
    world: Shims, disk: Path, short_of: str
) -> None:
    """No half-written fence takes its place, and no draft of one stays."""
    raise_fence(disk, "ex_1", 2)
    if short_of == "bytes":
        fill(disk)
    else:
        crowd(disk)
    with pytest.raises(OSError, match="No space"):
        await world.adapter.prepare(a_plan("ex_1.3", token=3), "/", again=False)
    assert (disk / FENCES_DIR / "ex_1").read_text() == "2\n"
    assert os.listdir(disk / FENCES_DIR) == ["ex_1"] and list((disk / "x").iterdir()) == []
