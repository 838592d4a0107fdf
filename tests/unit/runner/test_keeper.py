"""Leases renewed beside the event loop: when, by whom asked, what shims and the loop are told, and when it gives up."""

import asyncio
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection

from protocol.errors import Reason
from protocol.handshake import Standing
from protocol.identity import HelloClaims
from protocol.keyset import open_keyset
from protocol.lease import Lease
from protocol.limits import BEAT_INTERVAL_MS_MIN
from protocol.messages import Beat, Beaten, Bye, FromRunner, HeldLease, Hello, Renewal, Welcome, encode
from protocol.replay import Mark
from protocol.session import BeatAnswered
from runner.adapters.keeper import LEAD_MS, PATIENCE_MS, Keeper, _Kept
from runner.adapters.system import SystemClock
from runner.core.inputs import Now
from runner.core.plans import LeaseAction
from runner.shim import wire
from tests.support.builders import POLICY_DIGEST, RUNNER, a_certificate, a_key, a_lease, an_attempt
from tests.support.hostile_plane import HostilePlane, now_ms, welcome

EX = an_attempt()
WAIT_S = 20.0
TTL_MS = 60_000
CLOCK = SystemClock()


def boot_ms() -> int:
    """CLOCK_BOOTTIME."""
    return CLOCK.now().boot_ms


@dataclass
class RenewingPlane(HostilePlane):
    """Answers beats with renewals of `ttl_ms`, or refuses them."""

    ttl_ms: int | None = TTL_MS
    purposes: list[str] = field(default_factory=list)
    runner: str = RUNNER
    _x: str = field(default_factory=lambda: a_key("runner").public.x)

    async def __aenter__(self) -> "RenewingPlane":
        await self.listen()
        return self

    async def _renew(self, socket: ServerConnection, claims: HelloClaims) -> None:
        self.purposes.append(claims.purpose)
        hello = Hello(org=claims.org, runner=claims.runner, nonce=claims.nonce_runner, purpose=claims.purpose)
        if await self.greet(self, socket, hello, claims):
            await self._hold(socket)

    async def _hear(self, socket: ServerConnection, message: FromRunner) -> None:
        self.heard.append(message)
        assert isinstance(message, Beat), "a connection for renewals carries beats"
        reason = None if self.ttl_ms is not None else Reason.FENCED
        leases = [Renewal(res=one.res, token=one.token, ttl_ms=self.ttl_ms, reason=reason) for one in message.leases]
        beaten = Beaten(n=message.n, now_ms=now_ms(), beat_ms=BEAT_INTERVAL_MS_MIN, leases=leases)
        await socket.send(encode(beaten))

    @property
    def beats(self) -> list[Beat]:
        """All that came."""
        return [message for message in self.heard if isinstance(message, Beat)]


class Loop:
    """What the event loop would have heard, and what was logged."""

    def __init__(self) -> None:
        self.answers: list[tuple[BeatAnswered, Now]] = []
        self.notes: list[str] = []
        self.asked_in: set[int] = set()

    async def until(self, holds: Callable[[], object], what: str) -> None:
        """Wait for a fact."""
        ends = time.monotonic() + WAIT_S
        while not holds():
            assert time.monotonic() < ends, f"waited in vain for {what}"
            await asyncio.sleep(0.01)


@asynccontextmanager
async def kept(tmp_path: Path, plane: RenewingPlane) -> AsyncIterator[tuple[Keeper, Loop]]:
    """A keeper that would dial `plane`."""
    loop = Loop()
    keyset = open_keyset(plane.keyset().encode(), plane.root)

    def standing() -> Standing:
        loop.asked_in.add(threading.get_ident())
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
            instance="A" * 22,
        )

    keeper = Keeper(
        url=f"ws://127.0.0.1:{plane.port}/",
        proxy=None,
        state_dir=tmp_path,
        standing=standing,
        clock=CLOCK,
        answered=lambda answered, got: loop.answers.append((answered, got)),
        note=lambda event, _fields: loop.notes.append(event),
    )
    keeper.start()
    try:
        yield keeper, loop
    finally:
        keeper.close()


class Shim:
    """The socket of a shim, which hears a RENEW."""

    def __init__(self, tmp_path: Path) -> None:
        directory = tmp_path / "x" / EX.name
        directory.mkdir(parents=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        fd = os.open(directory, os.O_RDONLY)
        self._socket.bind(f"/proc/self/fd/{fd}/s")
        os.close(fd)
        self._socket.listen()
        self._socket.settimeout(WAIT_S)

    def heard(self) -> tuple[int, tuple[int, int, int, int | None]]:
        """The next frame: its type, and the lease in it."""
        peer, _address = self._socket.accept()
        with peer:
            inbox = bytearray()
            while (frame := wire.take(inbox)) is None:
                data = peer.recv(4096)
                assert data, "it left before it had spoken"
                inbox += data
        return frame[0], wire.unpack_lease(frame[1])

    def close(self) -> None:
        """Nobody listens any more."""
        self._socket.close()


def starved(**over: Any) -> Lease:
    """A lease that no healthy loop lets come so near to its loss."""
    return a_lease(**({"deadline_ms": boot_ms() + 20_000} | over))


# --- when -------------------------------------------------------------------------------------------------------


def test_it_begins_after_every_renewal_of_a_healthy_loop_and_before_the_shim_does() -> None:
    """With half of the ttl left, or sooner where the stop at the loss takes long."""
    for grace_ms, left_ms in ((0, 30_000), (10_000, 30_000), (20_000, 35_000), (60_000, 75_000)):
        lease = a_lease(deadline_ms=1_000_000)
        due_ms = _Kept(lease, LeaseAction.STOP, grace_ms).due_ms
        expected = max(lease.deadline_ms - left_ms, lease.renew_at_ms + PATIENCE_MS)
        assert due_ms == expected
        assert due_ms > lease.renew_at_ms
        if grace_ms <= lease.ttl_ms // 3:
            assert due_ms <= lease.loss_begins_ms(grace_ms) - LEAD_MS


async def test_while_the_loop_renews_nobody_is_dialled_and_without_leases_nothing_wakes(tmp_path: Path) -> None:
    """A lease with time left is waited for; when the last is dropped, nothing is."""
    async with RenewingPlane() as plane, kept(tmp_path, plane) as (keeper, loop):
        keeper.hold(EX, a_lease(deadline_ms=boot_ms() + TTL_MS), LeaseAction.STOP, 0)
        await loop.until(lambda: keeper._waits_for_ms is not None, "the thread to wait for it")
        first = keeper._waits_for_ms
        keeper.hold(EX, a_lease(deadline_ms=boot_ms() + 2 * TTL_MS), LeaseAction.STOP, 0)
        assert keeper._waits_for_ms == first, "a later deadline wakes nobody"
        keeper.drop(EX)
        with keeper._changed:
            keeper._changed.notify()
        await loop.until(lambda: keeper._waits_for_ms is None, "the thread to wait for nothing")
        assert plane.sessions == 0 and not loop.asked_in


# --- what -------------------------------------------------------------------------------------------------------


async def test_a_starved_lease_is_renewed_beside_the_session(tmp_path: Path) -> None:
    """Under another purpose; the shim hears the new deadline from us, and the loop the answer with the moment it came."""
    shim = Shim(tmp_path)
    async with RenewingPlane() as plane, kept(tmp_path, plane) as (keeper, loop):
        before = boot_ms()
        keeper.hold(EX, starved(), LeaseAction.STOP, 7_000)
        kind, (token, deadline_ms, action, grace_ms) = await asyncio.to_thread(shim.heard)
        await loop.until(lambda: loop.answers, "the answer")
        (answered, got) = loop.answers[0]
        assert (kind, token, action, grace_ms) == (wire.RENEW, 1, 2, 7_000)
        assert before + TTL_MS <= deadline_ms == answered.sent_ms + TTL_MS <= boot_ms() + TTL_MS
        assert answered.sent_ms <= got.boot_ms <= boot_ms()
        assert plane.purposes == ["renew"]
        assert plane.beats == [Beat(n=1, hw=0, leases=[HeldLease(res="exec:ex_1", token=1)])]
        assert loop.notes == ["lease.kept"] and loop.asked_in == {keeper._thread.ident}
    shim.close()


async def test_a_renewed_lease_is_left_in_peace(tmp_path: Path) -> None:
    """It is due again when it is starved again, and not before."""
    async with RenewingPlane() as plane, kept(tmp_path, plane) as (keeper, loop):
        keeper.hold(EX, starved(), LeaseAction.STOP, 0)
        await loop.until(lambda: loop.answers, "the answer")
        deadline_ms = loop.answers[0][0].sent_ms + TTL_MS
        await loop.until(lambda: (keeper._waits_for_ms or 0) > boot_ms(), "the thread to wait")
        assert keeper._kept[EX].lease.deadline_ms == deadline_ms
        assert len(plane.beats) == 1


async def test_what_the_loop_said_meanwhile_counts(tmp_path: Path) -> None:
    """An attempt that was dropped, or has another lease, is not touched by an answer that was on its way."""
    async with RenewingPlane() as plane, kept(tmp_path, plane) as (keeper, loop):
        other = an_attempt("ex_2")
        newer = a_lease(res="exec:ex_2", token=5, deadline_ms=boot_ms() + 600_000, ttl_ms=600_000)

        async def meddle(plane: HostilePlane, socket: ServerConnection, hello: Hello, claims: HelloClaims) -> bool:
            keeper.drop(EX)
            keeper.hold(other, newer, LeaseAction.STOP, 0)
            return await welcome(plane, socket, hello, claims)

        plane.greet = meddle
        with keeper._changed:
            keeper._kept[EX] = _Kept(starved(), LeaseAction.STOP, 0)
            keeper._kept[other] = _Kept(starved(res="exec:ex_2"), LeaseAction.STOP, 0)
            keeper._changed.notify()
        await loop.until(lambda: loop.answers, "the answer")
        assert {name: one.lease for name, one in keeper._kept.items()} == {other: newer}


async def test_a_loop_that_comes_late_to_a_renewal_takes_the_next_from_nobody(tmp_path: Path) -> None:
    """What it pushes then is what the shim was told last; another token is another lease."""
    async with RenewingPlane() as plane, kept(tmp_path, plane) as (keeper, loop):
        early = starved()
        assert keeper.hold(EX, early, LeaseAction.STOP, 0) == early.deadline_ms
        await loop.until(lambda: loop.answers, "the answer")
        deadline_ms = loop.answers[0][0].sent_ms + TTL_MS
        late = a_lease(deadline_ms=deadline_ms - 1)
        assert keeper.hold(EX, late, LeaseAction.STOP, 0) == deadline_ms
        assert keeper.hold(EX, a_lease(deadline_ms=deadline_ms + 9), LeaseAction.STOP, 0) == deadline_ms + 9
        assert keeper.hold(EX, a_lease(token=2, deadline_ms=deadline_ms), LeaseAction.STOP, 0) == deadline_ms


async def test_a_refused_lease_is_not_asked_for_again(tmp_path: Path) -> None:
    """The loop hears of the refusal, and will say what it makes of it."""
    async with RenewingPlane(ttl_ms=None) as plane, kept(tmp_path, plane) as (keeper, loop):
        keeper.hold(EX, starved(), LeaseAction.STOP, 0)
        await loop.until(lambda: loop.answers, "the answer")
        assert loop.answers[0][0].leases[0].ttl_ms is None
        await loop.until(lambda: keeper._waits_for_ms is None, "the thread to wait for nothing")
        assert len(plane.beats) == 1


# --- in vain ----------------------------------------------------------------------------------------------------


async def test_it_is_tried_until_the_lease_is_over_and_complained_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody listens there; when the lease is over there is nothing to renew."""
    monkeypatch.setattr("runner.adapters.keeper.RETRY_MS", 50)
    plane = RenewingPlane()
    async with plane:
        pass
    async with kept(tmp_path, plane) as (keeper, loop):
        keeper.hold(EX, starved(deadline_ms=boot_ms() + 500), LeaseAction.STOP, 0)
        await loop.until(lambda: not keeper._kept and keeper._waits_for_ms is None, "the end of the lease")
        assert loop.notes == ["lease.neglected"] and not loop.answers


@pytest.mark.parametrize("how", ["bye", "impostor", "silence"])
async def test_a_plane_that_does_not_answer_well_costs_one_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The next one may be better: the lease is kept, and renewed as soon as it can be."""
    monkeypatch.setattr("runner.adapters.keeper.RETRY_MS", 50)
    monkeypatch.setattr("runner.adapters.keeper.EXCHANGE_S", 1.0)
    tries: list[str] = []

    async def greet(plane: HostilePlane, socket: ServerConnection, hello: Hello, claims: HelloClaims) -> bool:
        tries.append(how)
        if len(tries) > 1:
            return await welcome(plane, socket, hello, claims)
        if how == "bye":
            await socket.send(encode(Bye(reason=Reason.GOING_AWAY, detail="there is no session to renew for")))
        elif how == "impostor":
            forged = plane.welcome_for(claims, ctl=Mark(), key=a_key("stranger"))
            await socket.send(encode(Welcome(env=forged)))
        await socket.wait_closed()
        return False

    async with RenewingPlane(greet=greet) as plane, kept(tmp_path, plane) as (keeper, loop):
        keeper.hold(EX, starved(), LeaseAction.STOP, 0)
        await loop.until(lambda: loop.answers, "the answer")
        assert len(tries) == 2 and loop.notes == ["lease.neglected", "lease.kept"]
