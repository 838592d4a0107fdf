"""Who is there: hello → challenge → proof → welcome, as two machines that know no transport.

Theory of operation. `hello` and `challenge` only exchange nonces. The runner's `proof` signs both nonces and how far its
streams are; the plane's `welcome` signs both nonces and its clock. Nothing before the proof changes state on the plane,
nothing before the welcome on the runner. Each nonce is fresh, so neither signature can be used twice.

Rule 1: every expected message is in the table of its side; any other one ends the connection.
Rule 2: a keyset or certificate that comes along is judged by what is pinned already, before the welcome is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from protocol.envelope import PayloadType, Verified, open_envelope, seal
from protocol.errors import CloseCode, EnvelopeError, Reason, RemoteError
from protocol.identity import Certificate, HelloClaims, StreamMark, WelcomeClaims
from protocol.ids import Digest
from protocol.keys import PrivateKey, PublicKey
from protocol.keyset import Keyset, Role, Root, newer, open_keyset
from protocol.messages import PROTOCOL_VERSION, Challenge, Hello, Message, Proof, Purpose, Welcome
from protocol.replay import Mark


class RunnerStep(StrEnum):
    """Where the runner's side is."""

    IDLE = "idle"
    GREETED = "greeted"
    PROVED = "proved"
    WELCOMED = "welcomed"


class PlaneStep(StrEnum):
    """Where the plane's side is."""

    IDLE = "idle"
    CHALLENGED = "challenged"
    KNOWN = "known"


RUNNER_TABLE: Final[Mapping[tuple[RunnerStep, type[Message]], RunnerStep]] = MappingProxyType(
    {
        (RunnerStep.GREETED, Challenge): RunnerStep.PROVED,
        (RunnerStep.PROVED, Welcome): RunnerStep.WELCOMED,
    }
)
PLANE_TABLE: Final[Mapping[tuple[PlaneStep, type[Message]], PlaneStep]] = MappingProxyType(
    {
        (PlaneStep.IDLE, Hello): PlaneStep.CHALLENGED,
        (PlaneStep.CHALLENGED, Proof): PlaneStep.KNOWN,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What the runner brings to a handshake."""

    key: PrivateKey
    certificate: Certificate
    root: Root
    keyset: Verified[Keyset]
    ctl: Mark
    out_head: int
    boot_id: str
    policy_digest: Digest
    version: str
    platform: str
    hostname: str = ""
    attempts: int = 0
    instance: str = ""
    dial: int = 0
    purpose: Purpose = "session"


@dataclass(frozen=True, slots=True, kw_only=True)
class Established:
    """What the runner takes from a welcome."""

    session: str
    now_ms: int
    beat_ms: int
    out_hw: int
    ctl: Mark
    keyset: Verified[Keyset]
    certificate: Verified[Certificate] | None
    """Set when the plane began a new incarnation: the streams restart, living attempts stay."""

    def report_above(self, oldest_unanswered: int | None) -> int:
        """Above which `out_seq` to report: a machine that was set back uses numbers again that the plane's mark covers."""
        return self.out_hw if oldest_unanswered is None else min(self.out_hw, oldest_unanswered - 1)


@dataclass(slots=True)
class RunnerHandshake:
    """The runner's side. `nonce` is 32 random bytes in base64url."""

    standing: Standing
    nonce: str
    step: RunnerStep = RunnerStep.IDLE
    _challenge: Challenge | None = field(default=None)

    def start(self) -> Hello:
        """The first message."""
        assert self.step is RunnerStep.IDLE, "a handshake is used once"
        self.step = RunnerStep.GREETED
        certificate = self.standing.certificate
        return Hello(org=certificate.org, runner=certificate.runner, nonce=self.nonce, purpose=self.standing.purpose)

    def receive(self, message: Message) -> Proof | Established:
        """Take the plane's next message. Raises RemoteError; then the connection is to be closed."""
        following = RUNNER_TABLE.get((self.step, type(message)))
        if following is None:
            raise _unexpected()
        answer: Proof | Established
        if isinstance(message, Challenge):
            answer = self._prove(message)
        else:
            assert isinstance(message, Welcome), "the table has no other row"
            answer = self._judge(message)
        self.step = following
        return answer

    def _prove(self, challenge: Challenge) -> Proof:
        if challenge.v != PROTOCOL_VERSION:
            raise RemoteError(Reason.UNSUPPORTED_VERSION, "another version", CloseCode.UNSUPPORTED_VERSION)
        self._challenge = challenge
        mine, certificate = self.standing, self.standing.certificate
        claims = HelloClaims(
            org=certificate.org,
            runner=certificate.runner,
            inc=certificate.inc,
            nonce_plane=challenge.nonce,
            nonce_runner=self.nonce,
            boot_id=mine.boot_id,
            ctl=StreamMark(hw=mine.ctl.hw, head=mine.ctl.head),
            out_head=mine.out_head,
            keyset_version=mine.keyset.value.version,
            policy_digest=mine.policy_digest,
            version=mine.version,
            platform=mine.platform,
            hostname=mine.hostname,
            attempts=mine.attempts,
            instance=mine.instance,
            dial=mine.dial,
            purpose=mine.purpose,
        )
        return Proof(env=seal(claims.dump(), PayloadType.HELLO, [mine.key]).decode())

    def _judge(self, welcome: Welcome) -> Established:
        """Steps: 1 keyset, 2 certificate, 3 signature, 4 nonces and address, 5 marks."""
        mine = self.standing
        try:
            keyset = mine.keyset
            if welcome.keyset is not None:
                keyset = newer(keyset, open_keyset(welcome.keyset.encode(), mine.root))
            reborn = self._certificate(welcome, keyset.value)
            keys = keyset.value.keys_for(Role.COMMAND)
            opened = open_envelope(welcome.env.encode(), PayloadType.WELCOME, keys, WelcomeClaims.parse)
            said = opened.value
            if not any(keyset.value.admits(kid, Role.COMMAND, said.now_ms) is None for kid in opened.key_ids):
                raise EnvelopeError(Reason.REVOKED_KEY, "the welcome is signed by a key that does not count")
            if said.now_ms > keyset.value.exp:
                raise EnvelopeError(Reason.KEYSET_TOO_OLD, "the keyset has expired")
        except EnvelopeError as exc:
            raise _unproven(f"the control plane's welcome: {exc}") from exc
        certificate = reborn.value if reborn is not None else mine.certificate
        assert self._challenge is not None, "the table wants a challenge first"
        if (said.nonce_runner, said.nonce_plane) != (self.nonce, self._challenge.nonce):
            raise _unproven("the welcome answers another handshake")
        if (said.org, said.runner, said.inc) != (certificate.org, certificate.runner, certificate.inc):
            raise _unproven("the welcome is for another runner or incarnation")
        ctl = Mark() if reborn is not None else mine.ctl
        if (said.ctl.hw, said.ctl.head) != (ctl.hw, ctl.head):
            raise _unproven("the plane would go on from another place")
        return Established(
            session=said.session,
            now_ms=said.now_ms,
            beat_ms=said.beat_ms,
            # A mark above our own end is of items that were forgotten here: the next ones go below it.
            out_hw=min(said.out_hw, mine.out_head),
            ctl=ctl,
            keyset=keyset,
            certificate=reborn,
        )

    def _certificate(self, welcome: Welcome, keyset: Keyset) -> Verified[Certificate] | None:
        if welcome.certificate is None:
            return None
        opened = open_certificate(welcome.certificate.encode(), keyset)
        mine, new = self.standing.certificate, opened.value
        if (new.org, new.runner, new.x, new.seal_x) != (mine.org, mine.runner, mine.x, mine.seal_x):
            raise EnvelopeError(Reason.WRONG_AUD, "the new certificate is for another runner")
        if new.inc <= mine.inc:
            raise EnvelopeError(Reason.STALE_INC, "the new certificate is for an older incarnation")
        return opened


def open_certificate(envelope: bytes, keyset: Keyset) -> Verified[Certificate]:
    """Open a runner certificate with the enrol keys of `keyset`, as they counted when it was issued. Raises EnvelopeError."""
    opened = open_envelope(envelope, PayloadType.CERTIFICATE, keyset.keys_for(Role.ENROL), Certificate.parse)
    verdicts = [keyset.admits(key_id, Role.ENROL, opened.value.iat) for key_id in opened.key_ids]
    if None not in verdicts:
        raise EnvelopeError(verdicts[0] or Reason.UNKNOWN_KEY, "the certificate is signed by a key that does not count")
    return opened


@dataclass(slots=True)
class PlaneHandshake:
    """The plane's side. `nonce` is 32 random bytes in base64url."""

    nonce: str
    step: PlaneStep = PlaneStep.IDLE
    hello: Hello | None = field(default=None)

    def challenge(self, message: Message, now_ms: int) -> Challenge:
        """Answer the first message. Raises RemoteError."""
        self._advance(message)
        assert isinstance(message, Hello), "the table has no other row"
        if not message.v_min <= PROTOCOL_VERSION <= message.v_max:
            raise RemoteError(Reason.UNSUPPORTED_VERSION, "no version in common", CloseCode.UNSUPPORTED_VERSION)
        self.hello = message
        return Challenge(nonce=self.nonce, now_ms=now_ms)

    def verify(self, message: Message, key: PublicKey | None) -> HelloClaims:
        """Judge the proof with the enrolled key of the runner in `hello` (None: not enrolled). Raises RemoteError."""
        self._advance(message)
        assert isinstance(message, Proof) and self.hello is not None, "the table has no other row"
        if key is None:
            raise RemoteError(Reason.UNKNOWN_RUNNER, "not enrolled here", CloseCode.UNKNOWN_RUNNER)
        try:
            claims = open_envelope(message.env.encode(), PayloadType.HELLO, {key.key_id: key}, HelloClaims.parse).value
        except EnvelopeError as exc:
            raise _unproven(f"the runner's proof: {exc}") from exc
        if (claims.nonce_plane, claims.nonce_runner) != (self.nonce, self.hello.nonce):
            raise _unproven("the proof answers another handshake")
        if (claims.org, claims.runner) != (self.hello.org, self.hello.runner):
            raise _unproven("the proof is of another runner")
        if claims.purpose != self.hello.purpose:
            raise _unproven("the proof is for another purpose")
        return claims

    def _advance(self, message: Message) -> None:
        following = PLANE_TABLE.get((self.step, type(message)))
        if following is None:
            raise _unexpected()
        self.step = following


def seal_welcome(
    claims: HelloClaims, *, inc: int, session: str, now_ms: int, beat_ms: int, ctl: Mark, out_hw: int, key: PrivateKey
) -> str:
    """The plane's signed answer to a verified proof, as envelope text."""
    said = WelcomeClaims(
        org=claims.org,
        runner=claims.runner,
        inc=inc,
        session=session,
        nonce_runner=claims.nonce_runner,
        nonce_plane=claims.nonce_plane,
        now_ms=now_ms,
        beat_ms=beat_ms,
        ctl=StreamMark(hw=ctl.hw, head=ctl.head),
        out_hw=out_hw,
    )
    return seal(said.dump(), PayloadType.WELCOME, [key]).decode()


def _unexpected() -> RemoteError:
    return RemoteError(Reason.UNEXPECTED_MESSAGE, "not at this point of the handshake", CloseCode.BAD_FRAME)


def _unproven(detail: str) -> RemoteError:
    return RemoteError(Reason.BAD_PROOF, detail, CloseCode.BAD_PROOF)
