"""The trash deletes what is in it, whatever it is, and nothing else."""

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import anyio
import pytest

from runner.adapters import trash
from runner.adapters.trash import Trash
from runner.errors import Broken


@pytest.fixture
def bin_dir(tmp_path: Path) -> Path:
    """An empty trash directory."""
    (tmp_path / "trash").mkdir()
    return tmp_path / "trash"


async def _empty(bin_dir: Path) -> None:
    can = Trash(bin_dir)
    for entry in can.entries():
        await can.delete(entry, anyio.CapacityLimiter(1))


@pytest.mark.slow
async def test_wide_and_deep_trees_are_deleted(bin_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bounded steps, with a bounded number of descriptors, deeper than any path may be long."""
    monkeypatch.setattr(trash, "STEP_ENTRIES", 7)
    home = os.open(bin_dir, os.O_RDONLY)
    os.mkdir("deep", dir_fd=home)
    where = os.open("deep", os.O_RDONLY, dir_fd=home)
    for _ in range(1500):
        os.mkdir("d" * 20, dir_fd=where)
        inner = os.open("d" * 20, os.O_RDONLY, dir_fd=where)
        os.close(where)
        where = inner
    os.close(where)
    os.close(home)
    for number in range(200):
        (bin_dir / "wide" / str(number % 10)).mkdir(parents=True, exist_ok=True)
        (bin_dir / "wide" / str(number % 10) / str(number)).write_text("x")
    await _empty(bin_dir)
    assert os.listdir(bin_dir) == []


async def test_odd_things_are_deleted(bin_dir: Path, tmp_path: Path) -> None:
    """Links, pipes, files as entries, names that are no text, names that we use ourselves."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    top = bin_dir / "top"
    (top / "a" / "b").mkdir(parents=True)
    os.mkfifo(top / "pipe")
    (top / "link").symlink_to(tmp_path / "precious")
    (top / "a" / "b" / "link").symlink_to(tmp_path / "precious")
    os.mkdir(os.fsencode(top) + b"/\xff\n")
    inode = os.stat(top / "a" / "b").st_ino
    (top / f".up-{inode}.0").write_text("in the way")
    (bin_dir / "link").symlink_to(tmp_path / "precious")
    (bin_dir / "file").write_text("x")
    await _empty(bin_dir)
    assert os.listdir(bin_dir) == []
    assert (tmp_path / "precious" / "file").read_text() == "x"


@pytest.mark.slow
async def test_a_link_that_takes_a_directorys_place_is_not_followed(bin_dir: Path, tmp_path: Path) -> None:
    """Somebody swaps directories for links all the time while we delete; what they point at stays whole."""
    precious = tmp_path / "precious"
    precious.mkdir()
    for number in range(50):
        (precious / str(number)).write_text("x")
    over = threading.Event()

    def swap() -> None:
        while not over.is_set():
            for number in range(20):
                for name in (bin_dir / "top" / f"{number}", bin_dir / "top" / f"{number}" / "inner"):
                    try:
                        name.rename(tmp_path / "away")
                        name.symlink_to(precious)
                        (tmp_path / "away").rename(tmp_path / f"gone-{number}-{name.name}")
                    except OSError:
                        continue

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        for _ in range(20):
            for number in range(20):
                with contextlib.suppress(OSError):  # the swapper takes our directories away, too
                    (bin_dir / "top" / f"{number}" / "inner").mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(Broken):  # what it was deleting had gone: said, and swept again later
                await _empty(bin_dir)
    finally:
        over.set()
        swapper.join()
    # Beside them there may be an `inner`: the loop above makes directories, and follows the links it meets.
    assert {str(number) for number in range(50)} <= set(os.listdir(precious))


async def test_another_file_system_inside_is_left_alone(bin_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody mounted it there; the entry stays and the reason is said."""
    (bin_dir / "top" / "mounted").mkdir(parents=True)
    (bin_dir / "top" / "mounted" / "file").write_text("x")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "none", bin_dir / "top" / "mounted"], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("may not mount here")
    try:
        (bin_dir / "top" / "mounted" / "precious").write_text("x")
        with pytest.raises(Broken, match="another file system"):
            await _empty(bin_dir)
        assert (bin_dir / "top" / "mounted" / "precious").exists()
    finally:
        subprocess.run(["umount", bin_dir / "top" / "mounted"], check=True)
    await _empty(bin_dir)
    assert os.listdir(bin_dir) == []


READ_ONLY = """
import anyio, os, sys
from pathlib import Path
from runner.adapters.trash import Trash
home = Path(sys.argv[1])
home.mkdir()
for path in ("top/a/b", "top/c"):
    (home / path).mkdir(parents=True)
    (home / path / "file").write_text("x")
for path in ("top/a/b", "top/a", "top/c", "top"):
    (home / path).chmod(0o000 if path == "top/c" else 0o500)
anyio.run(Trash(home).delete, "top", anyio.CapacityLimiter(1))
assert os.listdir(home) == [], os.listdir(home)
(home / "kept").mkdir(mode=0o500)
try:
    (home / "kept" / "file").write_text("x")
except PermissionError:
    sys.exit(0)
sys.exit("modes mean nothing here, so nothing was tested")
"""


def test_directories_that_may_not_be_written_are_deleted(tmp_path: Path) -> None:
    """Build tools leave such trees behind; done without the right by which root ignores modes."""
    drop = [] if os.geteuid() else ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    if drop and shutil.which("setpriv") is None:
        pytest.skip("root obeys no modes, and there is no setpriv to drop that right")
    argv = [*drop, sys.executable, "-c", READ_ONLY, str(tmp_path / "home")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_one_command_may_throw_more_than_once(bin_dir: Path, tmp_path: Path) -> None:
    """Each gets a name of its own."""
    for _ in range(3):
        (tmp_path / "thing").mkdir()
        Trash(bin_dir).throw(tmp_path, "thing", "c1")
    assert Trash(bin_dir).entries() == ["c1", "c1.1", "c1.2"]
