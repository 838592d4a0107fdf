"""Real programs on a terminal afar, each with a disturbance in the middle: nothing typed is lost or doubled, and every screen is right.

One control plane and one daemon, with a proxy between them, serve all tests of this module; screens are those of a terminal emulator.
What a person types while the daemon is dead or the network cut arrives once, when it is there again. Then he comes back by the offset
that he has, and others come anew: all see the same.

Hand mutants, each tried, and each red: an offset that is named and not believed; a replay that forgets a mode; no jiggle for a redraw; a
size that is not told again to a new session; a server inside that is swept where it is to be left, and left where it is to be swept.
"""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio

from tests.support.proxy import Proxy
from tests.support.pty_screen import Person, opened, person, pty_log, same
from tests.support.stand import Stand, stand

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

SHELL: Final = ("bash", "--norc", "--noprofile")
FULL: Final = ("replay", "snapshot", "redraw")
"""Ways to come to a program that draws the whole screen."""
PLAIN: Final = ("replay", "snapshot")


@dataclass
class World:
    """A runner behind a network that can be cut."""

    system: Stand
    proxy: Proxy

    def home(self, name: str) -> Path:
        """A file of the programs'."""
        return self.system.home / name


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[World]:
    """What all tests of this module stand on."""
    async with stand(enrolled=False) as system, Proxy(system.port) as proxy:
        await system.enroll(port=proxy.port)
        # Programs read and write nothing of whoever runs this.
        system.env["HOME"] = str(system.home)
        await system.start_daemon()
        await system.online()
        # The plane lets go of connections that rest, and a request may meet that.
        system.http.headers["Connection"] = "close"
        yield World(system, proxy)


# --- what disturbs ------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def killed(world: World) -> AsyncIterator[None]:
    """The daemon is killed, and later there is another one."""
    await world.system.kill("daemon")
    yield
    await world.system.start_daemon()


@asynccontextmanager
async def cut(world: World) -> AsyncIterator[None]:
    """The network is gone, and later it is there again."""
    world.proxy.refuse()
    await world.proxy.drop()
    yield
    world.proxy.heal()


@asynccontextmanager
async def upgraded(world: World) -> AsyncIterator[None]:
    """The daemon is told to go, and a new one takes its place."""
    assert await world.system.end("daemon") == 0
    yield
    await world.system.start_daemon()


Disturbance = Callable[[World], AbstractAsyncContextManager[None]]


@asynccontextmanager
async def disturbed(world: World, how: Disturbance, who: Person) -> AsyncIterator[None]:
    """Inside, nobody is there to take what is typed; behind it, all of it was taken."""
    async with how(world):
        await who.until(lambda: not who.online, "word that the runner is gone")
        yield
    await who.until(lambda: who.online, "word that the runner is back")
    await who.is_taken()


async def comes_back(who: Person) -> None:
    """His connection breaks; he goes on at the offset that he has, and his screen stays as it was, without a replay."""
    picture, shown, before = who.picture, bytes(who.shown), who.connections
    who.drop()
    await who.until(lambda: who.connections > before and who.live, "another connection")
    assert (bytes(who.shown), who.picture) == (shown, picture)


async def seen_by_others(world: World, who: Person, *ways: str) -> None:
    """Whoever comes anew sees what he sees, with the modes that hold."""
    for way in ways:
        async with person(world.system, who.pty, way, attach=way, mode="rw" if way == "redraw" else "ro") as other:
            await same(who, other)


@asynccontextmanager
async def running(world: World, *argv: str, closes: bool = True, **over: Any) -> AsyncIterator[Person]:
    """A program, and who sees all of it from its first byte on."""
    if shutil.which(argv[0]) is None:
        print(f"left out: {argv[0]} is not installed")
        pytest.skip(f"{argv[0]} is not installed")
    pty = await opened(world.system, *argv, **over)
    async with person(world.system, pty, start=0) as who:
        yield who
        if closes:
            await world.system.post(f"/ptys/{pty}/close", {"grace_ms": 500})
        await who.leaves_with()
        assert bytes(who.shown) == await pty_log(world.system, pty), "he was shown the log, each byte once"


# --- programs -----------------------------------------------------------------------------------------------------------


async def test_a_shell_has_its_jobs_across_a_killed_daemon(world: World) -> None:
    """^C ends, ^Z stops, `jobs` and `fg`, which are typed while nobody is there, come once, and its job goes on."""
    async with running(world, *SHELL) as who:
        await who.sees("ready>")
        await who.type("sleep 1000\r")
        await who.sees("sleep 1000")
        await who.type("\x03")
        await who.sees("^C\nready>")
        await who.type("echo status=$?; cat\r")
        await who.sees("status=130")
        await who.type("abc\r")
        await who.sees("abc\nabc\n")
        await who.type("\x1a")
        await who.sees("[1]+  Stopped                 cat\nready>")
        async with disturbed(world, killed, who):
            for key in "jobs\rfg\r":
                await who.type(key)
        await who.sees("ready> fg\ncat\n")
        # Not before: what a line editor has not read when it gives the terminal away is no line for who gets it.
        await who.type("def\r")
        await who.sees("ready> jobs\n[1]+  Stopped                 cat\nready> fg\ncat\ndef\ndef\n")
        await comes_back(who)
        await seen_by_others(world, who, *PLAIN)
        await who.type("\x04")
        await who.sees("def\nready>")
        await who.type("n=$((n+1)); echo n=$n; jobs; exit 3\r")
        assert (await who.leaves_with())["exit_status"] == 3
        assert "n=1\nexit" in who.text


async def test_an_editor_saves_what_was_typed_across_a_cut_network(world: World) -> None:
    """vim: half of the text is typed while there is no network; the file has each letter once."""
    file = world.home("letter")
    file.write_text("dear\n")
    async with running(world, "vim", "-u", "NONE", "-i", "NONE", "-N", "-n", "letter") as who:
        await who.sees("dear", '"letter" 1L, 5B')
        await who.type("ohello")
        await who.sees("dear\nhello\n~", "-- INSERT --")
        async with disturbed(world, cut, who):
            for letter in " world, äöü":
                await who.type(letter)
        await who.sees("dear\nhello world, äöü\n~", "-- INSERT --")
        await comes_back(who)
        await seen_by_others(world, who, *FULL)
        await who.type("\x1b:w\r")
        await who.sees('"letter" 2L,')
        assert file.read_text() == "dear\nhello world, äöü\n"
        await who.type(":q\r")
        assert (await who.leaves_with())["exit_status"] == 0
        assert not who.screen.modes.alternate


async def test_a_pager_is_read_on_across_an_upgrade(world: World) -> None:
    """less: a page, a search that is typed while there is no daemon, and its end."""
    world.home("book").write_text("".join(f"line {number}\n" for number in range(1, 501)))
    async with running(world, "less", "book") as who:
        await who.sees("line 1\n", "line 23\nbook")
        await who.type(" ")
        await who.sees("line 24\n", "line 46\n:")
        async with disturbed(world, upgraded, who):
            await who.type("/line 30")
            await who.type("0\r")
        await who.until(lambda: who.text.startswith("line 300\nline 301\n"), "the line that was looked for")
        await comes_back(who)
        await seen_by_others(world, who, *FULL)
        await who.type("q")
        assert (await who.leaves_with())["exit_status"] == 0


async def test_a_program_that_draws_by_itself_goes_on_across_a_killed_daemon(world: World) -> None:
    """top: it is drawn anew again and again; then its help, which stands still, and back."""
    async with running(world, "top", "-d", "0.5") as who:
        await who.sees("load average", "PID USER")
        drawn = len(who.shown)
        await who.until(lambda: len(who.shown) > drawn + 1000, "drawn again")
        async with disturbed(world, killed, who):
            await who.type("h")
        await who.sees("Help for Interactive Commands")
        await comes_back(who)
        await seen_by_others(world, who, *PLAIN)
        await who.type("q")
        await who.sees("load average")
        await who.type("q")
        assert (await who.leaves_with())["exit_status"] == 0


@pytest.mark.parametrize(("background", "how"), [("leave", cut), ("sweep", upgraded)], ids=["leave", "sweep"])
async def test_a_multiplexer_inside(world: World, background: str, how: Disturbance) -> None:
    """tmux: detached from, its server is left where that was asked for, and swept where not."""
    socket = world.home(f"mux-{background}")
    base = ("tmux", "-f", "/dev/null", "-S", str(socket))

    def lives() -> bool:
        return subprocess.run([*base, "has-session", "-t", "s"], check=False, capture_output=True).returncode == 0

    # Its own shell, which begins this one, is none that prompts and takes the prompt away.
    argv = (*base, "new-session", "-s", "s", f"PS1='ready> ' {' '.join(SHELL)}")
    async with running(world, *argv, closes=False, background=background) as who:
        await who.sees("ready>", "[s] 0:")
        await who.type("n=$((n+1)); echo n=$n\r")
        await who.sees("\nn=1\n")
        async with disturbed(world, how, who):
            await who.type("n=$((n+1)); echo n=$n; stty size\r")
        await who.sees("\nn=2\n23 80\n")
        await comes_back(who)
        await seen_by_others(world, who, *FULL)
        assert lives()
        await who.type("\x02d")
        ended = await who.leaves_with()
        assert ended["exit_status"] == 0 and "[detached" in who.text
    assert lives() is (background == "leave")
    if background == "leave":
        subprocess.run([*base, "kill-server"], check=True)


async def test_an_interpreter_remembers_across_a_cut_network(world: World) -> None:
    """The REPL of Python: what it counts is counted once, and a block is typed in two halves."""
    async with running(world, sys.executable, "-I", "-q") as who:
        await who.sees(">>>")
        await who.type("n = 1\rfor each in 'ab':\r")
        await who.sees("...")
        async with disturbed(world, cut, who):
            await who.type("    n += 1; print(each, n)\r")
            await who.type("\r")
        await who.sees("a 2\nb 3\n>>>")
        await comes_back(who)
        await seen_by_others(world, who, *PLAIN)
        await who.type("\x04")
        assert (await who.leaves_with())["exit_status"] == 0


async def test_a_terminal_has_the_size_that_was_told_while_there_was_no_daemon(world: World) -> None:
    """`stty -a` and `tput`: a terminal as any other, before and behind an upgrade in which the window changed."""
    async with running(world, *SHELL) as who:
        await who.sees("ready>")
        await who.type("tput cols; stty -a\r")
        await who.sees("tput cols; stty -a\n80\n", "rows 24; columns 80;", "intr = ^C;", "iutf8", " icanon ", "echoe")
        async with disturbed(world, upgraded, who):
            await who.resize(30, 100)
        await who.type("clear; stty size; tput cols; tput lines; echo $TERM $COLUMNS\r")
        await who.sees("30 100\n100\n30\nxterm-256color 100\n")
        await comes_back(who)


async def test_what_is_typed_unseen_is_seen_by_nobody(world: World) -> None:
    """A password is typed while the daemon is dead: taken once, and neither shown nor logged."""
    script = 'read -rsp "Password: " p; echo; read -rp "Again: " q; echo "$p" | sha256sum'
    async with running(world, "bash", "-c", script, closes=False) as who:
        await who.sees("Password:")
        await who.type("corr")
        async with disturbed(world, killed, who):
            await who.type("ect horse")
            await who.type("\r")
        await who.sees("Again:")
        assert who.screen.cursor == (1, 7)
        await comes_back(who)
        await seen_by_others(world, who, *PLAIN)
        await who.type("shown\r")
        await who.leaves_with()
        digest = hashlib.sha256(b"correct horse\n").hexdigest()
        assert f"Password:\nAgain: shown\n{digest}" in who.text
    log = await pty_log(world.system, who.pty)
    assert b"shown" in log and b"horse" not in log and b"corr" not in log
