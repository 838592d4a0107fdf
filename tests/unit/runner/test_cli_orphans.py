"""`runner orphans`: what is listed, what `--kill` ends, and what the exit status says, with a daemon and without."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from protocol.text import visible
from runner.adapters.control import ControlCall
from runner.adapters.keystore import Keystore
from runner.adapters.succession import IDENTITY
from runner.adapters.system import StateLock
from runner.cli import cli
from tests.support.attempts import AttemptDir
from tests.unit.runner.planekeys import PlaneKeys
from tests.unit.runner.test_cli import answering

RUNNER = f"rn_{os.getpid()}"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that is enrolled, and its settings."""
    for name in list(os.environ):
        if name.startswith(("LOCAL_RUNNER_", "XDG_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LOCAL_RUNNER_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("LOCAL_RUNNER_RUNTIME_DIR", str(tmp_path / "run"))
    plane, keystore = PlaneKeys(), Keystore(tmp_path / "state" / IDENTITY)
    mine, seal_seed = keystore.create_keys()
    certificate = plane.certificate(mine, seal_seed, runner=RUNNER)
    keystore.keep_enrolment(plane.root, plane.keyset(), certificate, "ws://127.0.0.1:1/v1/runner")
    (tmp_path / "run").mkdir(mode=0o700)
    return tmp_path


@contextmanager
def a_process(name: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of an attempt of ours."""
    process = subprocess.Popen(["/bin/sleep", "300"], env={"LOCAL_RUNNER_COOKIE": f"{RUNNER}:{name}"})
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def said(*args: str) -> Result:
    """`runner orphans` with these arguments."""
    return CliRunner().invoke(cli, ["orphans", *args])


def swept(remaining: int = 0) -> dict[str, Any]:
    """A sweep that is over."""
    lines = ["12 sleep D wchan=folio_wait d_state"] * remaining
    counts = {"found": 1, "signalled": 1, "remaining": remaining}
    return {"attempt": "ex_1.1", "done": True, **counts, "seen": [], "remains": lines}


def stray(state: str, name: str = "ex_1.1") -> dict[str, Any]:
    """One process of one attempt."""
    process = {"pid": 12, "name": "sle\x1bep", "age_ms": 61_000, "tier": "cookie"}
    return {"attempt": name, "state": state, "processes": [process], "count": 1}


# --- with a daemon ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "kill", "answer", "status"),
    [
        ("guarded", False, {}, 0),
        ("guarded", True, {"swept": []}, 0),
        ("settled", False, {}, 8),
        ("unknown", False, {}, 8),
        ("unguarded", False, {}, 8),
        ("unguarded", True, {"swept": []}, 8),
        ("settled", True, {"swept": [swept()]}, 0),
        ("unknown", True, {"swept": [swept(remaining=1)]}, 8),
        ("settled", True, {"swept": [{"attempt": "ex_1.1", "done": False}]}, 8),
    ],
)
def test_the_exit_status_says_whether_there_are_orphans(
    home: Path, state: str, kill: bool, answer: dict[str, Any], status: int
) -> None:
    """0 none, or none any more; 8 some. In JSON the same as a number."""
    asked: list[ControlCall] = []

    async def daemon(call: ControlCall) -> dict[str, Any]:
        asked.append(call)
        return {"attempts": [stray(state)], **answer}

    with answering(home / "run" / "control.sock", daemon):
        plain = said(*(["--kill"] if kill else []))
        as_json = said("--json", *(["--kill"] if kill else []))
    assert (plain.exit_code, as_json.exit_code) == (status, status)
    assert json.loads(as_json.stdout)["orphans"] == (1 if status else 0)
    assert [(call.verb, call.args) for call in asked] == [("orphans", {"kill": kill})] * 2


def test_what_lives_is_shown_with_pid_age_and_name(home: Path) -> None:
    """A stranger's name is made visible; what to do next stands below it."""

    async def daemon(_call: ControlCall) -> dict[str, Any]:
        return {"attempts": [stray("settled")]}

    with answering(home / "run" / "control.sock", daemon):
        result = said()
    (_titles, row) = result.stdout.splitlines()
    assert row.split() == ["ex_1.1", "settled", "12", "1m1s", visible("sle\x1bep")] and "\x1b" not in row
    assert "runner orphans --kill" in result.stderr


def test_what_could_not_be_ended_is_said_with_its_reason(home: Path) -> None:
    """The evidence of the sweep, line by line."""

    async def daemon(_call: ControlCall) -> dict[str, Any]:
        return {"attempts": [stray("settled")], "swept": [swept(remaining=1)]}

    with answering(home / "run" / "control.sock", daemon):
        result = said("--kill")
    assert "found 1, signalled 1, remaining 1" in result.stdout and "wchan=folio_wait d_state" in result.stderr


# --- without one ------------------------------------------------------------------------------------------------


def test_without_a_daemon_processes_and_files_are_asked(home: Path) -> None:
    """Guarded where somebody holds the lock, else not; who belongs to another runner is not ours."""
    guarded = AttemptDir(home / "state", "ex_1.1")
    with guarded.held(), a_process("ex_1.1") as one, a_process("ex_2.1") as two:
        result = said("--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 8 and found["orphans"] == 1
    assert {(each["attempt"], each["state"], each["processes"][0]["pid"]) for each in found["attempts"]} == {
        ("ex_1.1", "guarded", one.pid),
        ("ex_2.1", "unguarded", two.pid),
    }


def test_without_a_daemon_kill_ends_what_is_not_guarded_and_nothing_else(home: Path) -> None:
    """Then there are none any more."""
    guarded = AttemptDir(home / "state", "ex_1.1")
    with guarded.held(), a_process("ex_1.1") as one, a_process("ex_2.1") as two:
        result = said("--kill")
        assert two.wait(20) == -signal.SIGKILL and one.poll() is None
    assert result.exit_code == 0 and "ex_2.1: found 1, signalled 1, remaining 0" in result.stdout


def test_a_daemon_that_does_not_answer_keeps_what_is_its(home: Path) -> None:
    """It holds the state directory, and would settle what is being ended: refused, with nothing signalled."""
    with a_process("ex_2.1") as process, StateLock(home / "state" / "runner.lock"):
        result = said("--kill")
        assert process.poll() is None
    assert result.exit_code == 5


def test_nothing_lives_is_said_and_is_well(home: Path) -> None:
    """Exit status 0."""
    result = said()
    assert result.exit_code == 0 and "no process" in result.stdout


def test_a_machine_that_is_not_enrolled_has_nothing_of_its_own(home: Path) -> None:
    """Without a name of ours nothing is ours."""
    (home / "state" / IDENTITY / "plane.json").unlink()
    assert said().exit_code == 4


def test_the_help_tells_the_exit_status() -> None:
    """Scripts need it."""
    assert "8 when there are" in " ".join(said("--help").stdout.split())
