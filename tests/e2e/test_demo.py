"""`make demo` as a stranger runs it: every promise is checked by the demo itself, and here that it keeps house."""

import asyncio
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.demo.stage import Stage
from examples.demo.work import PROJECT, git, repository
from tests.support.repositories import make_repository

pytestmark = pytest.mark.timeout(180)

DEMO = Path("examples", "demo", "demo.py")
WAIT_S = 60.0
ESCAPE = "\x1b"
COUNTING = "i=1; while [ $i -le 1000 ]; do echo line $i; i=$((i+1)); sleep 0.05; done"
PAINT = "from examples.demo.stage import Stage; s = Stage(); s.title('part'); s.check(True, 'held'); s.home.joinpath('plane').rmdir()"


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory for temporary files, with a short name."""
    with tempfile.TemporaryDirectory(prefix="demo-") as name:
        yield Path(name)


def surroundings(place: Path, **env: str) -> dict[str, str]:
    """An environment whose temporary files are in `place`."""
    kept = {name: value for name, value in os.environ.items() if name not in ("DEMO_REPO", "DEMO_CMD")}
    return {**kept, "TMPDIR": str(place), **env}


def tell(place: Path, tree: Path = PROJECT, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the demo of `tree` to its end."""
    return subprocess.run(
        [sys.executable, str(tree / DEMO)],
        cwd=tree,
        env=surroundings(place, **env),
        capture_output=True,
        text=True,
        timeout=WAIT_S * 2,
    )


def left_over(place: Path) -> list[str]:
    """Processes that were started with `place` in their environment, and homes that are still there."""
    found = [str(path) for path in place.glob("runner-demo-*")]
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"{place}/".encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_text())
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_the_demo_keeps_every_promise(place: Path) -> None:
    """With nothing set: this repository, its fast tests, a crash in their middle."""
    told = tell(place)
    assert told.returncode == 0, told.stdout + told.stderr
    assert "promises held" in told.stdout and "passed" in told.stdout
    assert told.stderr == "" and ESCAPE not in told.stdout
    first, last = re.findall(r"log grew from (\d+) to (\d+) bytes while there was no daemon", told.stdout)[0]
    assert int(first) < int(last)
    assert left_over(place) == []


@pytest.mark.slow
def test_a_tree_without_history_and_a_command_without_output_are_shown_as_well(place: Path) -> None:
    """As from a tarball: a fresh repository of its files; and the crash is shown on a command that counts."""
    tree = place / "unpacked"
    shutil.copytree(
        PROJECT, tree, ignore=shutil.ignore_patterns(".git", ".venv", ".*_cache", ".hypothesis", "__pycache__")
    )
    told = tell(place, tree, DEMO_CMD="test -f pyproject.toml && test -d protocol")
    assert told.returncode == 0, told.stdout + told.stderr
    assert "has no history: a fresh repository of its files" in told.stdout
    assert "ended by itself with 0" in told.stdout and "once more, with a command that counts" in told.stdout
    assert not (tree / ".git").exists() and left_over(place) == []


@pytest.mark.slow
def test_an_interrupted_demo_leaves_nothing_running_and_nothing_behind(place: Path) -> None:
    """^C in the middle of the work, in a repository of the stranger's own that stays as it is."""
    mine = make_repository(place / "mine")
    before = (git("-C", str(mine), "for-each-ref"), (mine / ".git" / "config").read_text())
    with subprocess.Popen(
        [sys.executable, str(DEMO)],
        cwd=PROJECT,
        env=surroundings(place, DEMO_REPO=str(mine), DEMO_CMD=COUNTING),
        stdout=subprocess.PIPE,
        text=True,
    ) as demo:
        assert demo.stdout is not None
        said = []
        for line in demo.stdout:
            said.append(line)
            if "│ line 2" in line:
                demo.send_signal(signal.SIGINT)
        assert demo.wait(WAIT_S) == 130, "".join(said)
    assert any(f"a temporary clone of {mine}" in line for line in said)
    assert "Interrupted." in said[-1]
    assert (git("-C", str(mine), "for-each-ref"), (mine / ".git" / "config").read_text()) == before
    assert left_over(place) == []


def test_where_there_is_no_repository_a_fresh_one_is_made(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a commit in it, or no worktree could be made; what was named is left alone."""
    (place / "empty").mkdir()
    monkeypatch.setenv("DEMO_REPO", str(place / "empty"))
    assert "no repository" in repository(place / "made")
    assert git("-C", str(place / "made"), "rev-parse", "--verify", "HEAD")
    assert list((place / "empty").iterdir()) == []


@pytest.mark.parametrize(("env", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colours_are_for_terminals_that_want_them(place: Path, env: dict[str, str], *, coloured: bool) -> None:
    """A terminal sees them, unless NO_COLOR is set."""
    terminal, theirs = pty.openpty()
    try:
        subprocess.run(
            [sys.executable, "-c", PAINT],
            cwd=PROJECT,
            env={**surroundings(place), "TERM": "xterm-256color", **env},
            stdout=theirs,
            check=True,
            timeout=WAIT_S,
        )
        shown = os.read(terminal, 4096).decode()
    finally:
        os.close(terminal)
        os.close(theirs)
    assert "held" in shown
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]m", shown)) is coloured


async def test_what_a_program_prints_moves_no_cursor_and_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets stay brackets, and escape sequences are shown as what they are."""
    stage = Stage()
    try:
        stage.quote("test_x[/bold][args26] \x1b[2Jgone")
        assert "test_x[/bold][args26] \\x1b[2Jgone" in capsys.readouterr().out
    finally:
        assert await stage.close() == []
    assert not stage.home.exists()


async def test_the_end_of_a_stage_ends_whatever_was_started_on_it() -> None:
    """Also what has a session of its own and forgot its parent."""
    stage = Stage(quiet=True)
    process = await asyncio.create_subprocess_exec(
        "sh", "-c", "setsid sleep 600 >/dev/null 2>&1 & echo started", env=stage.env, stdout=asyncio.subprocess.PIPE
    )
    await process.communicate()
    assert len(stage.belongings()) == 1
    assert await stage.close() == []
    assert stage.belongings() == []
