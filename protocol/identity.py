"""The signed statements of enrolment and handshake, and the join string that starts it all."""

import re
from typing import Annotated, Final, NamedTuple

from pydantic import Field

from protocol.keys import b64url, b64url_decode
from protocol.limits import (
    BEAT_INTERVAL_MS_MAX,
    BEAT_INTERVAL_MS_MIN,
    LABELS_MAX,
)
from protocol.messages import Nonce, Purpose
from protocol.wire import Count, DigestText, FormatOne, Id, Millis, Open, Positive

KeyText = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{43}$")]
ShortText = Annotated[str, Field(max_length=200)]
Labels = Annotated[dict[str, ShortText], Field(max_length=LABELS_MAX)]


class StreamMark(Open):
    """How far a stream is: its high-water mark and the payload digest there."""

    hw: Count
    head: DigestText


class HelloClaims(Open):
    """What the runner signs with its key to open a session (payload type hello)."""

    v: FormatOne = 1
    org: Id
    runner: Id
    inc: Positive
    nonce_plane: Nonce
    nonce_runner: Nonce
    boot_id: Annotated[str, Field(max_length=64)]
    ctl: StreamMark
    out_head: Count
    """Highest `out_seq` that exists; the plane dispatches nothing new before it has stored up to here."""
    keyset_version: Positive
    policy_digest: DigestText
    version: ShortText
    platform: ShortText
    hostname: ShortText = ""
    attempts: Count = 0
    """Living attempts, whatever started them."""
    instance: Annotated[str, Field(pattern=r"^([A-Za-z0-9_-]{22})?$")] = ""
    """Random for each start of a daemon; with `dial` it tells two machines apart that hold one key."""
    dial: Count = 0
    """How often this instance has dialled: it only rises."""
    purpose: Purpose = "session"


class WelcomeClaims(Open):
    """What the control plane signs with a command key: its own proof, its clock, and where to go on."""

    v: FormatOne = 1
    org: Id
    runner: Id
    inc: Positive
    session: Id
    nonce_runner: Nonce
    nonce_plane: Nonce
    now_ms: Millis
    beat_ms: Annotated[int, Field(ge=BEAT_INTERVAL_MS_MIN, le=BEAT_INTERVAL_MS_MAX)]
    ctl: StreamMark
    """The mark the plane goes on from: the runner's own, or zero in a new incarnation."""
    out_hw: Count
    """Every item up to here is stored; the runner sends everything above it again, and what had no answer."""


class EnrollClaims(Open):
    """What a runner signs with the key it enrols: proof of possession, bound to the join token."""

    v: FormatOne = 1
    token: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{22}$")]
    name: Id
    x: KeyText
    seal_x: KeyText
    """X25519 key that secrets are sealed to."""
    boot_id: Annotated[str, Field(max_length=64)]
    hostname: ShortText
    platform: ShortText
    version: ShortText
    labels: Labels = {}


class Certificate(Open):
    """What an enrol key signs: this key is this runner, in this incarnation."""

    v: FormatOne = 1
    org: Id
    runner: Id
    inc: Positive
    name: Id
    x: KeyText
    seal_x: KeyText
    labels: Labels = {}
    iat: Millis


JOIN_TOKEN_BYTES: Final = 16
_JOIN: Final = re.compile(
    r"(?P<scheme>rj1|rj1s)://(?P<host>[A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:]{2,45}\]):(?P<port>[0-9]{1,5})"
    r"/(?P<token>[A-Za-z0-9_-]{22})#(?P<root>SHA256:[A-Za-z0-9_-]{43})"
)


class JoinString(NamedTuple):
    """Where to enrol, the one-time token, and the fingerprint of the root: no trust on first use."""

    host: str
    port: int
    token: str
    root: str
    secure: bool = False

    def __str__(self) -> str:
        return f"{'rj1s' if self.secure else 'rj1'}://{self.host}:{self.port}/{self.token}#{self.root}"

    @property
    def url(self) -> str:
        """The WebSocket URL of the runner endpoint."""
        return runner_url(self.host, self.port, secure=self.secure)

    @classmethod
    def parse(cls, text: str) -> "JoinString":
        """Read a join string. Raises ValueError that does not repeat it (it holds a secret)."""
        match = _JOIN.fullmatch(text.strip())
        if match is None or not 0 < int(match["port"]) < 65536:
            raise ValueError("not a join string: expected rj1://HOST:PORT/TOKEN#SHA256:FINGERPRINT")
        b64url_decode(match["token"], JOIN_TOKEN_BYTES)
        return cls(match["host"], int(match["port"]), match["token"], match["root"], match["scheme"] == "rj1s")


def runner_url(host: str, port: int, *, secure: bool) -> str:
    """The runner endpoint of a control plane."""
    return f"{'wss' if secure else 'ws'}://{host}:{port}/v1/runner"


def join_token(entropy: bytes) -> str:
    """A one-time token of 128 bits. `entropy` is 16 random bytes."""
    if len(entropy) != JOIN_TOKEN_BYTES:
        raise ValueError("a join token wants 16 bytes of entropy")
    return b64url(entropy)
