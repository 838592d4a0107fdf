"""The sweep of what a dead shim left: found in tiers, ended by identity, told with evidence.

Mutants that died by hand: the leaf is not asked; the children of carriers are not; a start time is not compared; one listing of a
scan is enough; the spared are killed; a prefix of a cookie is that cookie; another runner's processes are ours.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runner.adapters import cgroups, sweeper
from runner.adapters.sweeper import COOKIE_NAME, Spared, end_remains, kill_shim, scan
from runner.shim import process, system
from tests.support.cgroups import delegated
from tests.support.shim import alive, wait_for
from tests.support.unprivileged import NOBODY

RUNNER = f"rn_sweep{os.getpid()}"
COOKIE = f"{RUNNER}:ex_1.1"
StartTree = Callable[..., int]


@pytest.fixture
def start() -> Iterator[StartTree]:
    """Start shell scripts that carry a cookie, as children of nobody; their pid. They are ended with the test."""
    started: list[subprocess.Popen[bytes]] = []

    def run(script: str, cookie: str = COOKIE, cwd: Path = Path("/"), uid: int | None = None) -> int:
        env = {"PATH": os.environ["PATH"], COOKIE_NAME: cookie}
        root = subprocess.Popen(["sh", "-c", script], env=env, cwd=cwd, start_new_session=True, user=uid)
        started.append(root)
        return root.pid

    yield run
    for root in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(root.pid, signal.SIGKILL)
        root.wait()


def gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    return not alive(pid)


def comm(pid: int) -> str:
    """The name of a process."""
    return Path(f"/proc/{pid}/comm").read_text().strip()


def noted(path: Path, count: int = 1) -> list[int]:
    """The pids that a tree wrote down."""
    wait_for(lambda: path.exists() and len(path.read_text().split()) >= count, "the pids")
    return [int(pid) for pid in path.read_text().split()]


def test_carriers_are_ended_with_what_they_started(start: StartTree, tmp_path: Path) -> None:
    """Also a child that cleaned its environment, as long as its parent is there to lead to it."""
    root = start("env -i sleep 600 & echo $! >> pids; wait", cwd=tmp_path)
    (bare,) = noted(tmp_path / "pids")
    wait_for(lambda: b"COOKIE" not in Path(f"/proc/{bare}/environ").read_bytes(), "the clean environment")
    swept = end_remains(COOKIE)
    assert (swept.found, swept.signalled, swept.remaining) == (2, 2, 0)
    assert swept.tiers == (("cookie", 9, 1), ("descendants", 9, 1))
    assert gone(root) and gone(bare)
    assert {line.split()[0] for line in swept.seen} == {str(root), str(bare)}
    assert end_remains(COOKIE).found == 0


def test_a_cookie_is_compared_as_a_whole(start: StartTree) -> None:
    """Another attempt's begins with the same letters: it is left alone."""
    longer, shorter = start("exec sleep 600", COOKIE + "0"), start("exec sleep 600", COOKIE[:-1])
    assert end_remains(COOKIE).found == 0
    assert alive(longer) and alive(shorter)


def test_a_respawning_chain_is_ended(start: StartTree) -> None:
    """Each of its processes lives for a moment and starts the next: none slips through the scans."""
    chain = "trap '' TERM; f() { (sleep .01; f) & }; f; f; f; f; exit 0"
    for _ in range(5):
        start(f'bash -c "{chain}"')
        wait_for(lambda: scan(RUNNER), "the chain")
        swept = end_remains(COOKIE)
        assert (swept.remaining, scan(RUNNER)) == (0, [])


def test_who_is_born_during_a_scan_is_found_by_it(start: StartTree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are listed until nobody new is there: the carrier comes with the third listing only."""
    root = start("exec sleep 600")
    # In the middle of an exec a process shows no environment.
    wait_for(lambda: Path(f"/proc/{root}/comm").read_text() == "sleep\n" and scan(RUNNER), "its second exec")
    everybody = process.pids
    listings = iter([[1], [1, 2]])
    monkeypatch.setattr(process, "pids", lambda: iter(next(listings, None) or everybody()))
    (found,) = scan(RUNNER)
    assert [each.pid for each in found.processes] == [root]


def test_a_stopped_tree_is_ended(start: StartTree) -> None:
    """A KILL needs no CONT."""
    root = start("sleep 600")
    os.killpg(root, signal.SIGSTOP)
    assert end_remains(COOKIE).remaining == 0
    assert gone(root)


def test_a_leaf_is_ended_whoever_is_in_it(start: StartTree, tmp_path: Path) -> None:
    """Neither cookie nor parent leads to a double fork with a clean environment: its cgroup does, and goes."""
    with delegated() as base:
        leaf = cgroups.leaf(base, "ex_1.1")
        leaf.mkdir()
        bare = "sh -c 'echo $$ >> pids; exec sleep 600'"
        start(f"echo 0 > {leaf}/cgroup.procs; (setsid env -i {bare} &); exec sleep 600", cwd=tmp_path)
        (escaped,) = noted(tmp_path / "pids")
        wait_for(lambda: len(sweeper._Sweep(b"x=y", leaf, Spared())._look()) == 2, "both of them")
        swept = end_remains(COOKIE, leaf=leaf)
        assert (swept.found, swept.signalled, swept.remaining) == (2, 2, 0)
        assert swept.tiers == (("cgroup", 9, 2),)
        assert gone(escaped) and not leaf.exists()


@pytest.mark.parametrize("tier", ["cookie", "cgroup"])
def test_who_may_outlive_the_attempt_does(start: StartTree, tmp_path: Path, tier: str) -> None:
    """It and what it started are told of and left alone, and move out of the leaf; the attempt's own child never is."""
    shutil.copy("/bin/sleep", tmp_path / "watchman")
    with contextlib.ExitStack() as kept:
        leaf = None
        enter = ""
        if tier == "cgroup":
            leaf = cgroups.leaf(kept.enter_context(delegated()), "ex_1.1")
            leaf.mkdir()
            enter = f"echo 0 > {leaf}/cgroup.procs; "
        child = start(f"{enter} ./watchman 600 & echo $! > pids; exec ./watchman 601", cwd=tmp_path)
        (daemon,) = noted(tmp_path / "pids")
        wait_for(lambda: {comm(child), comm(daemon)} == {"watchman"}, "both programs")
        swept = end_remains(COOKIE, leaf=leaf, spared=Spared(("watchman",), child))
        assert (swept.found, swept.remaining) == (1, 0)
        assert [line.split()[:2] for line in swept.outlived] == [[str(daemon), "watchman"]]
        assert alive(daemon) and gone(child)
        assert leaf is None or not leaf.exists()
        assert [found.attempt for found in scan(RUNNER)] == ["ex_1.1"]
        os.kill(daemon, signal.SIGKILL)


def test_who_cannot_be_ended_is_told_of(start: StartTree) -> None:
    """The kernel holds it: found, signalled, still there, and where it sleeps; in bounded time."""
    group = Path(f"/sys/fs/cgroup/freezer/local-runner-test-{os.getpid()}")
    try:
        group.mkdir()
    except OSError as exc:
        pytest.skip(f"needs root and a version 1 freezer to hold a process: {exc}")
    root = start("exec sleep 600")
    wait_for(lambda: comm(root) == "sleep", "the program")
    try:
        (group / "tasks").write_text(str(root))
        (group / "freezer.state").write_text("FROZEN")
        wait_for(lambda: (group / "freezer.state").read_text() == "FROZEN\n", "the freezer")
        begun = time.monotonic()
        swept = end_remains(COOKIE)
        assert time.monotonic() - begun < 20
        assert (swept.found, swept.signalled, swept.remaining) == (1, 1, 1)
        (line,) = swept.remains
        assert line.startswith(f"{root} sleep D wchan=") and line.endswith(" d_state")
    finally:
        (group / "freezer.state").write_text("THAWED")
        wait_for(lambda: gone(root) and not (group / "tasks").read_text().strip(), "the end")
        group.rmdir()


def test_the_scan_finds_ours_by_attempt_and_nobody_elses(start: StartTree) -> None:
    """Grouped by attempt; another runner's and another user's processes are not ours."""
    first, second = start("exec sleep 600"), start("exec sleep 601", f"{RUNNER}:ex_2.7")
    third = start("exec sleep 602", f"{RUNNER}:ex_2.7")
    start("exec sleep 600", f"{RUNNER}0:ex_3.1")
    if os.geteuid() == 0:
        start("exec sleep 600", f"{RUNNER}:ex_4.1", uid=NOBODY)
    wait_for(lambda: len(scan(RUNNER)) == 2, "all of them")
    found = scan(RUNNER)
    assert [(each.attempt, [one.pid for one in each.processes]) for each in found] == [
        ("ex_1.1", [first]),
        ("ex_2.7", sorted([second, third])),
    ]
    assert all(one.start == system.start_time(one.pid) for each in found for one in each.processes)


def test_the_scan_finds_who_is_in_a_leaf(start: StartTree) -> None:
    """A process without a cookie is its attempt's by the leaf it is in; an empty leaf is nobody."""
    with delegated() as base:
        for name in ("ex_5.1", "ex_6.1"):
            cgroups.leaf(base, name).mkdir()
        pid = start(f"echo 0 > {cgroups.leaf(base, 'ex_5.1')}/cgroup.procs; exec sleep 600", "")
        wait_for(lambda: scan(RUNNER, base=base), "the process")
        (found,) = scan(RUNNER, base=base)
        assert (found.attempt, [(one.pid, one.tier) for one in found.processes]) == ("ex_5.1", [(pid, "cgroup")])


def test_a_shim_that_hangs_is_killed_by_its_identity() -> None:
    """Only the process that was recorded: a stopped one dies, another with its number does not, and nobody is no error."""
    shim = subprocess.Popen([sys.executable, "-ISc", "import time; time.sleep(600)"])
    start = system.start_time(shim.pid)
    os.kill(shim.pid, signal.SIGSTOP)
    assert kill_shim(shim.pid, start + 1)
    assert alive(shim.pid)
    assert kill_shim(shim.pid, start)
    assert shim.wait() == -signal.SIGKILL
    assert kill_shim(shim.pid, start)
