"""The real work of the demo: a repository to do it in, a command that does it, and a crash of the daemon in its middle."""

import asyncio
import hashlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from examples.demo.stage import Failure, Stage, until

PROJECT = Path(__file__).resolve().parents[2]
RUNNER = "laptop"
BRANCH = "demo/work"
FAST_TESTS = "tests/unit/protocol"
COUNTING = "i=1; while [ $i -le 300 ]; do echo line $i of 300; i=$((i+1)); sleep 0.01; done; echo counted >&2"
LINES_BEFORE_KILL = 4
SHOWN_EVERY = 100
READ_BYTES = 64 * 1024
GROWTH_S = 5.0
"""How long a living command may be silent while its daemon is dead before this is no longer the middle of its output."""
GIT = ("git", "-c", "user.name=demo", "-c", "user.email=demo@localhost", "-c", "commit.gpgsign=false")
GIT_ENV = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}


def git(*argv: str, check: bool = True) -> str:
    """What git says to the demo itself."""
    done = subprocess.run([*GIT, *argv], env=GIT_ENV, capture_output=True, text=True)
    if check and done.returncode:
        raise Failure(f"git {' '.join(argv[:3])}: {done.stderr.strip()[-300:]}")
    return done.stdout.strip() if done.returncode == 0 else ""


def repository(target: Path) -> str:
    """Put a repository at `target` that nobody needs; says what it is."""
    wanted = os.environ.get("DEMO_REPO")
    source = Path(wanted or PROJECT).resolve()
    if git("-C", str(source), "rev-parse", "--verify", "HEAD", check=False) and _is_top(source):
        git("clone", "--quiet", "--no-hardlinks", str(source), str(target))
        return f"a temporary clone of {source}, which is not touched"
    git("init", "--quiet", "--template=", str(target))
    if wanted:
        git("-C", str(target), "commit", "--quiet", "--allow-empty", "-m", "Begin")
        return f"{source} is no repository with a commit: a fresh one, and empty"
    # A tree without its history, as from a tarball: its files are read where they are, .gitignore says which.
    git(f"--git-dir={target}/.git", f"--work-tree={source}", "add", "--all")
    git("-C", str(target), "commit", "--quiet", "-m", "Begin")
    git("-C", str(target), "reset", "--quiet", "--hard")
    return f"{source} has no history: a fresh repository of its files"


def traces() -> tuple[str, ...]:
    """What a careless demo would leave in the stranger's own repository: a branch, a worktree, a setting."""
    source = str(Path(os.environ.get("DEMO_REPO") or PROJECT).resolve())
    listed = git("-C", source, "worktree", "list", "--porcelain", check=False).splitlines()
    return (
        git("-C", source, "for-each-ref", f"refs/heads/{BRANCH}", check=False),
        *sorted(line for line in listed if line.startswith("worktree ")),
        git("-C", source, "config", "--local", "--list", check=False),
    )


def _is_top(source: Path) -> bool:
    top = git("-C", str(source), "rev-parse", "--show-toplevel", check=False)
    return not top or Path(top).resolve() == source


async def make_worktree(stage: Stage) -> dict[str, Any]:
    """A signed command makes a git worktree."""
    stage.title("A signed command makes a git worktree")
    source = stage.home / "repo"
    stage.say(await asyncio.to_thread(repository, source))
    made: dict[str, Any] = await stage.json(
        "runner-control", "worktree", "create", RUNNER, "--repo", str(source), "--base", "HEAD", "--branch", BRANCH
    )
    where = ("-C", made["path"])
    stage.check(
        made["state"] == "ready" and git(*where, "rev-parse", "HEAD") == made["head"] == git("-C", str(source), "rev-parse", "HEAD"),
        f"{made['path']} at {made['head'][:12]}",
    )  # fmt: skip
    stage.check(
        git(*where, "symbolic-ref", "--short", "HEAD") == BRANCH
        and f"worktree {made['path']}" in git("-C", str(source), "worktree", "list", "--porcelain"),
        f"git itself calls it a worktree, on the new branch {BRANCH}",
    )
    return made


class Crash:
    """What is known of the daemon's death in the middle of a command."""

    def __init__(self) -> None:
        self.in_the_middle = False
        self.lines_before = 0
        self.log_at_death = 0
        self.log_before_birth = 0


class Watched:
    """A stream as it arrives: counted, hashed, and shown a line here and there."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._hash = hashlib.sha256()
        self._tail = b""
        self.bytes = 0
        self.lines = 0
        self.last = ""

    @property
    def sha256(self) -> str:
        """Of all that came."""
        return self._hash.hexdigest()

    def feed(self, data: bytes) -> None:
        """The next bytes."""
        self._hash.update(data)
        self.bytes += len(data)
        *lines, self._tail = (self._tail + data).split(b"\n")
        self._tail = self._tail[-READ_BYTES:]
        for line in lines:
            self.lines += 1
            self.last = line.decode(errors="replace")
            if self.lines <= LINES_BEFORE_KILL or self.lines % SHOWN_EVERY == 0:
                self._stage.quote(self.last)


async def run_through_a_crash(stage: Stage, worktree: dict[str, Any]) -> dict[str, Any]:
    """Real work, streamed live; in the middle the daemon dies and another takes over."""
    wanted = os.environ.get("DEMO_CMD")
    tested = Path(worktree["path"], FAST_TESTS).is_dir()
    tests = f"{shlex.quote(sys.executable)} -m pytest -p no:cacheprovider --color=no -vv -m 'not slow' {FAST_TESTS}"
    execution, crash = await _work(stage, worktree["id"], wanted or (tests if tested else COUNTING))
    if wanted is None:
        stage.check(execution["exit_status"] == 0, "it succeeded")
    elif not crash.in_the_middle:
        stage.say(
            "it was silent or over before a daemon could die in its middle: once more, with a command that counts"
        )
        execution, crash = await _work(stage, worktree["id"], COUNTING)
    stage.check(crash.in_the_middle, f"the daemon died after line {crash.lines_before}, while the command ran")
    stage.check(
        crash.log_before_birth > crash.log_at_death,
        f"its log grew from {crash.log_at_death} to {crash.log_before_birth} bytes while there was no daemon",
    )
    return execution


async def _work(stage: Stage, worktree: str, command: str) -> tuple[dict[str, Any], Crash]:
    stage.title(f"A signed command runs real work in it: {command[:90]}")
    known = set(_attempts(stage))
    process = await stage.pipe(
        "exec", "runner-control", "exec", RUNNER, "--worktree", worktree, "--", "sh", "-c", command
    )
    assert process.stdout is not None and process.stderr is not None, "both are pipes"
    errors = asyncio.ensure_future(process.stderr.read())
    out, crash = Watched(stage), Crash()
    try:
        while data := await process.stdout.read(READ_BYTES):
            out.feed(data)
            if out.lines >= LINES_BEFORE_KILL and not crash.lines_before:
                crash.lines_before = out.lines
                (attempt,) = set(_attempts(stage)) - known
                await _crash(stage, attempt, crash)
        status = await process.wait()
        err = await errors
    finally:
        errors.cancel()
    stage.quote(out.last or "(no output)")
    execution = await newest(stage)
    _compare(stage, execution, status, out, err)
    crash.in_the_middle = crash.in_the_middle and out.lines > crash.lines_before
    return execution, crash


async def _crash(stage: Stage, attempt: Path, crash: Crash) -> None:
    """Kill the daemon, see the command go on without one, and start another."""
    pid = await stage.kill("daemon")
    crash.log_at_death = log_bytes(attempt)
    stage.say(f"kill -9 {pid}: the daemon is dead; the command runs on under its shim", "bold red")

    async def grown() -> bool:
        return log_bytes(attempt) > crash.log_at_death or (attempt / "exit.json").exists()

    try:
        await until(grown, "growth", GROWTH_S)
    except Failure:
        stage.say("it says nothing meanwhile")
    crash.log_before_birth = log_bytes(attempt)
    crash.in_the_middle = crash.log_before_birth > crash.log_at_death
    await connect(stage)
    stage.say("another daemon is up and has taken the command back", "bold")


def _compare(stage: Stage, execution: dict[str, Any], status: int, out: Watched, err: bytes) -> None:
    """What arrived here against what the runner signed that the child wrote."""
    settlement = execution["settlement"]
    stage.check(
        settlement is not None and settlement["verdict"] == "exited", f"the command ended by itself with {status}"
    )
    stage.check(execution["exit_status"] == settlement["code"] == status, "`exec` ends with the command's own status")
    wrote = settlement["streams"]
    stage.check(
        wrote["stdout"] == {"bytes": out.bytes, "sha256": out.sha256},
        f"{out.bytes} bytes of stdout came here: none lost, none doubled",
    )
    stage.check(
        wrote["stderr"] == {"bytes": len(err), "sha256": hashlib.sha256(err).hexdigest()},
        f"so did {len(err)} bytes of stderr",
    )


async def connect(stage: Stage) -> None:
    """Start the daemon and wait until both sides say that the session is up."""
    await stage.start("daemon", "runner", "--log-format", "json", "start")

    async def up() -> bool:
        ended, told, _ = await stage.finished("runner", "status", "--json")
        return ended == 0 and bool(json.loads(told)["session"]["state"] == "up")

    await until(up, "the session")
    listed = (await stage.json("runner-control", "runners"))["runners"]
    if [runner["online"] for runner in listed] != [True]:
        raise Failure("the control plane does not see the session")


async def newest(stage: Stage) -> dict[str, Any]:
    """The execution ordered last, once its log is complete."""
    wanted = (await stage.json("runner-control", "ps", "--all"))["executions"][0]["id"]

    async def complete() -> dict[str, Any] | None:
        execution: dict[str, Any] = await stage.json("runner-control", "show", wanted)
        return execution if execution["settlement"] and execution["log"]["complete"] else None

    found: dict[str, Any] = await until(complete, "the end of the execution")
    return found


def log_bytes(attempt: Path) -> int:
    """How much of an attempt's log is on the runner's disk."""
    return sum(path.stat().st_size for path in (attempt / "log").glob("*.seg"))


def _attempts(stage: Stage) -> list[Path]:
    return list((stage.home / "state" / "x").iterdir())


async def remove_worktree(stage: Stage, worktree: dict[str, Any], before: tuple[str, ...]) -> None:
    """The worktree goes; what it was a worktree of stays."""
    stage.title("The worktree is removed")
    await stage.run("runner-control", "worktree", "remove", worktree["id"], "--force")
    kept = git("-C", str(stage.home / "repo"), "rev-parse", "--verify", BRANCH, check=False)
    stage.check(not Path(worktree["path"]).exists() and bool(kept), "its directory is gone, its branch is kept")
    stage.check(
        await asyncio.to_thread(traces) == before, "your own repository has no branch, worktree or setting more"
    )
