"""`runner-control attach`: a person at a PTY of another machine, while everything between them and it dies."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import pytest

from tests.support.person import Person
from tests.support.stand import RUNNER, Stand, stand

pytestmark = pytest.mark.slow


@pytest.fixture
async def system() -> AsyncIterator[Stand]:
    """A control plane and a daemon."""
    async with stand() as found:
        yield found


def person(system: Stand, *argv: str) -> Person:
    """Somebody with the command line of the control plane."""
    token = str(system.home / "plane" / "admin.token")
    return Person("runner-control", "--url", f"http://127.0.0.1:{system.port}", "--token-file", token, *argv)


async def test_a_person_is_in_it_whatever_dies_and_types_everything_once(system: Stand) -> None:
    """Opened, and killed under: the control plane, then the daemon; typed into meanwhile; left, come back to, and over."""
    somebody = person(
        system, "pty", "open", RUNNER, "--cwd", str(system.home), "-e", "PS1=> ", "--", "bash", "--norc", "-i"
    )
    try:
        await asyncio.to_thread(somebody.sees, "> ")
        somebody.types(b"stty size\r")
        await asyncio.to_thread(somebody.sees, "30 90")
        os.kill(system.pid("plane"), signal.SIGKILL)
        somebody.types(b"echo one-$((40")
        await asyncio.to_thread(somebody.sees, "cannot be reached")
        somebody.types(b"+2))\r")
        await system.start_plane()
        await asyncio.to_thread(somebody.sees, "one-42")
        os.kill(system.pid("daemon"), signal.SIGKILL)
        somebody.types(b"echo two-$((40")
        await asyncio.to_thread(somebody.sees, "its machine cannot be reached")
        somebody.types(b"+3))\r")
        await system.start_daemon()
        await asyncio.to_thread(somebody.sees, "two-43")
        somebody.types(b"~.")
        assert await asyncio.to_thread(somebody.status) == 0
        pty = (await system.get("/ptys"))["ptys"][0]["id"]
        for mode in ("snapshot", "replay"):
            again = person(system, "attach", pty, "--mode", mode)
            await asyncio.to_thread(again.sees, "two-43")
            again.types(b"~." if mode == "snapshot" else b"exit 9\r")
            assert await asyncio.to_thread(again.status) == (0 if mode == "snapshot" else 9)
            again.close()
        late = person(system, "attach", pty)
        await asyncio.to_thread(late.sees, "two-43")
        assert await asyncio.to_thread(late.status) == 9
        late.close()
        nobody = person(system, "attach", "ex_none")
        assert await asyncio.to_thread(nobody.status) == 1
        assert b"UNKNOWN_EXECUTION" in nobody.shown and b"\x1b[!p" not in nobody.shown
        nobody.close()
    finally:
        somebody.close()
