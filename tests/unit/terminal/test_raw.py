"""The terminal of a person, a real one: raw while it is used, and put back however its program ends."""

import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import ptyprocess
import pytest

ROOT = Path(__file__).resolve().parents[3]
WAIT_S = 20.0
PROGRAM = """
import asyncio, os, signal, sys
from terminal.attach import Attachment, attach
from terminal.raw import RawTerminal
from terminal.viewing import Begun, Live, Output
from contextlib import asynccontextmanager

class Line:
    def __init__(self):
        self.heard = [Begun("ex_1.1", True, 0, 0), Output(10, b"\\x1b[?1049h\\x1b[?2004h\\x1b[?25l\\x1b[>4;2mready\\n"), Live(10)]
    async def hear(self):
        if self.heard: return self.heard.pop(0)
        if sys.argv[1] == "raise": raise ZeroDivisionError
        await asyncio.Event().wait()
    def say(self, said): sys.stdout.write(f"said {said}\\r\\n"); sys.stdout.flush()
    async def said(self): pass
    def drop(self): pass

class Dialer:
    def delays(self): return iter([0.1])
    @asynccontextmanager
    async def dial(self, begin): yield Line()

finish = asyncio.run(attach(Dialer(), RawTerminal(), "replay", gen=1))
sys.exit(finish.status)
"""


class Person:
    """Somebody at a terminal, in whose shell a viewer runs: the modes that the shell has are to be there behind it."""

    def __init__(self, how: str) -> None:
        argv = [sys.executable, "-c", PROGRAM, how]
        self.child = ptyprocess.PtyProcess.spawn(argv, cwd=str(ROOT), dimensions=(33, 99))
        self.before = termios.tcgetattr(self.child.fd)
        self.shown = b""

    def sees(self, text: bytes) -> None:
        """Wait until it is shown."""
        until = time.monotonic() + WAIT_S
        while text not in self.shown:
            assert time.monotonic() < until, self.shown
            if select.select([self.child.fd], [], [], 0.1)[0]:
                self.shown += self.child.read(65536)

    def raw(self) -> bool:
        """Whether keys go through unread."""
        return not termios.tcgetattr(self.child.fd)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)

    def ends(self) -> int:
        """Wait for the end; the terminal is as it was, and so is what shows on it."""
        status = self.reads_to_end()
        assert termios.tcgetattr(self.child.fd) == self.before
        left = self.shown.rpartition(b"ready")[2]
        for taken_back in (b"\x1b[?1049l", b"\x1b[?2004l", b"\x1b[?25h", b"\x1b[>4m", b"\x1b[!p"):
            assert taken_back in left
        assert left.index(b"\x1b[?2004l") < left.index(b"\x1b[?1049l")
        return status

    def reads_to_end(self) -> int:
        """Everything it still shows, and its status."""
        until = time.monotonic() + WAIT_S
        while self.child.isalive() or select.select([self.child.fd], [], [], 0)[0]:
            assert time.monotonic() < until
            if select.select([self.child.fd], [], [], 0.05)[0]:
                try:
                    self.shown += self.child.read(65536)
                except EOFError:
                    break
        self.child.wait() if self.child.isalive() else None
        return int(self.child.exitstatus if self.child.signalstatus is None else -self.child.signalstatus)


@pytest.fixture
def person(request: pytest.FixtureRequest) -> Iterator[Person]:
    """At a viewer that is shown something."""
    found = Person(getattr(request, "param", "wait"))
    try:
        found.sees(b"ready")
        yield found
    finally:
        found.child.close(force=True)


def test_it_is_raw_meanwhile_and_as_before_when_the_person_leaves(person: Person) -> None:
    """Enter ~. at the beginning of a line; what the program set is taken back, the screen last."""
    assert person.raw()
    person.sees(b"rows=33, cols=99")
    person.child.write(b"x\r~.")
    assert person.ends() == 0
    assert b"data=b'x\\r'" in person.shown


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_it_is_as_before_when_its_program_is_told_to_end(person: Person, number: signal.Signals) -> None:
    """The status says which signal it was."""
    person.child.kill(number)
    assert person.ends() == 128 + number


@pytest.mark.parametrize("person", ["raise"], indirect=True)
def test_it_is_as_before_when_its_program_fails(person: Person) -> None:
    """A defect of ours leaves no broken terminal behind."""
    assert person.ends() == 1
    assert b"ZeroDivisionError" in person.shown


def test_a_window_that_changes_is_told_once_it_rests(person: Person) -> None:
    """And the size is that of the terminal."""
    for rows in (40, 41, 42):
        person.child.setwinsize(rows, 120)
    person.sees(b"rows=42, cols=120")


def test_help_is_shown_and_not_typed(person: Person) -> None:
    """Enter ~? says what there is."""
    person.child.write(b"~?")
    person.sees(b"Supported behind Enter")
    person.child.write(b"\r~~\r~.")
    person.sees(b"data=b'\\r~\\r'")
    assert person.ends() == 0


def test_a_viewer_that_is_suspended_gives_the_terminal_back_and_takes_it_again(person: Person) -> None:
    """~^Z, and `fg` of a shell."""
    person.child.write(b"~\x1a")
    _until(lambda: _state(person.child.pid) == "T")
    assert termios.tcgetattr(person.child.fd) == person.before
    person.child.kill(signal.SIGCONT)
    _until(person.raw)
    person.child.write(b"\r~.")
    assert person.ends() == 0


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _until(true: object) -> None:
    assert callable(true)
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_without_a_terminal_bytes_go_through_and_its_end_is_a_leave() -> None:
    """From a pipe, to a pipe; size of the usual terminal, nothing of ours in what is shown."""
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("if self.heard", "await asyncio.sleep(0)\n        if self.heard"), "wait"],
        cwd=ROOT, input=b"", capture_output=True, timeout=WAIT_S, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert b"ready" in ended.stdout and b"\x1b[!p" not in ended.stdout and b"rows=24, cols=80" in ended.stdout
