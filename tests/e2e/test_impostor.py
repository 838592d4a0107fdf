"""A control plane that cannot prove itself, to a real daemon: whatever it says instead of a welcome, it is left."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from websockets.asyncio.server import ServerConnection

from protocol.errors import Reason
from protocol.identity import HelloClaims
from protocol.ids import Digest
from protocol.keyset import Role
from protocol.messages import Hello, Welcome, encode
from protocol.replay import Mark
from tests.support.builders import DAY_MS, a_key, a_nonce
from tests.support.hostile_plane import Greet, HostilePlane, now_ms, welcome
from tests.support.siege import Siege, siege

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system() -> AsyncIterator[Siege]:
    """One daemon for all."""
    async with siege() as besieged:
        yield besieged


def welcoming(**over: Any) -> Greet:
    """A welcome in a good form: `over` are its fields, functions of the plane and what the runner claims."""

    async def greet(plane: HostilePlane, socket: ServerConnection, _hello: Hello, claims: HelloClaims) -> bool:
        wanted = {name: make(plane, claims) for name, make in over.items()}
        said = plane.welcome_for(wanted.pop("claims", claims), **{"ctl": mark_of(claims), **wanted.pop("welcome", {})})
        await socket.send(encode(Welcome(env=wanted.pop("env", said), **wanted)))
        return False

    return greet


def mark_of(claims: HelloClaims) -> Mark:
    """The runner's own."""
    return Mark(claims.ctl.hw, Digest(claims.ctl.head))


def other(claims: HelloClaims, **over: Any) -> HelloClaims:
    """What another runner, or this one in another handshake, would have claimed."""
    return claims.model_copy(update=over)


IMPOSTORS: dict[str, Greet] = {
    "signed by a stranger": welcoming(welcome=lambda _p, _c: {"key": a_key("stranger")}),
    "signed by a key for enrolling": welcoming(welcome=lambda _p, _c: {"key": a_key(Role.ENROL)}),
    "signed before the key was valid": welcoming(welcome=lambda _p, _c: {"at_ms": now_ms() - DAY_MS}),
    "signed after the keyset expired": welcoming(welcome=lambda _p, _c: {"at_ms": now_ms() + 2 * DAY_MS}),
    "for another handshake of the runner": welcoming(claims=lambda _p, c: other(c, nonce_runner=a_nonce("old"))),
    "for another handshake of the plane": welcoming(claims=lambda _p, c: other(c, nonce_plane=a_nonce("old"))),
    "for another runner": welcoming(claims=lambda _p, c: other(c, runner="rnr_2")),
    "for another incarnation": welcoming(claims=lambda _p, c: other(c, inc=2)),
    "from another mark": welcoming(welcome=lambda _p, c: {"ctl": Mark(c.ctl.hw + 1, Digest(c.ctl.head))}),
    "from the beginning again": welcoming(welcome=lambda _p, _c: {"ctl": Mark()}),
    "with the keyset of another root": welcoming(keyset=lambda p, _c: p.keyset(2, key=a_key("stranger"))),
    "with another keyset of the same version": welcoming(keyset=lambda p, _c: p.keyset(1, min_v=1)),
    "with the keyset of another organisation": welcoming(keyset=lambda p, _c: p.keyset(2, org="org_2")),
    "with a certificate that nobody signed": welcoming(certificate=lambda _p, _c: "{}"),
    "not signed at all": welcoming(env=lambda _p, _c: "{}"),
}


@pytest.mark.parametrize("name", IMPOSTORS)
async def test_a_plane_that_cannot_prove_itself_is_left(system: Siege, name: str) -> None:
    """4401 and BAD_PROOF; nothing it says is heard, and the true plane is welcome a moment later."""
    plane, stand = system.plane, system.stand
    sessions, before = plane.sessions, stand.effects()
    plane.greet = IMPOSTORS[name]
    try:
        closing = await plane.closing(plane.hang_up)
        closing = await plane.closing(nothing)
    finally:
        plane.greet = welcome
    assert (closing.code, closing.reason) == (4401, Reason.BAD_PROOF)
    await plane.online(sessions)
    assert stand.effects() == before and '"reason":"BAD_PROOF' in stand.daemon_log()
    await system.lives()


async def nothing() -> None:
    """The runner dials by itself."""
