"""A PTY through the whole system and its control plane: real shim, daemon and plane, each of which dies in the middle."""

from collections.abc import AsyncIterator

import anyio
import pytest
import pytest_asyncio

from protocol.keys import PrivateKey
from tests.support.stand import RUNNER, Stand, stand
from tests.support.viewers import Key, Seat, admit, seated

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]
PROMPT = b"ready> "


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system() -> AsyncIterator[Stand]:
    """One plane and one runner for all."""
    async with stand() as running:
        yield running


async def opened(system: Stand, *argv: str) -> str:
    """A PTY with a shell, or with something else."""
    body = {
        "runner": RUNNER,
        "argv": list(argv) or ["bash", "--norc"],
        "cwd": str(system.home),
        "env": {"PS1": PROMPT.decode()},
        "size": {"rows": 24, "cols": 80},
    }
    made: str = (await system.post("/ptys", body))["id"]
    return made


async def entered(seat: Seat) -> None:
    """Begin, and be live."""
    await seat.begin()
    await seat.expect("live")


async def test_a_shell_outlives_daemon_and_plane(system: Stand) -> None:
    """What is typed runs once, whatever is killed; who comes back sees where it is, and its end is the shell's own."""
    pty, key = await opened(system), Key()
    async with seated(system.port, pty, await admit(system.http, pty, key), key) as seat:
        await entered(seat)
        await seat.resize(24, 80)
        await seat.shows(PROMPT)
        await seat.type(b"n=1; tty; stty size\r")
        await seat.shows(b"24 80\r\n")
        assert b"/dev/pts/" in seat.screen
        await system.kill("daemon")
        await seat.expect("offline")
        await seat.type(b"n=$((n+1)); echo got-$n\r")
        await system.start_daemon()
        await seat.expect("online")
        await seat.shows(b"got-2\r\n")
        await system.kill("plane")
        await seat.closed()
        had = seat.offset
    await system.start_plane()
    await system.online()
    ticket = await admit(system.http, pty, key)
    assert ticket["viewer"] == seat.ticket["viewer"]
    async with seated(system.port, pty, ticket, key) as again:
        await again.begin(start=had)
        await again.expect("live")
        assert b"got-" not in again.screen
        await again.type(b"n=$((n+1)); echo got-$n; exit 5\r")
        code, heard = await again.closed()
        assert (code, heard[-1]["t"], heard[-1]["exit_status"]) == (1000, "ended", 5)
        assert b"got-3\r\n" in again.screen
    shown = await system.ended(pty)
    assert (shown["pty"], shown["log"]["complete"]) == (True, True)
    proof = (await system.get(f"/executions/{pty}/digests"))["proof"]
    assert (proof["ok"], proof["wrong"]) == (True, [])


async def test_an_interrupt_acts_at_once_however_much_is_on_its_way(system: Stand) -> None:
    """A flood waits for the viewer that may type: ^C is not behind megabytes of it. One that only looks on is skipped ahead."""
    pty, key, idle = await opened(system), Key(), Key(PrivateKey(b"i" * 32))
    writer, reader = await admit(system.http, pty, key), await admit(system.http, pty, idle, "ro")
    async with seated(system.port, pty, writer, key) as seat, seated(system.port, pty, reader, idle) as onlooker:
        await entered(seat)
        await entered(onlooker)
        await seat.shows(PROMPT)
        await seat.type(b"yes\r")
        while len(seat.screen) < 2_500_000:
            await seat.hear()
            await seat.seen()
        before = len(seat.screen)
        await seat.type(b"\x03")
        while PROMPT not in seat.screen[before:]:
            await seat.hear()
            await seat.seen()
        assert len(seat.screen) - before < 1_000_000
        while not onlooker.screen:
            await onlooker.hear()
        with anyio.move_on_after(1):
            while True:
                await onlooker.hear()
        await onlooker.seen()
        await onlooker.expect("skipped")
        await onlooker.shows(PROMPT)


async def test_two_type_and_all_see_who_is_there(system: Stand) -> None:
    """Each has a count of its own; both see both; the size is that of who told one last; closing hangs up."""
    pty, one, two = await opened(system), Key(), Key(PrivateKey(b"2" * 32))
    first, second = await admit(system.http, pty, one), await admit(system.http, pty, two)
    async with seated(system.port, pty, first, one) as a, seated(system.port, pty, second, two) as b:
        await entered(a)
        await entered(b)
        while len((await a.expect("viewers"))["viewers"]) < 2:
            pass
        await a.shows(PROMPT)
        await a.resize(30, 90)
        await b.expect("size")
        await b.resize(40, 100)
        await a.type(b"echo from-$((40+2))\r")
        await b.shows(b"from-42\r\n")
        await b.type(b"stty size\r")
        await a.shows(b"40 100\r\n")
        await system.post(f"/ptys/{pty}/close", {"grace_ms": 1000})
        for seat in (a, b):
            code, heard = await seat.closed()
            assert (code, heard[-1]["t"], heard[-1]["settlement"]["verdict"]) == (1000, "ended", "stopped")


async def test_a_pty_that_cannot_begin_says_why(system: Stand) -> None:
    """Refused by the owner's policy: the execution tells, and who attaches sees the end at once."""
    body = {"runner": RUNNER, "cwd": "/", "size": {"rows": 24, "cols": 80}}
    made = await system.post("/ptys", body)
    key = Key()
    ticket = await admit(system.http, made["id"], key)
    assert ticket["mode"] == "ro"
    async with seated(system.port, made["id"], ticket, key) as seat:
        await seat.begin()
        code, heard = await seat.closed()
        assert (code, heard[-1]["t"], heard[-1]["state"]) == (1000, "ended", "refused")
    assert (await system.get(f"/ptys/{made['id']}"))["reason"] == "CWD_OUTSIDE_ROOTS"
