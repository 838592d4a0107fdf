"""Where attempts may have cgroups of their own, and how the leaf of a dead shim is swept."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.adapters import cgroups
from tests.support.cgroups import delegated, inside
from tests.support.shim import alive, wait_for

DELEGATED = "user.delegate"


@pytest.fixture
def place() -> Iterator[Path]:
    """A cgroup of our own."""
    with delegated() as found:
        yield found


def base_as_seen_from(home: Path) -> str:
    """What `base("auto")` says to a process that lives in `home`."""
    code = (
        f"open({str(home / 'cgroup.procs')!r}, 'w').write('0')\n"
        "from runner.adapters import cgroups\n"
        "print(cgroups.base('auto'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def a_sleeper(leaf: Path, *argv: str) -> int:
    """A process in a leaf, which is made for it."""
    leaf.mkdir(exist_ok=True)
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", "exec sleep 600"], {"PATH": "/bin:/usr/bin"})
    (leaf / "cgroup.procs").write_text(str(pid))
    return pid


def test_off_and_what_is_no_cgroup_give_no_base(tmp_path: Path) -> None:
    """The owner may do without; a directory, a relative path or nothing at all is no cgroup."""
    (tmp_path / "cgroup.procs").touch()
    for configured in ("off", "", "relative/path", str(tmp_path), str(tmp_path / "missing")):
        assert cgroups.base(configured) is None


def test_a_path_is_taken_as_it_is_when_leaves_can_be_made_there(place: Path) -> None:
    """The probe leaves nothing behind."""
    assert cgroups.base(str(place)) == place
    assert [each for each in place.iterdir() if each.is_dir()] == []


def test_auto_takes_only_what_was_delegated(place: Path) -> None:
    """Our own cgroup, or the one above where the daemon lives in a subgroup; never one that nobody handed over."""
    home = place / "home"
    home.mkdir()
    assert base_as_seen_from(place) == "None"
    os.setxattr(home, DELEGATED, b"0")
    assert base_as_seen_from(home) == "None"
    os.setxattr(home, DELEGATED, b"1")
    assert base_as_seen_from(home) == str(home)
    os.removexattr(home, DELEGATED)
    os.setxattr(place, DELEGATED, b"1")
    assert base_as_seen_from(home) == str(place)
    assert base_as_seen_from(place) == str(place)


def test_leaves_are_known_by_their_attempt(place: Path) -> None:
    """What else is below the base is not ours."""
    for name in ("runner-ex_1.1", "runner-g-cmd_1.2", "runner-probe-1", "home"):
        (place / name).mkdir()
    assert cgroups.leaves(place) == {
        "ex_1.1": cgroups.leaf(place, "ex_1.1"),
        "g-cmd_1.2": cgroups.leaf(place, "g-cmd_1.2"),
    }
    assert cgroups.leaves(place / "gone") == {}
    (place / "runner-probe-1").rmdir()


def test_a_leaf_is_swept_with_all_that_is_below_it(place: Path) -> None:
    """Everybody is killed, frozen or not, and the leaf is gone; doing it again does nothing."""
    leaf = cgroups.leaf(place, "ex_1.1")
    leaf.mkdir()
    (leaf / "below").mkdir()
    pids = [a_sleeper(leaf), a_sleeper(leaf / "below")]
    assert (inside(leaf), inside(leaf / "below")) == ([pids[0]], [pids[1]])
    (leaf / "cgroup.freeze").write_text("1")
    assert cgroups.populated(leaf)
    assert cgroups.sweep_leaf(leaf)
    assert not leaf.exists() and not any(map(alive, pids))
    for pid in pids:
        os.waitpid(pid, 0)
    assert not cgroups.populated(leaf)
    assert cgroups.sweep_leaf(leaf)


def test_a_leaf_that_cannot_be_emptied_stays(place: Path) -> None:
    """Who takes no KILL keeps it; the sweep says so in time."""
    group = Path(f"/sys/fs/cgroup/freezer/local-runner-test-{os.getpid()}")
    try:
        group.mkdir()
    except OSError as exc:
        pytest.skip(f"needs a version 1 freezer to hold a process: {exc}")
    leaf = cgroups.leaf(place, "ex_1.1")
    pid = a_sleeper(leaf)
    try:
        (group / "tasks").write_text(str(pid))
        (group / "freezer.state").write_text("FROZEN")
        wait_for(lambda: (group / "freezer.state").read_text() == "FROZEN\n", "the freezer")
        assert not cgroups.sweep_leaf(leaf, wait_s=0.2)
        assert inside(leaf) == [pid]
    finally:
        (group / "freezer.state").write_text("THAWED")
        os.waitpid(pid, 0)
        group.rmdir()
