"""`runner pause`, `resume` and `drain`: what the daemon is told, and what a person reads meanwhile."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from runner.adapters.control import ControlCall
from runner.cli import cli
from runner.verbs import drain
from tests.unit.runner.test_cli import ATTEMPT, STATUS, answering


class Machine:
    """A daemon that is told about admission; `left` is what lives at each look, the last one for good."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.state = "open"
        self.stops_in_ms: int | None = None
        self.left: list[list[str]] = [[]]
        self.then: Callable[[], None] = lambda: None
        self.socket = tmp_path / "rt" / "control.sock"
        monkeypatch.setenv("LOCAL_RUNNER_STATE_DIR", str(tmp_path / "state"))
        monkeypatch.setenv("LOCAL_RUNNER_RUNTIME_DIR", str(tmp_path / "rt"))
        monkeypatch.setattr(drain, "LOOK_S", 0.001)

    async def answer(self, call: ControlCall) -> dict[str, Any]:
        """As the daemon does."""
        self.asked.append((call.verb, dict(call.args)))
        if call.verb == "shutdown":
            return {"pid": 77}
        self.state = call.args.get("state", self.state)
        living = self.left.pop(0) if len(self.left) > 1 else self.left[0]
        self.then()
        return {"state": self.state, "stops_in_ms": self.stops_in_ms, "attempts": len(living), "living": living}

    def run(self, *args: str) -> Result:
        """One call of the command line while it answers."""
        with answering(self.socket, self.answer):
            return CliRunner().invoke(cli, args)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """One for each test."""
    return Machine(tmp_path, monkeypatch)


def test_pausing_and_resuming_are_one_question_each(machine: Machine) -> None:
    """What goes on is said, and the verb that undoes it."""
    machine.left = [["ex_1.1", "ex_2.1"]]
    paused = machine.run("pause")
    assert (paused.exit_code, paused.stdout) == (0, "paused; what runs goes on: 2 attempts run\n")
    assert "next: runner resume" in paused.stderr
    assert machine.run("resume").stdout == "open for new work\n"
    assert json.loads(machine.run("pause", "--json").stdout)["state"] == "paused"
    states = ["paused", "open", "paused"]
    assert machine.asked == [("admission", {"state": state}) for state in states]


def test_a_drain_waits_until_nothing_runs(machine: Machine) -> None:
    """Each change is a line; the end says how it is undone."""
    machine.left = [["ex_1.1", "ex_2.1"], ["ex_1.1", "ex_2.1"], ["ex_2.1"], []]
    done = machine.run("drain", "--deadline", "5m")
    assert (done.exit_code, done.stdout) == (0, "nothing runs any more\n")
    assert done.stderr.splitlines() == [
        "2 attempts run: ex_1.1 ex_2.1",
        "1 attempt runs: ex_2.1",
        "No new work is taken. To open the machine again: runner resume",
    ]
    assert machine.asked[0] == ("admission", {"state": "draining", "deadline_ms": 300_000})
    assert set(map(str, machine.asked[1:])) == {"('admission', {})"}


def test_a_drain_for_programs_is_one_document(machine: Machine) -> None:
    """Nothing else on either stream."""
    machine.left = [["ex_1.1"], []]
    done = machine.run("drain", "--json")
    said = json.loads(done.stdout)
    assert (done.exit_code, done.stderr) == (0, "")
    assert (said["state"], said["attempts"], said["daemon_ended"]) == ("draining", 0, False)
    assert said["waited_ms"] >= 0


def test_a_drain_that_somebody_ends_is_no_success(machine: Machine) -> None:
    """Opened again from another terminal, or the daemon has gone."""
    machine.left = [["ex_1.1"]]
    machine.then = lambda: setattr(machine, "state", "open" if len(machine.asked) > 2 else machine.state)
    done = machine.run("drain")
    assert done.exit_code == 1 and "somebody ended the drain: it is open" in done.stderr


def test_the_daemon_is_ended_when_nothing_runs(machine: Machine, tmp_path: Path) -> None:
    """`--exit` asks only then, and waits until the state directory is free."""
    machine.left = [["ex_1.1"], []]
    done = machine.run("drain", "--exit")
    assert done.exit_code == 0 and "the daemon has ended" in done.stdout
    assert "runner start, then runner resume" in done.stderr
    assert machine.asked[-1][0] == "shutdown" and len(machine.asked) == 3


def test_a_daemon_that_does_not_end_is_told_of(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the command that helps."""
    monkeypatch.setattr("runner.adapters.attemptfiles.is_locked", lambda _path: True)
    monkeypatch.setattr(drain, "EXIT_LOOKS_MAX", 3)
    done = machine.run("drain", "--exit")
    assert done.exit_code == 1 and "the daemon (pid 77) does not end" in done.stderr and "next: kill 77" in done.stderr


@pytest.mark.parametrize("verb", ["pause", "resume", "drain"])
def test_without_a_daemon_there_is_nobody_to_tell(machine: Machine, verb: str) -> None:
    """Exit status 1 and the next command, as for every other verb that needs one."""
    done = CliRunner().invoke(cli, [verb])
    assert done.exit_code == 1 and "no daemon listens" in done.stderr and "next: runner start" in done.stderr


def test_an_interrupt_ends_the_waiting_and_not_the_drain(machine: Machine) -> None:
    """1. It waits. 2. ^C. 3. What goes on is said; nothing was taken back."""
    machine.left = [["ex_1.1"]]
    with answering(machine.socket, machine.answer):
        command = [sys.executable, "-m", "runner.cli", "drain"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ, text=True) as process:
            assert process.stderr is not None
            assert process.stderr.readline() == "1 attempt runs: ex_1.1\n"
            process.send_signal(signal.SIGINT)
            said = process.stderr.read()
    assert process.returncode == 130 and "the drain goes on without you" in said and "runner resume" in said
    assert machine.state == "draining" and {verb for verb, _ in machine.asked} == {"admission"}


def test_a_terminal_has_one_line_that_is_written_over(machine: Machine) -> None:
    """What still runs, cut at its edge, and when it is stopped; nothing of it stays."""
    names = [f"ex_{'y' * 30}{number}.1" for number in range(3)]
    machine.left, machine.stops_in_ms = [names, names[:1], []], 61_000
    ours, theirs = pty.openpty()
    with answering(machine.socket, machine.answer), os.fdopen(ours, "rb", buffering=0) as screen:
        command = [sys.executable, "-m", "runner.cli", "drain"]
        environ = {**os.environ, "COLUMNS": "60"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environ) as process:
            os.close(theirs)
            said = b""
            with contextlib.suppress(OSError):  # the other end is gone
                while piece := screen.read(4096):
                    said += piece
    assert process.returncode == 0
    lines = said.decode().replace("\r\n", "\n").split("\r\x1b[K")
    assert lines[1].startswith("3 attempts run: ex_yyy") and len(lines[1]) == 59
    assert lines[2].startswith("1 attempt runs: ex_yyy")
    assert lines[3].startswith("No new work is taken.") and said.count(b"\n") == 1


def test_status_and_ps_say_that_the_machine_is_closed(machine: Machine) -> None:
    """And when a drain stops what runs, and what there is too little of."""
    draining = {"state": "draining", "stops_in_ms": 125_000}

    async def closed(call: ControlCall) -> dict[str, Any]:
        if call.verb == "ps":
            return {"attempts": [ATTEMPT], "admission": draining}
        short = {"short": "DISK_LOW", "detail": "1 MiB are free, 2048 are wanted"}
        return {**STATUS, "admission": draining, "headroom": short, "survivors": 2}

    words = "draining: new work is refused until `runner resume`, what still runs is stopped in 2m5s"
    with answering(machine.socket, closed):
        status, ps = CliRunner().invoke(cli, ["status"]), CliRunner().invoke(cli, ["ps"])
    assert f"admission  {words}" in status.stdout and words in ps.stderr
    assert "new work is refused: DISK_LOW, 1 MiB are free, 2048 are wanted" in status.stdout
    assert "2 processes of ended attempts cannot be ended" in status.stdout
