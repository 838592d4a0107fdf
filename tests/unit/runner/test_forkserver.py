"""The fork server as the daemon uses it: many requests at once, and its death in between."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from runner.adapters.forkserver import REQUESTS_MAX, ForkServer

CROWD = 64
"""As many attempts as a control plane may start at once."""
WAIT_S = 20.0
LOST: list[str] = []
"""Why servers had to be replaced."""


@pytest.fixture
async def server() -> AsyncIterator[ForkServer]:
    """A running fork server."""
    made = ForkServer(LOST.append)
    LOST.clear()
    made.start()
    yield made
    made.close()


async def ask(server: ForkServer, home: Path, name: str) -> bytes:
    """Have a shim forked in a directory without a spec, and return the first that it says."""
    directory = home / name
    directory.mkdir()
    dirfd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    ours, theirs = socket.socketpair()
    try:
        await server.fork(dirfd, theirs.fileno())
    finally:
        theirs.close()
        os.close(dirfd)
    ours.setblocking(False)
    try:
        return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(ours, 64), WAIT_S)
    finally:
        ours.close()


async def test_a_crowd_of_requests_is_answered_by_one_server(server: ForkServer, tmp_path: Path) -> None:
    """Every shim comes to life, and the server that forked the first forked the last: no request was taken for lost."""
    before = server.pid
    words = await asyncio.gather(*(ask(server, tmp_path, str(number)) for number in range(CROWD)))
    assert all(words)
    assert (server.pid, LOST) == (before, [])


async def test_a_server_that_dies_is_replaced_and_no_request_is_lost(server: ForkServer, tmp_path: Path) -> None:
    """The request that meets the dead server is served the slow way; the next one finds a new server."""
    before = server.pid
    assert before is not None
    os.kill(before, signal.SIGKILL)
    assert await ask(server, tmp_path, "orphan")
    assert server.pid not in (None, before)
    assert LOST
    assert await ask(server, tmp_path, "next")


async def test_requests_that_fail_together_start_one_server(server: ForkServer, tmp_path: Path) -> None:
    """All of them are served, and the one that comes after the first leaves the new server alone."""
    before = server.pid
    assert before is not None
    started = []
    start = server.start

    def counting() -> None:
        start()
        started.append(server.pid)

    server.start = counting  # type: ignore[method-assign]
    os.kill(before, signal.SIGSTOP)
    asked = [asyncio.ensure_future(ask(server, tmp_path, str(number))) for number in range(REQUESTS_MAX)]
    while len(server._replies) < REQUESTS_MAX:
        await asyncio.sleep(0)
    os.kill(before, signal.SIGKILL)
    assert all(await asyncio.gather(*asked))
    assert started == [server.pid]
