"""The cgroup tier of a shim: born inside, frozen and killed whole, and never a failed start for want of it.

Mutants that died by hand: the shim does not step back; the leaf is killed while the shim is inside; a leaf with somebody in it is
taken; the leaf stays behind; a thaw is left out of the TERM; those below the leaf are not listed.
"""

from __future__ import annotations

import os
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runner.adapters import cgroups
from runner.shim import wire
from runner.shim.cgroup import Leaf
from tests.support.cgroups import delegated, inside
from tests.support.shim import Shim, alive, boottime_ms, wait_for

pytestmark = pytest.mark.slow

StartShim = Callable[..., Shim]
FREEZE = 1
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
)


@pytest.fixture(scope="module")
def base() -> Iterator[Path]:
    """A cgroup to make leaves in."""
    with delegated() as place:
        yield place


@pytest.fixture
def leaf(base: Path, request: pytest.FixtureRequest) -> Path:
    """A leaf that does not exist yet."""
    return cgroups.leaf(base, f"{abs(hash(request.node.name))}.1")


def is_frozen(leaf: Path) -> bool:
    """Whether the kernel has frozen everybody in it."""
    return "frozen 1" in (leaf / "cgroup.events").read_text()


def test_the_child_is_born_inside_and_the_shim_lives_outside(start_shim: StartShim, leaf: Path) -> None:
    """The leaf holds the payload from its first instruction on, never the shim, and is gone with the tree."""
    ours = Path("/proc/self/cgroup").read_text().splitlines()[-1]
    shim = start_shim(argv=["sh", "-c", "grep ^0:: /proc/self/cgroup; sleep 600"], cgroup=str(leaf))
    pid = shim.start()
    shim.wait_log(lambda log: log.stdout, "what the child sees")
    assert shim.log().stdout.decode().strip().endswith(f"/{leaf.parent.name}/{leaf.name}")
    assert pid in inside(leaf) and shim.pid not in inside(leaf)
    assert Path(f"/proc/{shim.pid}/cgroup").read_text().splitlines()[-1] == ours
    assert shim.meta()["tiers"] == ["cgroup", "descendants", "cookie"]
    shim.stop()
    record = shim.exit()
    assert (record["tiers"], record["survivors"]) == (["cgroup", "descendants", "cookie"], 0)
    assert not leaf.exists()


def test_a_tree_that_ignores_term_is_killed_as_a_whole(start_shim: StartShim, leaf: Path) -> None:
    """The KILL reaches everybody through the leaf, also who has neither cookie nor parent, and is counted there."""
    escapee = f'setsid env -i {sys.executable} -ISc "{STUBBORN}" & '
    shim = start_shim(argv=["sh", "-c", f'({escapee}) ; exec {sys.executable} -ISc "{STUBBORN}"'], cgroup=str(leaf))
    shim.start()
    shim.wait_log(lambda log: log.stdout == b"deaf\ndeaf\n", "both of them")
    pids = inside(leaf)
    shim.stop(grace_ms=100)
    record = shim.exit()
    assert len(pids) == 2 and not any(map(alive, pids))
    assert {"tier": "cgroup", "signal": signal.SIGKILL, "count": 1} in record["swept"]
    assert (record["signal"], record["survivors"]) == (signal.SIGKILL, 0)


def test_a_tree_that_forks_without_an_end_dies_of_one_kill(start_shim: StartShim, leaf: Path) -> None:
    """Who is born during the sweep dies with the leaf."""
    chain = "trap '' TERM; f() { (trap '' TERM; f) & }; f; f; f; f; sleep 600"
    shim = start_shim(argv=["bash", "-c", f"ulimit -u 4000; {chain}"], cgroup=str(leaf))
    shim.start()
    shim.stop(grace_ms=100)
    record = shim.exit()
    assert (record["survivors"], record["remains"]) == (0, [])
    assert not leaf.exists()


def test_a_freeze_is_the_leafs_and_a_later_lease_thaws_it(start_shim: StartShim, leaf: Path) -> None:
    """Nobody is stopped by a signal, everybody stands still; the renewed lease lets them go on."""
    shim = start_shim(argv=["sleep", "600"], cgroup=str(leaf))
    pid = shim.start()
    shim.controller.send(wire.LEASE, struct.pack("<QQB", 1, boottime_ms(), FREEZE))
    wait_for(lambda: is_frozen(leaf), "the freeze")
    assert Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "T"
    shim.controller.send(wire.LEASE, struct.pack("<QQB", 1, boottime_ms() + 60_000, FREEZE))
    wait_for(lambda: not is_frozen(leaf), "the thaw")


def test_a_frozen_tree_takes_its_stop(start_shim: StartShim, leaf: Path) -> None:
    """The TERM comes with a thaw, whoever froze the tree: a handler runs, long before the grace is over."""
    script = "trap 'exit 3' TERM; echo ready; while :; do sleep .05; done"
    shim = start_shim(argv=["sh", "-c", script], cgroup=str(leaf))
    shim.start()
    shim.wait_log(lambda log: log.stdout == b"ready\n", "the handler")
    (leaf / "cgroup.freeze").write_text("1")
    wait_for(lambda: is_frozen(leaf), "the freeze")
    shim.stop(grace_ms=60_000)
    record = shim.exit()
    assert (record["verdict"], record["code"], record["survivors"]) == ("stopped", 3, 0)


def test_a_tree_that_its_lease_froze_is_killed_in_its_sleep(start_shim: StartShim, leaf: Path) -> None:
    """Without a lease there is no grace, and a frozen tree needs no thaw for a KILL."""
    shim = start_shim(argv=["sleep", "600"], cgroup=str(leaf))
    shim.start()
    shim.controller.send(wire.LEASE, struct.pack("<QQB", 1, boottime_ms(), FREEZE))
    wait_for(lambda: is_frozen(leaf), "the freeze")
    shim.stop(grace_ms=60_000)
    record = shim.exit()
    assert (record["verdict"], record["survivors"]) == ("stopped", 0)


def test_cgroups_that_the_payload_made_go_with_the_leaf(start_shim: StartShim, leaf: Path) -> None:
    """Who moved below the leaf is found and ended, and the whole of it is removed."""
    script = f"mkdir -p {leaf}/a.b/c {leaf}/d; echo $$ > {leaf}/a.b/c/cgroup.procs; echo moved; exec sleep 600"
    shim = start_shim(argv=["sh", "-c", script], cgroup=str(leaf))
    pid = shim.start()
    shim.wait_log(lambda log: log.stdout == b"moved\n", "the move")
    assert Leaf(os.fsencode(leaf)).members() == [pid]
    shim.stop()
    assert shim.exit()["survivors"] == 0
    assert not leaf.exists()


def test_a_leaf_with_somebody_in_it_is_not_taken(start_shim: StartShim, leaf: Path) -> None:
    """The attempt runs without the tier and says so; the other is not touched."""
    leaf.mkdir()
    stranger = os.posix_spawn("/bin/sleep", ["sleep", "600"], {})
    try:
        (leaf / "cgroup.procs").write_text(str(stranger))
        shim = start_shim(argv=["true"], cgroup=str(leaf))
        record = shim.run()
        assert (record["verdict"], record["code"], record["tiers"]) == ("exited", 0, ["descendants", "cookie"])
        assert "in the leaf already" in (shim.dir / "shim.err").read_text()
        assert alive(stranger)
    finally:
        os.kill(stranger, signal.SIGKILL)
        os.waitpid(stranger, 0)


def test_an_empty_leaf_is_made_anew(start_shim: StartShim, leaf: Path) -> None:
    """One that a dead shim left behind, frozen even, is no obstacle."""
    leaf.mkdir()
    (leaf / "cgroup.freeze").write_text("1")
    record = start_shim(argv=["true"], cgroup=str(leaf)).run()
    assert (record["code"], record["tiers"][0]) == (0, "cgroup")
    assert not leaf.exists()


@pytest.mark.parametrize("place", ["missing/runner-x", "no-cgroup/runner-x", "/proc/runner-x"])
def test_a_start_does_not_fail_for_want_of_a_cgroup(start_shim: StartShim, tmp_path: Path, place: str) -> None:
    """A parent that is gone, a directory that is no cgroup, a file system that makes none: the attempt runs all the same."""
    (tmp_path / "no-cgroup").mkdir()
    shim = start_shim(argv=["true"], cgroup=str(tmp_path / place))
    record = shim.run()
    assert (record["verdict"], record["code"], record["tiers"]) == ("exited", 0, ["descendants", "cookie"])
    assert "cgroup" in (shim.dir / "shim.err").read_text()
    assert not (tmp_path / place).exists()


def test_an_exec_error_leaves_no_leaf(start_shim: StartShim, tmp_path: Path, leaf: Path) -> None:
    """What never ran has no cgroup, before the step inside or behind it."""
    (tmp_path / "garbage").write_bytes(b"\x01\x02")
    (tmp_path / "garbage").chmod(0o755)
    for program in ("no-such-program", "./garbage"):
        record = start_shim(argv=[program], cwd=str(tmp_path), cgroup=str(leaf)).run()
        assert (record["verdict"], record["cause"]["kind"]) == ("never_started", "exec_failed")
        assert not leaf.exists()


def test_the_childs_limits_do_not_hinder_the_step(start_shim: StartShim, leaf: Path) -> None:
    """A child that may write nothing and a mask that forbids everything: the leaf is made and entered before."""
    record = start_shim(argv=["/bin/true"], cgroup=str(leaf), rlimits={"1": [0, 0]}, umask=0o777).run()
    assert (record["code"], record["tiers"][0]) == (0, "cgroup")


def test_a_shim_that_cannot_step_back_never_kills_the_whole_leaf(base: Path, leaf: Path) -> None:
    """Its own cgroup vanished meanwhile: it knows that it is inside, and the whole leaf is not touched."""
    home = base / "home"
    home.mkdir()
    told = os.fork()
    if told == 0:
        try:
            (home / "cgroup.procs").write_text("0")
            ours = Leaf(os.fsencode(leaf))
            ours.enter()
            entered = ours.active and os.getpid() in inside(leaf)
            home.rmdir()
            ours.leave()
            held = ours.crowded and not ours.kill() and not ours.freeze() and ours.failure is not None
            os._exit(0 if entered and held else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(told, 0)[1]) == 0
