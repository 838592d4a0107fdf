"""`runner attach` at a terminal of its own, with the daemon and the control plane dead: a person at the machine is at his PTY all the same.

One stand opens the PTYs; then everything of it but their shims is killed, once for all tests of this module.

Hand mutants, each tried, and each red: modes of the terminal that are not put back; modes of the program that are not taken back; a window
that is not followed; a status that is always 0.
"""

import select
import signal
import termios
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import ptyprocess
import pytest
import pytest_asyncio

from examples.demo.stage import BIN
from protocol.records import RecordKind, records
from terminal.emulator import Emulator
from tests.support.pty_screen import opened
from tests.support.stand import ANSWER_S, Stand, poll, stand

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

PTYS: Final = 6
SHELL: Final = ("bash", "--norc", "--noprofile")
LEFT: Final = 0


@dataclass
class Machine:
    """PTYs without a daemon and a control plane."""

    system: Stand
    ptys: list[str]

    def log(self, pty: str) -> bytes:
        """What a terminal got, as its shim wrote it."""
        segments = sorted((self.system.state / "x" / f"{pty}.1" / "log").glob("*.seg"))
        found = [each for path in segments for each in records(path.read_bytes(), int(path.stem, 16))]
        return b"".join(each.payload for each in found if each.kind == RecordKind.PTY)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def machine() -> AsyncIterator[Machine]:
    """What all tests of this module stand on."""
    async with stand() as system:
        ptys = [await opened(system, *SHELL) for _ in range(PTYS)]

        async def prompts() -> bool:
            return all([(await system.get(f"/executions/{pty}"))["log"]["end"] > 0 for pty in ptys])

        await poll(prompts, "a prompt of each")
        await system.kill("daemon")
        await system.kill("plane")
        yield Machine(system, ptys)


class Client:
    """`runner attach` in a terminal, whose modes are those of a shell's that started it."""

    def __init__(self, system: Stand, pty: str, *options: str) -> None:
        argv = [str(BIN / "runner"), "attach", pty, *options]
        env = system.env | {"TERM": "xterm-256color"}
        self.child = ptyprocess.PtyProcess.spawn(argv, env=env, dimensions=(24, 80))
        self.before = termios.tcgetattr(self.child.fd)
        assert not self.raw, "it has only begun"
        self.screen = Emulator(24, 80)
        self.shown = bytearray()

    def types(self, text: str | bytes) -> None:
        """Press keys."""
        self.child.write(text.encode() if isinstance(text, str) else text)

    def sees(self, text: str) -> None:
        """Wait until it is on the screen."""
        until = time.monotonic() + ANSWER_S
        while text not in self.text:
            assert time.monotonic() < until, f"{text!r} is not on the screen:\n{self.text}"
            self._read()

    def ends(self) -> int:
        """Wait until the program has ended: its status. The terminal is as it was before."""
        until = time.monotonic() + ANSWER_S
        while self._read() or self.child.isalive():
            assert time.monotonic() < until, self.text
        assert termios.tcgetattr(self.child.fd) == self.before
        assert self.screen.modes.changed == {} and not self.screen.modes.keypad
        assert self.child.signalstatus is None
        return int(self.child.exitstatus)

    @property
    def raw(self) -> bool:
        """Whether keys go through as they are."""
        return not termios.tcgetattr(self.child.fd)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)

    @property
    def text(self) -> str:
        """The screen, without what is blank behind its lines."""
        return "\n".join(line.rstrip() for line in self.screen.lines)

    def _read(self) -> bool:
        if not select.select([self.child.fd], [], [], 0.1)[0]:
            return False
        try:
            data = self.child.read(65_536)
        except EOFError:
            return False
        self.shown += data
        self.screen.feed(data)
        return True


@contextmanager
def attached(machine: Machine, pty: str, *options: str) -> Iterator[Client]:
    """Somebody at a PTY, at its prompt."""
    client = Client(machine.system, pty, *options)
    try:
        client.sees("ready>")
        yield client
    finally:
        client.child.close(force=True)


async def test_a_person_types_leaves_and_comes_back(machine: Machine) -> None:
    """1. What is typed runs once. 2. `~.` leaves the shell as it is. 3. Who comes back sees its screen. 4. Its status is passed on."""
    pty = machine.ptys[0]
    with attached(machine, pty) as client:
        assert client.raw
        client.types("n=$((n+1)); echo n=$n; tty\r")
        client.sees("n=1\n/dev/pts/")
        client.types("\r~.")
        assert client.ends() == LEFT
    with attached(machine, pty) as client:
        client.sees("n=1\n/dev/pts/")
        client.types("n=$((n+1)); echo n=$n; exit 7\r")
        client.sees("n=2\nexit")
        assert client.ends() == 7
    assert machine.log(pty).count(b"n=1\r\n") == machine.log(pty).count(b"n=2\r\n") == 1


async def test_the_window_is_followed(machine: Machine) -> None:
    """From its first size on, and each that it gets."""
    pty = machine.ptys[1]
    with attached(machine, pty) as client:
        for rows, cols in ((40, 132), (12, 50)):
            client.child.setwinsize(rows, cols)
            client.screen.resize(rows, cols)
            client.types(
                f"until [ \"$(stty size)\" = '{rows} {cols}' ]; do sleep 0.02; done; echo so-$((40+2))-{rows}\r"
            )
            client.sees(f"so-42-{rows}")
        client.types("exit\r")
        assert client.ends() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
async def test_a_client_that_is_told_to_end_puts_the_terminal_back(machine: Machine, number: signal.Signals) -> None:
    """Out of a full-screen program, too; the program goes on, and is drawn anew for who comes next."""
    pty = machine.ptys[2 if number == signal.SIGTERM else 3]
    with attached(machine, pty) as client:
        client.types("printf '\\033[?1049h\\033[?1h\\033=\\033[?2004h\\033[?1000h\\033[?25l'; echo in-$((40+2)); cat\r")
        client.sees("in-42")
        assert client.screen.modes.alternate and client.raw
        client.child.kill(number)
        assert client.ends() == 128 + number
    with attached_to_cat(machine, pty) as client:
        client.types("still there\r")
        client.sees("still there\nstill there")
        assert {1049, 1, 2004, 1000} <= client.screen.modes.changed.keys() and client.screen.modes.keypad
        client.types("\r~.")
        assert client.ends() == LEFT


@contextmanager
def attached_to_cat(machine: Machine, pty: str) -> Iterator[Client]:
    """Somebody who comes to the alternate screen."""
    client = Client(machine.system, pty)
    try:
        client.sees("in-42")
        yield client
    finally:
        client.child.close(force=True)


async def test_one_that_is_killed_loses_nothing_of_what_was_taken(machine: Machine) -> None:
    """`kill -9` of the client: its terminal stays as it is, the shell has what was typed, and the next one goes on."""
    pty = machine.ptys[4]
    with attached(machine, pty) as client:
        client.types("echo one-$((40+2)); read -r line; echo got $line\r")
        client.sees("one-42")
        client.types("ha")
        client.sees("one-42\nha")
        client.child.kill(signal.SIGKILL)
        client.child.wait()
    with attached(machine, pty) as client:
        client.sees("one-42\nha")
        client.types("lf\rexit 5\r")
        client.sees("got half\n")
        assert client.ends() == 5


async def test_who_looks_on_types_nothing(machine: Machine) -> None:
    """Beside somebody who types; both see it, and the end is told to both."""
    pty = machine.ptys[5]
    with attached(machine, pty) as writer, attached(machine, pty, "--read-only") as reader:
        reader.types("echo never\r")
        writer.types("echo seen-$((40+2))\r")
        for each in (writer, reader):
            each.sees("seen-42")
        writer.types("exit 3\r")
        assert (writer.ends(), reader.ends()) == (3, 3)
    assert b"never" not in machine.log(pty)
