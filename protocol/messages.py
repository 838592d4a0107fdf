"""Text frames of a session: one JSON object each, told apart by `t`.

They are unsigned and local to the hop. What must be believed inside them is a signed envelope, carried as text in `env`
so that its bytes stay as they were signed.
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, TypeVar, get_args

from pydantic import Field, ValidationError

from protocol import strict_json
from protocol.channels import Ack as Ack
from protocol.channels import AttemptName as AttemptName
from protocol.channels import Blocked as Blocked
from protocol.channels import Credit as Credit
from protocol.channels import Gap as Gap
from protocol.channels import Input as Input
from protocol.channels import InputFed as InputFed
from protocol.channels import LogClosed as LogClosed
from protocol.channels import LogOpen as LogOpen
from protocol.channels import Resized as Resized
from protocol.channels import Resume as Resume
from protocol.channels import Taken as Taken
from protocol.channels import Typed as Typed
from protocol.channels import Viewers as Viewers
from protocol.channels import Watch as Watch
from protocol.errors import CloseCode, Reason, RemoteError
from protocol.keyset import Root
from protocol.limits import (
    BEAT_INTERVAL_MS_MAX,
    BEAT_INTERVAL_MS_MIN,
    BEAT_LEASES_MAX,
    ENVELOPE_BYTES_MAX,
    FETCH_ITEMS_MAX,
    FRAME_BYTES_MAX,
    HINTS_MAX,
    REPORT_ITEMS_MAX,
)
from protocol.wire import Count, Detail, DigestText, Id, Millis, Open, Positive, first_error

PROTOCOL_VERSION: Final = 1
SUBPROTOCOL: Final = "local-runner.v1"
EnvelopeText = Annotated[str, Field(min_length=2, max_length=ENVELOPE_BYTES_MAX)]
Nonce = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{43}$")]
Purpose = Literal["session", "renew"]
"""What a connection is for: `renew` carries beats only, beside the session, when that is starved."""


class Hello(Open):
    """runner → plane: opens the handshake. Changes nothing on either side."""

    t: Literal["hello"] = "hello"
    v_min: Positive = PROTOCOL_VERSION
    v_max: Positive = PROTOCOL_VERSION
    org: Id
    runner: Id
    nonce: Nonce
    purpose: Purpose = "session"


class Challenge(Open):
    """plane → runner: what the proof must sign."""

    t: Literal["challenge"] = "challenge"
    v: Positive = PROTOCOL_VERSION
    nonce: Nonce
    now_ms: Millis


class Proof(Open):
    """runner → plane: the signed hello."""

    t: Literal["proof"] = "proof"
    env: EnvelopeText


class Welcome(Open):
    """plane → runner: the signed welcome, and the keyset when the runner's is older."""

    t: Literal["welcome"] = "welcome"
    env: EnvelopeText
    keyset: EnvelopeText | None = None
    certificate: EnvelopeText | None = None
    """A certificate of a new incarnation, where the streams start again."""


class Enroll(Open):
    """runner → plane: instead of `hello`, with a join token; the envelope is signed by the key that is enrolled."""

    t: Literal["enroll"] = "enroll"
    env: EnvelopeText


class Enrolled(Open):
    """plane → runner: the root it must compare with its join string, the keyset and its certificate."""

    t: Literal["enrolled"] = "enrolled"
    root: Root
    keyset: EnvelopeText
    certificate: EnvelopeText


class CommandFrame(Open):
    """plane → runner: a command."""

    t: Literal["command"] = "command"
    env: EnvelopeText


class Need(Open):
    """runner → plane: send the `ctl` stream again from `seq`."""

    t: Literal["need"] = "need"
    seq: Positive


class Fetch(Open):
    """runner → plane: send these commands again now; a hint named them and they never came."""

    t: Literal["fetch"] = "fetch"
    cmd_ids: Annotated[list[Id], Field(min_length=1, max_length=FETCH_ITEMS_MAX)]


class Refused(Open):
    """runner → plane: an envelope that consumed no number, by the digest of the envelope as received."""

    t: Literal["refused"] = "refused"
    digest: DigestText
    reason: Reason
    detail: Detail = ""
    cmd_id: Id | None = None
    """Only when the signature was good."""


class ItemKind(StrEnum):
    """What a report item is."""

    RECEIPT = "receipt"
    SETTLEMENT = "settlement"
    EVENT = "event"


class ReportItem(Open):
    """One durable statement; `body` is an envelope, or an event's JSON."""

    out_seq: Positive
    kind: ItemKind
    body: EnvelopeText


class Report(Open):
    """runner → plane: statements in the order of `out_seq`."""

    t: Literal["report"] = "report"
    items: Annotated[list[ReportItem], Field(min_length=1, max_length=REPORT_ITEMS_MAX)]


class Answer(Open):
    """The final word on one item: it is durable at the plane, or refused for ever."""

    out_seq: Positive
    stored: bool
    reason: Reason | None = None


class Reported(Open):
    """plane → runner: answers, in any order."""

    t: Literal["reported"] = "reported"
    answers: Annotated[list[Answer], Field(min_length=1, max_length=REPORT_ITEMS_MAX)]


class HeldLease(Open):
    """A lease the runner holds and wants renewed."""

    res: Annotated[str, Field(max_length=100)]
    token: Positive


class Beat(Open):
    """runner → plane: alive, accepted `ctl` up to `hw`, these leases are held, these attempts live.

    `full`: both lists are whole, so what is not in them is not there. `lost`: leases whose deadline passed while their attempt
    lives on. `admission`: whether new work is taken.
    """

    t: Literal["beat"] = "beat"
    n: Positive
    hw: Count
    leases: Annotated[list[HeldLease], Field(max_length=BEAT_LEASES_MAX)] = []
    attempts: Annotated[list[AttemptName], Field(max_length=BEAT_LEASES_MAX)] = []
    lost: Annotated[list[HeldLease], Field(max_length=BEAT_LEASES_MAX)] = []
    full: bool = False
    admission: Annotated[str, Field(pattern=r"^[a-z_]{1,32}$")] = "open"


class Renewal(Open):
    """A lease after the beat: renewed for `ttl_ms` from the moment the beat was sent, or refused."""

    res: Annotated[str, Field(max_length=100)]
    token: Positive
    ttl_ms: Positive | None = None
    reason: Reason | None = None


class Hint(Open):
    """What the plane wants of an attempt, and the signed command that says so; unsigned, so it stops nothing by itself."""

    attempt: AttemptName
    want: Annotated[str, Field(pattern=r"^[a-z_]{1,32}$")]
    cmd_id: Id


class Beaten(Open):
    """plane → runner: the answer to beat `n`, and the interval until the next."""

    t: Literal["beaten"] = "beaten"
    n: Positive
    now_ms: Millis
    beat_ms: Annotated[int, Field(ge=BEAT_INTERVAL_MS_MIN, le=BEAT_INTERVAL_MS_MAX)]
    leases: Annotated[list[Renewal], Field(max_length=BEAT_LEASES_MAX)] = []
    hints: Annotated[list[Hint], Field(max_length=HINTS_MAX)] = []
    full: bool = False
    """The answer to a full beat: every attempt the plane knows to be the runner's has a hint."""


class Bye(Open):
    """Either side: the connection ends on purpose."""

    t: Literal["bye"] = "bye"
    reason: Reason
    detail: Detail = ""


FromRunner = (
    Hello
    | Proof
    | Enroll
    | Need
    | Fetch
    | Refused
    | Report
    | Beat
    | LogOpen
    | Blocked
    | Gap
    | LogClosed
    | InputFed
    | Taken
    | Bye
)
FromPlane = (
    Challenge
    | Welcome
    | Enrolled
    | CommandFrame
    | Reported
    | Beaten
    | Resume
    | Ack
    | Credit
    | Watch
    | Input
    | Typed
    | Resized
    | Viewers
    | Bye
)
Message = FromRunner | FromPlane

M = TypeVar("M", bound=Open)


def _by_tag(union: Any) -> Mapping[str, Any]:
    return MappingProxyType({model.model_fields["t"].default: model for model in get_args(union)})


_FROM_RUNNER: Final[Mapping[str, type[FromRunner]]] = _by_tag(FromRunner)
_FROM_PLANE: Final[Mapping[str, type[FromPlane]]] = _by_tag(FromPlane)
"""Not a discriminated union of pydantic: that one makes the validators of all its members when the first is asked for."""


def encode(message: Message) -> str:
    """A message as a text frame."""
    return message.model_dump_json(exclude_none=True)


def decode_from_runner(text: str) -> FromRunner:
    """Read a runner's text frame. Raises RemoteError(BAD_FRAME)."""
    return _decode(text, _FROM_RUNNER)


def decode_from_plane(text: str) -> FromPlane:
    """Read a control plane's text frame. Raises RemoteError(BAD_FRAME)."""
    return _decode(text, _FROM_PLANE)


def _decode(text: str, models: Mapping[str, type[M]]) -> M:
    try:
        document = text.encode("utf-8")
        tag = strict_json.loads_object(document, FRAME_BYTES_MAX).get("t")
    except ValueError as exc:
        raise RemoteError(Reason.BAD_FRAME, str(exc)[:100], CloseCode.BAD_FRAME) from None
    model = models.get(tag) if isinstance(tag, str) else None
    if model is None:
        raise RemoteError(Reason.BAD_FRAME, "document: Unknown type", CloseCode.BAD_FRAME)
    try:
        return model.model_validate_json(document)
    except ValidationError as exc:
        raise RemoteError(Reason.BAD_FRAME, f"{tag}.{first_error(exc)}", CloseCode.BAD_FRAME) from None
