"""The session kept with a plane: how often it was dialled, dialled anew after a sleep, and one identity in two places."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection

from protocol.errors import CloseCode, Reason
from protocol.handshake import Standing
from protocol.identity import HelloClaims
from protocol.keyset import open_keyset
from protocol.messages import Bye, Hello, ReportItem, encode
from protocol.replay import Mark
from runner.adapters.inlet import Inlet
from runner.adapters.system import SystemClock
from runner.adapters.typist import Typist
from runner.adapters.uplink import Uplink
from runner.core.inputs import Input, SessionDown, SessionUp
from runner.link import TWO_MACHINES, Link
from tests.support.builders import POLICY_DIGEST, RUNNER, a_certificate, a_key
from tests.support.hostile_plane import HostilePlane, welcome

WAIT_S = 20.0
CLOCK = SystemClock()
INSTANCE = "A" * 22


class EmptyJournal:
    """Nothing to report."""

    async def oldest_unanswered(self) -> int | None:
        """None is."""
        return None

    async def outbox(self, _above: int, _limit: int) -> list[ReportItem]:
        """No items."""
        return []

    async def items(self, _out_seqs: Any) -> list[ReportItem]:
        """No items."""
        return []


class Inputs:
    """A pump that only remembers."""

    def __init__(self) -> None:
        self.put_: list[Input] = []

    def put(self, happened: Input) -> None:
        """Remember it."""
        self.put_.append(happened)

    async def room(self) -> None:
        """There always is."""

    def count(self, kind: type[Input]) -> int:
        """How often."""
        return sum(isinstance(happened, kind) for happened in self.put_)


@dataclass
class Dialled:
    """A link that runs, what it put, and what it noted."""

    link: Link
    inputs: Inputs = field(default_factory=Inputs)
    notes: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    async def until(self, holds: Callable[[], object], what: str) -> None:
        """Wait for a fact."""
        async with asyncio.timeout(WAIT_S):
            while not holds():
                await asyncio.sleep(0.01)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The fields of all of that name."""
        return [fields for event, fields in self.notes if event == name]


@asynccontextmanager
async def linked(plane: HostilePlane, port: int | None = None) -> AsyncIterator[Dialled]:
    """A link to `plane`, or to whoever has `port`."""
    keyset = open_keyset(plane.keyset().encode(), plane.root)

    def standing() -> Standing:
        return Standing(
            key=a_key("runner"),
            certificate=a_certificate(),
            root=plane.root,
            keyset=keyset,
            ctl=Mark(),
            out_head=0,
            boot_id=CLOCK.boot_id,
            policy_digest=POLICY_DIGEST,
            version="0.1.0",
            platform="linux",
            instance=INSTANCE,
        )

    quiet: Any = lambda *_: None  # noqa: E731 - four listeners that nobody needs
    uplink = Uplink(wake=quiet, arm=quiet, trim=quiet, failed=quiet)
    notes: list[tuple[str, dict[str, Any]]] = []
    journal: Any = EmptyJournal()
    link = Link(
        inlet=Inlet(Path("/nowhere"), feed=lambda *_: False, say=lambda _fed: None),
        typist=Typist(Path("/nowhere"), quiet, quiet),
        url=f"ws://127.0.0.1:{port or plane.port}/",
        proxy=None,
        standing=standing,
        journal=journal,
        clock=CLOCK,
        uplink=uplink,
        note=lambda event, fields: notes.append((event, fields)),
    )
    dialled = Dialled(link, notes=notes)
    pump: Any = dialled.inputs
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(link.run(pump))
        try:
            yield dialled
        finally:
            running.cancel()


def a_plane(**over: Any) -> HostilePlane:
    """One that knows the runner already."""
    return HostilePlane(runner=RUNNER, _x=a_key("runner").public.x, **over)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that would not dial again by itself before the test is over."""
    monkeypatch.setattr("runner.core.backoff.FIRST_MS", 600_000)
    monkeypatch.setattr("runner.core.backoff.CAP_MS", 600_000)
    monkeypatch.setattr("runner.link.CAP_MS", 600_000)
    monkeypatch.setattr("runner.adapters.websocket.OPEN_TIMEOUT_S", 600.0)


# --- dials ------------------------------------------------------------------------------------------------------


async def test_each_handshake_is_counted_and_the_instance_stays() -> None:
    """By this the plane tells a daemon that reconnects from a copy of it."""
    claims: list[tuple[str, str, int]] = []

    async def remember(plane: HostilePlane, socket: ServerConnection, hello: Hello, told: HelloClaims) -> bool:
        claims.append((told.purpose, told.instance, told.dial))
        return await welcome(plane, socket, hello, told)

    async with a_plane(greet=remember) as plane, linked(plane) as dialled:
        for number in (1, 2, 3):
            await plane.online(number - 1)
            dialled.link.redial()
    assert claims[:3] == [("session", INSTANCE, 1), ("session", INSTANCE, 2), ("session", INSTANCE, 3)]


@pytest.mark.usefixtures("patient")
async def test_after_a_sleep_a_session_is_dropped_and_dialled_anew_at_once() -> None:
    """Whoever is at the other end is not asked, and no delay is waited for."""
    async with a_plane() as plane, linked(plane) as dialled:
        await dialled.until(lambda: dialled.inputs.count(SessionUp) == 1, "a session")
        dialled.link.redial()
        await dialled.until(lambda: dialled.inputs.count(SessionUp) == 2, "the next session")
        assert dialled.inputs.count(SessionDown) == 1


@pytest.mark.usefixtures("patient")
async def test_after_a_sleep_a_delay_is_not_waited_for() -> None:
    """The network may be back; the first of the short delays comes after this try."""
    plane = a_plane()
    async with plane:
        port = plane.port
    async with linked(plane, port) as dialled:
        await dialled.until(lambda: dialled.link.status.reason.startswith("cannot connect"), "a failed dial")
        plane.port = port
        async with plane:
            dialled.link.redial()
            await dialled.until(lambda: dialled.link.status.up, "a session")


@pytest.mark.usefixtures("patient")
async def test_after_a_sleep_a_dial_that_nobody_answers_is_begun_anew() -> None:
    """Its packets went into a network that is not there any more."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.setblocking(False)
        async with linked(a_plane(), silent.getsockname()[1]) as dialled:
            first = await accepted(silent)
            dialled.link.redial()
            second = await accepted(silent)
            assert first.fileno() != second.fileno()
            first.close()
            second.close()


async def accepted(server: socket.socket) -> socket.socket:
    """The next connection."""
    async with asyncio.timeout(WAIT_S):
        peer, _address = await asyncio.get_running_loop().sock_accept(server)
    return peer


# --- two machines -----------------------------------------------------------------------------------------------


async def close_as_conflict(
    _plane: HostilePlane, socket: ServerConnection, _hello: Hello, _claims: HelloClaims
) -> bool:
    """As the gateway does: a word, and the code."""
    await socket.send(encode(Bye(reason=Reason.IDENTITY_CONFLICT, detail="laptop-2 has this runner's key, too")))
    await socket.close(CloseCode.IDENTITY_CONFLICT, Reason.IDENTITY_CONFLICT)
    return False


async def close_by_code(_plane: HostilePlane, socket: ServerConnection, _hello: Hello, _claims: HelloClaims) -> bool:
    """The code alone, as a proxy may leave it."""
    await socket.close(CloseCode.IDENTITY_CONFLICT, Reason.IDENTITY_CONFLICT)
    return False


async def close_in_session(plane: HostilePlane, socket: ServerConnection, hello: Hello, claims: HelloClaims) -> bool:
    """The other machine came later."""
    await welcome(plane, socket, hello, claims)
    await socket.send(encode(Bye(reason=Reason.IDENTITY_CONFLICT)))
    await socket.wait_closed()
    return False


@pytest.mark.parametrize("refuse", [close_as_conflict, close_by_code, close_in_session])
@pytest.mark.usefixtures("patient")
async def test_one_identity_on_two_machines_is_said_in_words_raised_and_asked_about_again(
    monkeypatch: pytest.MonkeyPatch, refuse: Callable[..., Awaitable[bool]]
) -> None:
    """It never stays silently down: the status says what to do, and when the plane takes us back we are there.

    Every try comes after the longest delay, here the shortest: what has to be mended by people is not hurried by us.
    """
    monkeypatch.setattr("runner.link.CAP_MS", 20)
    async with a_plane(greet=refuse) as plane, linked(plane) as dialled:
        await dialled.until(lambda: dialled.link.status.reason.endswith(TWO_MACHINES), "the words")
        await dialled.until(lambda: len(plane.closings) >= 3, "it to ask again")
        assert "runner enroll --replace" in dialled.link.status.reason
        plane.greet = welcome
        await plane.online()
        await dialled.until(lambda: dialled.link.status.up, "the status")
        assert dialled.link.status.reason == ""
    alarms = dialled.events("alarm.raised")
    if refuse is close_in_session:
        assert {one["reason"] for one in alarms} == {Reason.IDENTITY_CONFLICT}
    else:
        assert [one["reason"] for one in alarms] == [Reason.IDENTITY_CONFLICT], "raised once, not at every try"
