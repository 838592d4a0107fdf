"""Enrolment: one exchange with a control plane that makes this machine one of its runners.

Trust comes with the join string alone: it pins the root. What the plane answers is checked from there downwards, and written
only when all of it fits. The token is a secret: it is sealed into the envelope and appears in no message, error or log.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from pydantic import ValidationError
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.typing import Subprotocol

from protocol.envelope import PayloadType, Verified, seal
from protocol.errors import CloseCode, EnvelopeError, Reason, RemoteError
from protocol.handshake import open_certificate
from protocol.identity import Certificate, EnrollClaims, JoinString
from protocol.keys import PrivateKey
from protocol.keyset import open_keyset
from protocol.limits import FRAME_BYTES_MAX, HANDSHAKE_TIMEOUT_MS
from protocol.messages import SUBPROTOCOL, Bye, Enroll, Enrolled, FromPlane, decode_from_plane, encode
from protocol.secretbox import recipient_of
from protocol.wire import first_error
from runner.adapters.keystore import Keystore
from runner.errors import Broken, ConfigError, Refused

OPEN_TIMEOUT_S: Final = 10.0
"""TCP, TLS and the WebSocket's own handshake."""
ANSWER_TIMEOUT_S: Final = HANDSHAKE_TIMEOUT_MS / 1000
CLOSE_TIMEOUT_S: Final = 2.0
"""The exchange is over by then; nothing is lost with an impolite end."""

_SENTENCES: Final[Mapping[Reason, str]] = MappingProxyType(
    {
        Reason.BAD_JOIN_TOKEN: "the join token is unknown, used or expired: ask for a new join string",
        Reason.UNSUPPORTED_VERSION: "the control plane speaks no version in common with this runner",
        Reason.BAD_PROOF: "the control plane did not accept the proof of possession of our key",
        Reason.GOING_AWAY: "the control plane is shutting down: try again",
        Reason.RATE_LIMITED: "too many enrolments at once: try again later",
    }
)
_REASON_OF_CLOSE: Final[Mapping[int, Reason]] = MappingProxyType(
    {
        CloseCode.GOING_AWAY: Reason.GOING_AWAY,
        CloseCode.TOO_BIG: Reason.BAD_FRAME,
        CloseCode.BAD_FRAME: Reason.BAD_FRAME,
        CloseCode.BAD_PROOF: Reason.BAD_PROOF,
        CloseCode.UNSUPPORTED_VERSION: Reason.UNSUPPORTED_VERSION,
        CloseCode.UNKNOWN_RUNNER: Reason.BAD_JOIN_TOKEN,
    }
)


class PlaneUnreachable(Broken):
    """Nobody answered at the address of the join string, or not as a control plane does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """What a runner tells of its machine at enrolment."""

    boot_id: str
    hostname: str
    platform: str
    version: str


async def enroll(
    join: JoinString,
    keystore: Keystore,
    *,
    name: str,
    labels: Mapping[str, str],
    facts: MachineFacts,
    proxy: str | None,
) -> Certificate:
    """Enrol this machine under `name` and persist what came of it.

    Args:
        join: address, token and fingerprint of the root.
        keystore: where the keys are, or will be made; a second try uses the same keys.
        name: how people call this runner; an id.
        labels: free text by key, for the plane's choice of a runner.
        facts: of this machine.
        proxy: URL to dial through; None dials directly, whatever the environment says.

    Raises:
        Refused: the plane said no: `reason` and a sentence for a person.
        PlaneUnreachable: no answer in time, or the connection was lost.
        Broken: the plane cannot prove that it is the one of the join string. Nothing was written but the keys.
        ConfigError: the name, the labels or the key files are not what they must be.
    """
    claims_of = _claims(join, name, labels, facts)
    key, seal_seed = keystore.create_keys()
    claims = claims_of.model_copy(update={"x": key.public.x, "seal_x": recipient_of(seal_seed)})
    said = await _exchange(join, Enroll(env=seal(claims.dump(), PayloadType.ENROLL, [key]).decode()), proxy)
    certificate = _believe(said, join, claims, key)
    keystore.keep_enrolment(said.root, said.keyset.encode(), said.certificate.encode(), join.url)
    return certificate.value


def _claims(join: JoinString, name: str, labels: Mapping[str, str], facts: MachineFacts) -> EnrollClaims:
    """What will be signed; the keys are filled in once they are made, so that a wrong name makes none."""
    try:
        return EnrollClaims(
            token=join.token,
            name=name,
            x="0" * 43,
            seal_x="0" * 43,
            boot_id=facts.boot_id,
            hostname=facts.hostname,
            platform=facts.platform,
            version=facts.version,
            labels=dict(labels),
        )
    except ValidationError as exc:
        raise ConfigError("enrolment", "", first_error(exc)) from None


async def _exchange(join: JoinString, message: Enroll, proxy: str | None) -> Enrolled:
    try:
        async with connect(
            join.url,
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            compression=None,
            max_size=FRAME_BYTES_MAX,
            proxy=proxy,
            open_timeout=OPEN_TIMEOUT_S,
            close_timeout=CLOSE_TIMEOUT_S,
            ping_interval=None,
            user_agent_header=None,
        ) as connection:
            if connection.subprotocol != SUBPROTOCOL:
                raise PlaneUnreachable(Reason.UNSUPPORTED_VERSION, f"{_place(join)} is no control plane of ours")
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return await _ask(connection, message)
    except ConnectionClosed as exc:
        code = exc.rcvd.code if exc.rcvd is not None else CloseCode.NORMAL
        if code in _REASON_OF_CLOSE:
            raise _no(_REASON_OF_CLOSE[code]) from exc
        raise PlaneUnreachable(Reason.INFRA, f"{_place(join)} closed the connection without an answer") from exc
    except TimeoutError as exc:
        raise PlaneUnreachable(Reason.INFRA, f"{_place(join)} did not answer in time") from exc
    except (OSError, WebSocketException) as exc:
        raise PlaneUnreachable(Reason.INFRA, f"{_place(join)} cannot be reached ({type(exc).__name__})") from exc


async def _ask(connection: ClientConnection, message: Enroll) -> Enrolled:
    await connection.send(encode(message))
    answer = _decoded(await connection.recv())
    if isinstance(answer, Bye):
        raise _no(answer.reason)
    if not isinstance(answer, Enrolled):
        raise Broken(Reason.UNEXPECTED_MESSAGE, "the control plane answered an enrolment with something else")
    return answer


def _decoded(frame: str | bytes) -> FromPlane:
    if isinstance(frame, bytes):
        raise Broken(Reason.BAD_FRAME, "the control plane answered an enrolment with data")
    try:
        return decode_from_plane(frame)
    except RemoteError as exc:
        raise Broken(exc.reason, f"the control plane's answer cannot be read: {exc.detail}") from exc


def _believe(said: Enrolled, join: JoinString, claims: EnrollClaims, key: PrivateKey) -> Verified[Certificate]:
    """Steps: 1 root by its fingerprint, 2 keyset under the root, 3 certificate under the keyset, 4 it is ours."""
    if said.root.fingerprint != join.root:
        raise _unproven("its root is not the one of the join string: this may be another control plane")
    try:
        keyset = open_keyset(said.keyset.encode(), said.root)
        certificate = open_certificate(said.certificate.encode(), keyset.value)
    except EnvelopeError as exc:
        raise _unproven(f"its keyset or our certificate does not open ({exc.reason})") from exc
    mine = certificate.value
    if (mine.x, mine.seal_x, mine.name) != (key.public.x, claims.seal_x, claims.name):
        raise _unproven("the certificate is not for our keys and name")
    if mine.org != keyset.value.org:
        raise _unproven("certificate and keyset are of different organisations")
    return certificate


def _no(reason: Reason) -> Refused:
    return Refused(reason, _SENTENCES.get(reason, "the control plane refused the enrolment"))


def _unproven(detail: str) -> Broken:
    return Broken(Reason.BAD_PROOF, f"the control plane cannot prove itself: {detail}")


def _place(join: JoinString) -> str:
    return f"{join.host}:{join.port}"
