"""Processes that try to stay: each kind of escapee, in each tier, whoever of shim and daemon is killed beside it.

Zero survivors where a tier promises it. One combination promises nothing: a process that cleaned its environment, left its parents and
lost its shim, on a machine without a cgroup for it. There the settlement says what was found and by which tiers, and claims no more.

Mutants that died by hand: the shim is no subreaper; the daemon does not sweep the payload's cgroup; it sweeps by the cookie alone.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytest_asyncio

from protocol.ids import Attempt
from runner.adapters import cgroups
from runner.core.inputs import AttemptExited, AttemptLost
from tests.support.cgroups import delegated
from tests.support.shim import alive, wait_for
from tests.support.shims import Shims, a_plan, shims

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]

ROOT = Path(__file__).resolve().parents[2]
ATTEMPT = Attempt.parse("ex_1.1")
GRACE_MS = 200
CHAINS = 8
"""Of processes that live for a moment: enough for one of them to be missed by most single looks."""
ROUNDS = 5


class Kind(NamedTuple):
    """How a process tries to stay: shell words around `{it}`, and what it does itself."""

    escape: str
    it: str = "exec sleep 600"
    state: str = "S"
    carries: bool = True


KINDS = {
    "background": Kind("{it} &"),
    "setsid": Kind("setsid {it} &"),
    "double fork": Kind("(setsid {it} &);"),
    "env-cleared double fork": Kind("(env -i setsid {it} &);", carries=False),
    "deaf": Kind("(setsid {it} &);", it="trap '' TERM HUP INT; exec sleep 600"),
    "stopped": Kind("(setsid {it} &);", it="kill -STOP $$", state="T"),
    "without stdout": Kind("(setsid {it} &);", it="exec >&- 2>&-; exec sleep 600"),
}
TIERS = ("cgroup", "no cgroup")
DAEMON = """
import asyncio, json, pathlib, sys
from tests.support.shims import Shims, a_plan
async def main(state_dir, argv, cwd, settings):
    settings = {name: pathlib.Path(value) for name, value in json.loads(settings).items()}
    daemon = Shims(pathlib.Path(state_dir), runner="rn_escape", **settings)
    daemon.adapter.start()
    await daemon.start(a_plan("ex_1.1", *json.loads(argv), cwd=cwd, grace_ms=200))
    print("up", flush=True)
    await asyncio.sleep(600)
asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture(params=TIERS)
def settings(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """What a daemon is told of cgroups."""
    if request.param == "no cgroup":
        yield {}
        return
    with delegated() as base:
        yield {"cgroups": base}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where a tree writes its pids; who still lives at the end is killed by them."""
    place = tmp_path / "work"
    place.mkdir()
    yield place
    for pid in pids(place):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest_asyncio.fixture
async def daemon(tmp_path: Path, settings: dict[str, Any]) -> AsyncIterator[Shims]:
    """A daemon's adapter, in this process."""
    async with shims(tmp_path, runner="rn_escape", **settings) as adapter:
        yield adapter


def pids(place: Path) -> list[int]:
    """What the tree has written so far."""
    path = place / "pids"
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def tree_of(kind: Kind) -> list[str]:
    """argv of a leader that starts an escapee and stays; each writes its pid."""
    it = "sh -c '" + f"echo $$ >> pids; {kind.it}".replace("'", "'\\''") + "'"
    return ["sh", "-c", f"{kind.escape.format(it=it)} echo $$ >> pids; exec sleep 600"]


def settled(place: Path, kind: Kind) -> bool:
    """Whether leader and escapee are what they are to be."""
    found = pids(place)
    if len(found) < 2:
        return False
    stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split() for pid in found]
    names = [Path(f"/proc/{pid}/comm").read_text().strip() for pid in found]
    leader = next((at for at, name in enumerate(names) if name == "sleep" and carries(found[at])), None)
    return leader is not None and any(
        stat[0] == kind.state and carries(pid) is kind.carries and (name == "sleep" or kind.state == "T")
        for at, (pid, stat, name) in enumerate(zip(found, stats, names, strict=True))
        if at != leader
    )


def carries(pid: int) -> bool:
    """Whether a process has the cookie in its environment."""
    return b"LOCAL_RUNNER_COOKIE=" in Path(f"/proc/{pid}/environ").read_bytes()


def survivors(place: Path) -> list[int]:
    """Who of the tree lives."""
    return [pid for pid in pids(place) if alive(pid)]


async def killed_daemon(tmp_path: Path, settings: dict[str, Any], argv: list[str], place: Path) -> None:
    """Have a daemon of its own start the attempt, and `kill -9` it once the attempt runs."""
    told = json.dumps({name: str(value) for name, value in settings.items()})
    command = [sys.executable, "-c", DAEMON, str(tmp_path), json.dumps(argv), str(place), told]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            assert await asyncio.to_thread(process.stdout.readline) == b"up\n"
        finally:
            process.kill()


async def start(daemon: Shims, argv: list[str], place: Path) -> None:
    """The daemon of this process starts the attempt."""
    await daemon.start(a_plan(ATTEMPT.name, *argv, cwd=str(place), grace_ms=GRACE_MS))


@pytest.mark.parametrize("kind", KINDS)
async def test_a_stop_leaves_nobody(daemon: Shims, settings: dict[str, Any], folder: Path, kind: str) -> None:
    """Nobody is killed beside it: the shim finds every kind, with and without a cgroup."""
    await start(daemon, tree_of(KINDS[kind]), folder)
    await daemon.until(lambda: settled(folder, KINDS[kind]))
    daemon.adapter.stop(ATTEMPT, GRACE_MS, "tester")
    record = (await daemon.told(AttemptExited)).exit
    assert survivors(folder) == []
    assert (record.verdict, record.survivors, record.remains) == ("stopped", 0, ())
    assert record.tiers == (("cgroup",) if settings else ()) + ("descendants", "cookie")
    assert sum(count for _tier, _signal, count in record.swept) >= 1


@pytest.mark.parametrize("kind", KINDS)
async def test_a_child_that_ends_takes_its_escapees_along(daemon: Shims, folder: Path, kind: str) -> None:
    """The leader ends by itself; what it left behind is ended, and its own code is kept."""
    argv = tree_of(KINDS[kind])
    argv[2] = argv[2].replace(
        "echo $$ >> pids; exec sleep 600", "echo $$ >> pids; while [ -e hold ]; do sleep .02; done; exit 7"
    )
    (folder / "hold").touch()
    await start(daemon, argv, folder)
    await daemon.until(lambda: len(pids(folder)) == 2)
    (folder / "hold").unlink()
    record = (await daemon.told(AttemptExited)).exit
    assert (record.verdict, record.code, record.survivors) == ("exited", 7, 0)
    assert survivors(folder) == []


@pytest.mark.parametrize("kind", KINDS)
async def test_a_killed_shim_leaves_only_whom_no_tier_sees(
    daemon: Shims, settings: dict[str, Any], folder: Path, kind: str
) -> None:
    """The daemon sweeps at once and settles with the evidence; what it cannot see it does not claim."""
    await start(daemon, tree_of(KINDS[kind]), folder)
    await daemon.until(lambda: settled(folder, KINDS[kind]))
    await daemon.kill_shim(ATTEMPT.name)
    lost = await daemon.told(AttemptLost)
    assert_swept(lost, settings, folder, KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
async def test_a_killed_daemon_changes_nothing(
    tmp_path: Path, settings: dict[str, Any], folder: Path, kind: str
) -> None:
    """The next one adopts the shim, whose stop leaves nobody."""
    await killed_daemon(tmp_path, settings, tree_of(KINDS[kind]), folder)
    async with shims(tmp_path, runner="rn_escape", **settings) as second:
        await second.until(lambda: settled(folder, KINDS[kind]))
        (seen,) = await second.adapter.observe()
        assert (seen.lock_held, seen.child_alive, seen.exit) == (True, True, None)
        assert await second.adapter.adopt(ATTEMPT)
        second.adapter.stop(ATTEMPT, GRACE_MS, "tester")
        record = (await second.told(AttemptExited)).exit
        assert (record.verdict, record.survivors) == ("stopped", 0)
        assert survivors(folder) == []


@pytest.mark.parametrize("kind", KINDS)
async def test_with_both_killed_the_next_daemon_sweeps(
    tmp_path: Path, settings: dict[str, Any], folder: Path, kind: str
) -> None:
    """Nobody is left who knew the tree: its cgroup, or else its cookie, leads to it."""
    await killed_daemon(tmp_path, settings, tree_of(KINDS[kind]), folder)
    async with shims(tmp_path, runner="rn_escape", **settings) as second:
        await second.until(lambda: settled(folder, KINDS[kind]))
        await second.kill_shim(ATTEMPT.name)
        (seen,) = await second.adapter.observe()
        assert (seen.lock_held, seen.child_alive, seen.exit) == (False, True, None)
        lost = await second.adapter.lose(ATTEMPT)
        assert isinstance(lost, AttemptLost)
        assert_swept(lost, settings, folder, KINDS[kind])


def assert_swept(lost: AttemptLost, settings: dict[str, Any], place: Path, kind: Kind) -> None:
    """The evidence of a sweep without a shim is the truth, as far as it goes."""
    swept = lost.evidence
    assert swept is not None
    left = survivors(place)
    if settings or kind.carries:
        assert left == []
        assert (swept.found, swept.signalled, swept.remaining) == (2, 2, 0)
        assert [tier for tier, _signal, _count in swept.tiers] == ["cgroup" if settings else "cookie"]
        assert not settings or not cgroups.leaf(settings["cgroups"], ATTEMPT.name).exists()
    else:
        # Nothing leads to it any more: it is not named, and no tier is claimed that could have seen it.
        assert len(left) == 1
        assert (swept.found, swept.signalled, swept.remaining) == (1, 1, 0)
        assert swept.tiers == (("cookie", signal.SIGKILL, 1),)
        assert not any(line.startswith(f"{left[0]} ") for line in swept.seen)


def chain(mark: str) -> list[str]:
    """argv of a tree of processes that ignore TERM, live for a moment and start the next."""
    links = "; ".join("f" for _ in range(CHAINS))
    return ["bash", "-c", f": {mark}; trap '' TERM; f() {{ (sleep .01; f) & }}; {links}; sleep 600"]


def marked(mark: str) -> list[int]:
    """Living processes with `mark` in their command line: asked of the kernel, not of the code under test."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit() and int(path.name) != os.getpid():
            with contextlib.suppress(OSError):
                if mark.encode() in (path / "cmdline").read_bytes() and alive(int(path.name)):
                    found.append(int(path.name))
    return found


@pytest.fixture
def mark() -> Iterator[str]:
    """A word that is in the command lines of one test's processes only; they are ended with it, however fast they are."""
    word = f"chain-{os.getpid()}-{os.urandom(4).hex()}"
    yield word

    def ended() -> bool:
        left = marked(word)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not left and not marked(word)

    wait_for(ended, "the end of the chain")


@pytest.mark.parametrize("killed", ["nobody", "the shim"])
async def test_a_chain_of_short_lives_is_ended(
    tmp_path: Path, settings: dict[str, Any], mark: str, killed: str
) -> None:
    """Each link is gone before one can look twice; several times, since luck would be enough for once."""
    for number in range(1, ROUNDS + 1):
        attempt = Attempt.parse(f"ex_{number}.1")
        async with shims(tmp_path, runner="rn_escape", **settings) as daemon:
            await daemon.start(a_plan(attempt.name, *chain(mark), grace_ms=GRACE_MS))
            await daemon.until(lambda: len(marked(mark)) > CHAINS // 2)
            if killed == "nobody":
                daemon.adapter.stop(attempt, 0, "tester")
                record = (await daemon.told(AttemptExited)).exit
                assert (record.verdict, record.survivors) == ("stopped", 0)
            else:
                await daemon.kill_shim(attempt.name)
                evidence = (await daemon.told(AttemptLost)).evidence
                assert evidence is not None
                assert evidence.remaining == 0
            assert marked(mark) == []


@pytest.mark.parametrize("killed", ["nobody", "the shim"])
async def test_a_process_that_nothing_ends_is_told_of(
    daemon: Shims, settings: dict[str, Any], folder: Path, killed: str
) -> None:
    """In the hands of the kernel it takes no KILL: the end says who it is and where it sleeps, and does not wait for it."""
    group = Path(f"/sys/fs/cgroup/freezer/local-runner-test-{os.getpid()}")
    try:
        group.mkdir()
    except OSError as exc:
        pytest.skip(f"needs root and a version 1 freezer to hold a process: {exc}")
    kind = KINDS["setsid"]
    await start(daemon, tree_of(kind), folder)
    await daemon.until(lambda: settled(folder, kind))
    leader = daemon.files().child_pid
    (held,) = set(pids(folder)) - {leader}
    try:
        (group / "tasks").write_text(str(held))
        (group / "freezer.state").write_text("FROZEN")
        await daemon.until(lambda: (group / "freezer.state").read_text() == "FROZEN\n")
        if killed == "nobody":
            daemon.adapter.stop(ATTEMPT, 0, "tester")
            record = (await daemon.told(AttemptExited)).exit
            assert [(left.pid, left.name, left.state, left.why) for left in record.remains] == [
                (held, "sleep", "D", "d_state")
            ]
            assert record.survivors == 1
        else:
            await daemon.kill_shim(ATTEMPT.name)
            swept = (await daemon.told(AttemptLost)).evidence
            assert swept is not None
            assert (swept.found, swept.signalled, swept.remaining) == (2, 2, 1)
            (line,) = swept.remains
            assert line.startswith(f"{held} sleep D ") and line.endswith(" d_state")
        assert survivors(folder) == [held]
    finally:
        (group / "freezer.state").write_text("THAWED")
        wait_for(lambda: not alive(held) and not (group / "tasks").read_text(), "the end of who was held")
        group.rmdir()
