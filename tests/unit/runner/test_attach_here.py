"""`runner attach`: a person at a PTY of this machine, with nothing of ours alive but its shim."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from click.testing import CliRunner

from runner.cli import cli
from runner.shim import wire
from tests.support.person import Person
from tests.support.shim import Shim, wait_for

pytestmark = pytest.mark.slow
MIB = 1 << 20
Open = Callable[..., Shim]
Attach = Callable[..., Person]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A runner's state directory."""
    (tmp_path / "x").mkdir()
    return tmp_path


@pytest.fixture
def opened(state: Path) -> Iterator[Open]:
    """PTYs with a shell, or with what is asked for."""
    with ExitStack() as ends:
        env = {"PATH": os.environ["PATH"], "TERM": "xterm-256color", "LANG": "C.UTF-8", "PS1": "> ", "HOME": str(state)}

        def make(*argv: str) -> Shim:
            shim = Shim(
                state / "x", None, argv=list(argv or ("bash", "--norc", "-i")), tty={"rows": 24, "cols": 80}, overflow="head_tail",
                segment_bytes=MIB, spool_bytes=8 * MIB, env=env,
            )  # fmt: skip
            ends.callback(shim.close)
            shim.start()
            return shim

        yield make


@pytest.fixture
def attach(state: Path) -> Iterator[Attach]:
    """People at them."""
    with ExitStack() as ends:

        def make(*argv: str) -> Person:
            person = Person("runner", "--state-dir", str(state), "attach", *argv)
            ends.callback(person.close)
            return person

        yield make


def test_a_person_is_in_it_leaves_and_comes_back_to_the_same_screen(opened: Open, attach: Attach) -> None:
    """The only PTY needs no name; the window's size is the PTY's; the exit status is the program's."""
    opened()
    first = attach()
    first.sees("> ")
    first.types(b"stty size; echo to-$((40+2))\r")
    first.sees("30 90")
    first.sees("to-42")
    first.types(b"~.")
    assert first.status() == 0
    again = attach()
    again.sees("to-42")
    again.types(b"exit 7\r")
    assert again.status() == 7


def test_a_full_screen_program_is_there_again(opened: Open, attach: Attach, state: Path) -> None:
    """Its screen and its modes; and the person's terminal has neither when they leave."""
    (state / "poem.txt").write_text("first line\n" * 3 + "middle\n" * 100)
    opened("vim", "-N", "-u", "NONE", str(state / "poem.txt"))
    first = attach()
    first.sees("first line")
    first.types(b"ihello\r")
    first.sees("hello")
    first.types(b"~.")
    assert first.status() == 0
    assert not first.screen.modes.alternate
    again = attach()
    again.sees("hello")
    again.sees("INSERT")
    assert again.screen.modes.alternate
    again.types(b"\x03")
    again.misses("INSERT")
    again.types(b":q!\r")
    assert again.status() == 0


def test_one_that_looks_on_types_nothing_and_has_no_say_in_its_size(opened: Open, attach: Attach) -> None:
    """`--read-only`."""
    shim = opened()
    onlooker = attach(shim.attempt, "--read-only")
    onlooker.sees("> ")
    onlooker.types(b"echo no\r")
    typist = attach(shim.attempt)
    typist.types(b"echo y-$((1+1)); exit\r")
    onlooker.sees("y-2")
    assert (onlooker.status(), typist.status()) == (0, 0)
    assert b"echo no" not in shim.log().pty


def test_an_interrupt_of_a_flood_acts_at_once(opened: Open, attach: Attach) -> None:
    """It waits for a person who does not look on, and what was written ahead of them is bounded."""
    shim = opened()
    person = attach()
    person.sees("> ")
    person.types(b"yes\r")
    shim.wait_log(lambda log: len(log.pty) > MIB // 8, "a flood")
    person.types(b"\x03")
    begun = len(person.shown)
    while b"^C" not in person.shown[-200:]:
        person.shown += person.child.read(65536)
    assert len(person.shown) - begun < MIB


def test_one_that_has_ended_shows_its_screen_and_its_status(opened: Open, attach: Attach) -> None:
    """Also when its shim is long gone; and one whose shim was killed is a failure of ours."""
    shim = opened("sh", "-c", "echo the end; exit 3")
    shim.exit()
    shim.controller.close()
    late = attach(shim.attempt)
    late.sees("the end")
    assert late.status() == 3
    killed = opened()
    person = attach(killed.attempt)
    person.sees("> ")
    os.kill(killed.pid, signal.SIGKILL)
    assert person.status() == 125


def test_a_socket_that_breaks_is_dialled_again(opened: Open, attach: Attach) -> None:
    """Its lock is held: it lives."""
    shim = opened()
    person = attach()
    person.sees("> ")
    # As many viewers as a shim serves at once, and so the person's connection goes.
    others = []
    for _ in range(32):
        others.append(shim.connect())
        others[-1].send(wire.VIEW)
        others[-1].wait(wire.WELCOME)
    for other in others:
        other.close()
    person.types(b"echo back-$((1+1))\r")
    person.sees("back-2")
    person.types(b"exit\r")
    assert person.status() == 0


def test_there_may_be_none_or_more_than_one(opened: Open, state: Path) -> None:
    """Then it says what there is."""

    def run(*argv: str) -> tuple[int, str]:
        result = CliRunner().invoke(cli, ["--state-dir", str(state), "attach", *argv])
        return result.exit_code, result.output

    assert run()[0] == 1 and "no PTY lives" in run()[1]
    assert run("ex_none")[0] == 1
    one, two = opened(), opened()
    wait_for(lambda: (one.dir / "meta.json").exists() and (two.dir / "meta.json").exists(), "both")
    status, said = run()
    assert status == 1 and one.attempt in said and two.attempt in said
