"""The signed fate of a command, and the signed last word on an attempt.

Rule 1: a command whose number was consumed, or that came on the safety stream, has exactly one receipt, known by the digest of
its payload. Rule 2: an attempt has exactly one settlement. "We failed" (`failed`, `lost`, `never_started`) and "it failed"
(`exited` with a code) are different outcomes; a missing exit record is never 0.
"""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from protocol.envelope import Keys, PayloadType, Verified, open_envelope
from protocol.errors import Reason
from protocol.ids import Attempt, ExecutionId, FencingToken
from protocol.wire import Count, Detail, DigestText, FormatOne, Id, JsonObject, Millis, Open, Positive

HexDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Outcome(StrEnum):
    """The fate of a command."""

    ACCEPTED = "accepted"
    """An attempt was begun; its end comes as a settlement."""
    DONE = "done"
    REFUSED = "refused"
    """Judged and not begun."""
    FAILED = "failed"
    """Begun, and the effect could not be completed; what was half made is undone or named in `result`."""


class Receipt(Open):
    """The signed fate of one command."""

    v: FormatOne = 1
    org: Id
    runner: Id
    inc: Positive
    cmd_id: Id
    cmd_digest: DigestText
    kind: Annotated[str, Field(max_length=140)]
    seq: Positive | None
    outcome: Outcome
    reason: Reason | None = None
    detail: Detail = ""
    policy_digest: DigestText
    keyset_version: Positive
    at_ms: Millis
    result: JsonObject = {}


class Verdict(StrEnum):
    """How an attempt ended."""

    EXITED = "exited"
    SIGNALLED = "signalled"
    STOPPED = "stopped"
    TIMED_OUT = "timed_out"
    LOST = "lost"
    FENCED = "fenced"
    """A later attempt of the execution took its place."""
    NEVER_STARTED = "never_started"


class Cause(Open):
    """What ended it first: `kind` is none, stop, timeout, idle, lease, unreleased, exec_failed, shim_failed, reboot or shim_lost."""

    kind: Annotated[str, Field(pattern=r"^[a-z_]{1,32}$")]
    by: Annotated[str, Field(max_length=200)] = ""
    reason: Reason | None = None
    detail: Detail = ""


class StreamDigest(Open):
    """One stream as the child wrote it: how much, and SHA-256 of it."""

    bytes: Count
    sha256: HexDigest


class Usage(Open):
    """What the child's direct process and its reaped children used."""

    utime_us: Count = 0
    stime_us: Count = 0
    maxrss_kib: Count = 0


class Dropped(Open):
    """The middle of a log that made room for the newest: `segments` of them, from `start` to `end`.

    `before` is the digest of the segment in front of it, `last` that of its own last one, which the segment behind it names:
    what is in front and what is behind can both be proven.
    """

    start: Count
    end: Count
    segments: Count
    before: HexDigest
    last: HexDigest


class Uploaded(Open):
    """What the copy at the control plane adds up to where it is not the log itself: `redactor` names the rules by which bytes were masked.

    Offsets and lengths are the log's. Without streams its runner could not say: the log's beginning had made room for its newest.
    """

    redactor: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,32}$")]
    streams: dict[str, StreamDigest] = {}


class LogEnd(Open):
    """Where the log ends, and the digest of its last segment, whose header names the one before."""

    end: Count
    segments: Count
    chain: HexDigest
    dropped: Dropped | None = None
    uploaded: Uploaded | None = None
    """None: the uploaded copy is the log, byte for byte."""


class Sweep(Open):
    """What one step of ending a tree did."""

    tier: Annotated[str, Field(pattern=r"^[a-z_]{1,32}$")]
    signal: Count
    count: Count


class Process(Open):
    """A process that was left alive: `why` it could not or was not to be ended, `state` and `wchan` as the kernel tells."""

    pid: Positive
    name: Annotated[str, Field(max_length=64)] = ""
    state: Annotated[str, Field(max_length=8)] = ""
    wchan: Annotated[str, Field(max_length=64)] = ""
    why: Annotated[str, Field(max_length=32)] = ""


class Settlement(Open):
    """The signed last word on one attempt."""

    v: FormatOne = 1
    org: Id
    runner: Id
    inc: Positive
    execution_id: Id
    start_token: Positive
    cmd_id: Id
    cmd_digest: DigestText
    verdict: Verdict
    code: int | None = None
    signal: int | None = None
    core: bool = False
    cause: Cause
    started_ms: Millis | None = None
    ended_ms: Millis | None = None
    duration_ms: Millis | None = None
    usage: Usage = Usage()
    streams: dict[str, StreamDigest] = {}
    log: LogEnd | None = None
    drain: Annotated[str, Field(max_length=32)] = ""
    swept: list[Sweep] = []
    survivors: Count = 0
    remains: list[Process] = []
    """The survivors, as far as they are listed: what could not be ended, and why."""
    outlived: list[Process] = []
    """What the owner's policy lets live on."""
    tiers: list[Annotated[str, Field(max_length=32)]] = []
    """The ways there were to find the tree."""
    token: Positive | None = None
    """The fencing token it ran under last; null without a lease."""
    boot_id: Annotated[str, Field(max_length=64)] = ""
    policy_digest: DigestText
    at_ms: Millis
    evidence: JsonObject = {}

    @property
    def attempt(self) -> Attempt:
        """The attempt it ends."""
        return Attempt(ExecutionId(self.execution_id), FencingToken(self.start_token))

    @property
    def exit_status(self) -> int:
        """As a shell would say it: the code, 128 + signal, or 125 when the command itself never got to an end of its own."""
        if self.verdict in (Verdict.LOST, Verdict.NEVER_STARTED, Verdict.FENCED):
            return INFRA_STATUS
        if self.signal is not None:
            return 128 + self.signal
        return INFRA_STATUS if self.code is None else self.code


INFRA_STATUS = 125
"""Exit status that says "we failed", as container engines do."""


def open_receipt(envelope: bytes, keys: Keys) -> Verified[Receipt]:
    """Open a receipt with the runner's key. Raises EnvelopeError."""
    return open_envelope(envelope, PayloadType.RECEIPT, keys, Receipt.parse)


def open_settlement(envelope: bytes, keys: Keys) -> Verified[Settlement]:
    """Open a settlement with the runner's key. Raises EnvelopeError."""
    return open_envelope(envelope, PayloadType.SETTLEMENT, keys, Settlement.parse)
