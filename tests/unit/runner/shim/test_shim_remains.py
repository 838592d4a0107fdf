"""Who is left alive at the end: what cannot be ended, with the reason, and what the owner lets live on.

Mutants that died by hand: the child itself is spared; descendants of the spared are not; a stop ends them; the leaf is killed around
them; they are left in the leaf; a refused signal is called alive; the state is the leader's although it has ended.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.adapters import cgroups
from tests.support.cgroups import delegated, inside
from tests.support.shim import ForkServer, Shim, alive, wait_for
from tests.support.unprivileged import NOBODY, becomes_root, interpreter

pytestmark = pytest.mark.slow

StartShim = Callable[..., Shim]


@pytest.fixture
def freezer() -> Iterator[Callable[[int], None]]:
    """Puts a process where no KILL reaches it: a frozen cgroup of version 1. What it holds is let go with the test."""
    group = Path(f"/sys/fs/cgroup/freezer/local-runner-test-{os.getpid()}")
    try:
        group.mkdir()
    except OSError as exc:
        pytest.skip(f"needs root and a version 1 freezer to hold a process: {exc}")

    def hold(pid: int) -> None:
        (group / "tasks").write_text(str(pid))
        (group / "freezer.state").write_text("FROZEN")
        wait_for(lambda: (group / "freezer.state").read_text() == "FROZEN\n", "the freezer")

    yield hold
    (group / "freezer.state").write_text("THAWED")
    wait_for(lambda: not (group / "tasks").read_text(), "the end of the held process")
    group.rmdir()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may search."""
    folder = Path(tempfile.mkdtemp())
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def spared() -> Iterator[list[int]]:
    """Pids that a test lets live: ended with it."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda pid=pid: not alive(pid), "the end of who was spared")


def noted(folder: Path, name: str) -> int:
    """The pid that a process of the tree wrote down."""
    wait_for(lambda: (folder / name).exists() and (folder / name).read_text().endswith("\n"), f"the pid of {name}")
    return int((folder / name).read_text())


def daemonise(argv: str, name: str) -> str:
    """Shell words that start `argv` in a session of its own and write down its pid."""
    return f"""setsid sh -c 'echo $$ > {name}; exec "$@"' sh {argv} > /dev/null 2>&1 &"""


# --- what cannot be ended ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["descendants", "cgroup"])
def test_a_process_in_the_hands_of_the_kernel_is_told_with_its_state(
    start_shim: StartShim, freezer: Callable[[int], None], tier: str
) -> None:
    """It takes no KILL, not even its cgroup's: the attempt ends all the same, and the record says where it sleeps."""
    with contextlib.ExitStack() as kept:
        spec: dict[str, Any] = {}
        if tier == "cgroup":
            base = kept.enter_context(delegated())
            spec["cgroup"] = str(cgroups.leaf(base, "held.1"))
        shim = start_shim(argv=["sleep", "600"], kill_wait_ms=300, **spec)
        pid = shim.start()
        freezer(pid)
        shim.stop(grace_ms=50)
        record = shim.exit()
        (left,) = record["remains"]
        assert (record["verdict"], record["code"], record["signal"], record["survivors"]) == ("stopped", None, None, 1)
        assert (left["pid"], left["name"], left["state"], left["why"]) == (pid, "sleep", "D", "d_state")
        assert isinstance(left["wchan"], str)
        assert left["start"] == shim.meta()["child"]["start"]
        # Released before the leaf's own end is waited for.
        Path(f"/sys/fs/cgroup/freezer/local-runner-test-{os.getpid()}/freezer.state").write_text("THAWED")


def test_a_process_whose_leader_has_ended_shows_the_state_of_its_threads(
    start_shim: StartShim, freezer: Callable[[int], None], tmp_path: Path
) -> None:
    """A leader that has ended looks like a zombie while a thread of it is held."""
    program = "import threading, time, ctypes, os; threading.Thread(target=time.sleep, args=(600,)).start();"
    program += "open('up', 'w').write('\\n'); ctypes.CDLL(None).syscall(60, 0)"
    shim = start_shim(argv=[sys.executable, "-IS", "-c", program], cwd=str(tmp_path), kill_wait_ms=300)
    pid = shim.start()
    wait_for(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "Z", "the end of the leader")
    (thread,) = [int(each.name) for each in Path(f"/proc/{pid}/task").iterdir() if each.name != str(pid)]
    freezer(thread)
    shim.stop(grace_ms=50)
    record = shim.exit()
    assert [(left["pid"], left["state"], left["why"]) for left in record["remains"]] == [(pid, "D", "d_state")]


BORN_BEHIND_EVERY_LOOK = """
import os
from runner.shim import process, tree
living = tree.Tree(b"LOCAL_RUNNER_COOKIE=nobody carries this")
assert (living.find(), living.count()) == ([], 0)
pid = os.posix_spawn("/bin/sleep", ["sleep", "600"], {})
process.children = lambda pid: []
assert (living.find(), living.count()) == ([], 1)
os.kill(pid, 9)
os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
assert living.count() == 0
"""


def test_a_tree_that_no_look_finds_is_not_empty() -> None:
    """A shim that has a living child has a tree, however fast that is: only one without children has none."""
    done = subprocess.run([sys.executable, "-c", BORN_BEHIND_EVERY_LOOK], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def base() -> Iterator[Path]:
    """A cgroup to make leaves in."""
    with delegated() as place:
        yield place


@pytest.fixture
def nobodys(open_folder: Path) -> Iterator[Callable[..., Shim]]:
    """Start shims that run as nobody, in the cgroup `home` where one is given."""
    kept = contextlib.ExitStack()

    def start(root: Path, *, home: Path | None = None, **spec: Any) -> Shim:
        server = ForkServer(interpreter(open_folder, cgroup=home))
        kept.callback(server.close)
        shim = Shim(root, server, owner=NOBODY, **spec)
        kept.callback(shim.close)
        return shim

    with kept:
        yield start


def test_a_child_of_another_user_is_told_as_such(
    nobodys: Callable[..., Shim], open_folder: Path, tmp_path: Path, spared: list[int]
) -> None:
    """A set-user-id program takes no signal of ours: counted, named, and the reason given."""
    argv = [*becomes_root(open_folder), "sleep", "600"]
    shim = nobodys(tmp_path, argv=argv, kill_wait_ms=300)
    pid = shim.start()
    spared.append(pid)
    wait_for(lambda: "Uid:\t0\t0\t0\t0" in Path(f"/proc/{pid}/status").read_text(), "the child to become root")
    shim.stop(grace_ms=50)
    record = shim.exit()
    assert [(left["pid"], left["name"], left["why"]) for left in record["remains"]] == [(pid, "sleep", "eperm")]
    assert (record["survivors"], record["signal"], record["swept"]) == (1, None, [])
    assert alive(pid)


def test_a_delegated_cgroup_ends_a_child_of_another_user(
    base: Path, nobodys: Callable[..., Shim], open_folder: Path, tmp_path: Path
) -> None:
    """Who may write in the leaf may kill it whole, whoever is inside; and no more than the delegation is needed."""
    argv = [*becomes_root(open_folder), "sleep", "600"]
    home, leaf = base / "home", cgroups.leaf(base, "suid.1")
    home.mkdir()
    for path in (base, base / "cgroup.procs", home, home / "cgroup.procs"):
        os.chown(path, NOBODY, NOBODY)
    shim = nobodys(tmp_path, home=home, argv=argv, kill_wait_ms=3000, cgroup=str(leaf))
    pid = shim.start()
    assert (inside(leaf), shim.pid in inside(home)) == ([pid], True)
    wait_for(lambda: "Uid:\t0\t0\t0\t0" in Path(f"/proc/{pid}/status").read_text(), "the child to become root")
    shim.stop(grace_ms=50)
    record = shim.exit()
    assert (record["survivors"], record["remains"], record["signal"]) == (0, [], signal.SIGKILL)
    assert not leaf.exists()


# --- what may live on -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["cgroup", "no cgroup"])
def place(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """The keys of a spec that give the payload its cgroup, or none."""
    if request.param == "no cgroup":
        yield {}
        return
    with delegated() as base:
        yield {"cgroup": str(cgroups.leaf(base, "spared.1"))}


SLEEPER = "import sys, time; open('/proc/self/comm', 'w').write(sys.argv[1]); time.sleep(600)"
WAYS = {
    "its program's file": ("./a-daemon-of-many-words 600", "a-daemon-of-many-words"),  # the kernel keeps 15 letters
    "its own name": (f'{sys.executable} -ISc "{SLEEPER}" bazeld-x', "bazeld-x"),
    "an argument": (f'{sys.executable} -ISc "{SLEEPER}" x GradleDaemon 8.5', "GradleDaemon"),
    "a main class": (f'{sys.executable} -ISc "{SLEEPER}" x org.gradle.launcher.GradleDaemon', "GradleDaemon"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_named_daemon_outlives_the_attempt(
    start_shim: StartShim, tmp_path: Path, place: dict[str, str], spared: list[int], way: str
) -> None:
    """It is not signalled, not counted and not waited for, and the record tells of it; everybody else is ended."""
    shutil.copy("/bin/sleep", tmp_path / "a-daemon-of-many-words")
    argv, name = WAYS[way]
    script = daemonise(argv, "daemon") + daemonise("sleep 600", "other")
    script += " while ! [ -s daemon ] || ! [ -s other ]; do sleep .02; done; sleep .3"
    shim = start_shim(argv=["sh", "-c", script], cwd=str(tmp_path), outlive=["unrelated", name], **place)
    shim.start()
    daemon, other = noted(tmp_path, "daemon"), noted(tmp_path, "other")
    spared.append(daemon)
    record = shim.exit()
    assert [each["pid"] for each in record["outlived"]] == [daemon]
    assert (record["verdict"], record["code"], record["survivors"], record["remains"]) == ("exited", 0, 0, [])
    assert alive(daemon) and not alive(other)
    if place:
        assert not Path(place["cgroup"]).exists(), "it moved out, so that the leaf could go"


def test_what_a_named_daemon_started_lives_with_it(
    start_shim: StartShim, tmp_path: Path, place: dict[str, str], spared: list[int]
) -> None:
    """Workers of a build daemon are its own affair, also in a stop; the stop ends the rest at once."""
    (tmp_path / "watchman").write_text("#!/bin/sh\nsleep 600 & echo $! > worker; wait\n")
    (tmp_path / "watchman").chmod(0o755)
    script = daemonise("./watchman", "daemon") + " sleep 600"
    shim = start_shim(argv=["sh", "-c", script], cwd=str(tmp_path), outlive=["watchman"], **place)
    pid = shim.start()
    daemon, worker = noted(tmp_path, "daemon"), noted(tmp_path, "worker")
    spared += [daemon, worker]
    shim.stop(grace_ms=0)
    record = shim.exit()
    assert {each["pid"] for each in record["outlived"]} == {daemon, worker}
    assert (record["verdict"], record["survivors"]) == ("stopped", 0)
    assert alive(daemon) and alive(worker) and not alive(pid)


def test_a_daemon_that_holds_the_output_keeps_nobody_waiting(
    start_shim: StartShim, tmp_path: Path, spared: list[int]
) -> None:
    """Its end of the pipe stays open: the drain ends by quiet."""
    script = (
        "setsid sh -c 'echo $$ > daemon; exec ./watchman 600' & while ! [ -s daemon ]; do sleep .02; done; sleep .2"
    )
    shutil.copy("/bin/sleep", tmp_path / "watchman")
    shim = start_shim(argv=["sh", "-c", script], cwd=str(tmp_path), outlive=["watchman"])
    shim.start()
    spared.append(noted(tmp_path, "daemon"))
    record = shim.exit(5)
    assert (record["drain"], record["survivors"], len(record["outlived"])) == ("quiet", 0, 1)


def test_the_child_itself_never_outlives_its_attempt(start_shim: StartShim, tmp_path: Path) -> None:
    """A name on the list is no way for the attempt's own child to escape a stop."""
    shutil.copy("/bin/sleep", tmp_path / "watchman")
    shim = start_shim(argv=["./watchman", "600"], cwd=str(tmp_path), outlive=["watchman"])
    pid = shim.start()
    shim.stop()
    record = shim.exit()
    assert (record["signal"], record["outlived"]) == (signal.SIGTERM, [])
    assert not alive(pid)


def test_evidence_is_bounded(start_shim: StartShim, tmp_path: Path, spared: list[int]) -> None:
    """At most 32 of many are named."""
    shutil.copy("/bin/sleep", tmp_path / "watchman")
    script = "for i in $(seq 40); do setsid ./watchman 600 > /dev/null 2>&1 & echo $! >> pids; done; sleep .5"
    shim = start_shim(argv=["sh", "-c", script], cwd=str(tmp_path), outlive=["watchman"])
    shim.start()
    record = shim.exit()
    spared += [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(record["outlived"]) == 32
    assert all(map(alive, spared))
