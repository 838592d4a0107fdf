"""The door behind the door: in which order a verified command is judged, and what it takes to consume a number.

Theory of operation. Signature, then strict header (both done before anything gets here), then address, then the same digest again,
then `seq` and `prev`, then **advance**. Whatever is judged after that (expiry, arguments, policy …) cannot stall the stream,
since the number is consumed. The high-water mark is never forgotten, so forgetting old commands opens no hole.

Rule 1: only ADVANCE moves the mark, by exactly one. Rule 2: nothing here looks at `args` or at a clock.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final

from protocol.commands import Audience, Command, Stream
from protocol.envelope import Verified
from protocol.errors import Reason
from protocol.ids import GENESIS, CommandId, Digest
from protocol.keyset import Keyset, Role
from protocol.limits import CLOCK_SKEW_MS


@dataclass(frozen=True, slots=True)
class Mark:
    """How far a numbered stream is: high-water mark, and the payload digest there."""

    hw: int = 0
    head: Digest = GENESIS


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a runner remembers: the mark of `ctl`, and the digest each remembered `cmd_id` came with first."""

    ctl: Mark = Mark()
    digests: Mapping[CommandId, Digest] = field(default_factory=dict)
    receipted: frozenset[Digest] | Mapping[Digest, object] = frozenset()
    """Digests of all remembered commands, also of those that were refused as a second payload of an id."""


@dataclass(frozen=True, slots=True)
class Duplicate:
    """These very bytes were judged before: answer with the stored receipt."""

    digest: Digest


@dataclass(frozen=True, slots=True)
class Gap:
    """Numbers are missing: ask for the stream from `need` on; nothing is kept of what came too early."""

    need: int


@dataclass(frozen=True, slots=True)
class NotConsumed:
    """Refused without consuming a number and without a receipt."""

    reason: Reason


@dataclass(frozen=True, slots=True)
class Advance:
    """The number is consumed and a receipt is owed; `refuse` is set when its id came with other bytes before."""

    ctl: Mark
    refuse: Reason | None = None


Judgement = Duplicate | Gap | NotConsumed | Advance

SIGNERS: Final[Mapping[Stream, tuple[Role, ...]]] = MappingProxyType(
    {Stream.CTL: (Role.COMMAND,), Stream.SAFETY: (Role.COMMAND, Role.SAFETY)}
)
"""Which roles may sign which stream: a safety key alone can stop things and start nothing."""


def judge(command: Verified[Command], me: Audience, keyset: Keyset, seen: Seen) -> Judgement:
    """Judge a verified command up to the point where its number is consumed."""
    header = command.value
    stranger = _address(header, me, keyset) or _signer(command, keyset)
    if stranger is not None:
        return NotConsumed(stranger)
    if command.digest in seen.receipted:
        return Duplicate(command.digest)
    after = _numbered(command, seen.ctl) if header.stream is Stream.CTL else seen.ctl
    if not isinstance(after, Mark):
        return after
    first = seen.digests.get(CommandId(header.cmd_id))
    return Advance(after, None if first is None else Reason.IDEMPOTENCY_MISMATCH)


def _address(header: Command, me: Audience, keyset: Keyset) -> Reason | None:
    if (header.aud.org, header.aud.runner) != (me.org, me.runner):
        return Reason.WRONG_AUD
    if header.aud.inc != me.inc:
        return Reason.STALE_INC if header.aud.inc < me.inc else Reason.WRONG_AUD
    if header.v < keyset.min_v:
        return Reason.DOWNGRADE
    return Reason.KEYSET_TOO_OLD if header.keyset_min > keyset.version else None


def _signer(command: Verified[Command], keyset: Keyset) -> Reason | None:
    """One signer that may sign this stream is enough; else the reason the first one may not."""
    reasons = [
        keyset.admits(key_id, role, command.value.iat)
        for key_id in command.key_ids
        for role in SIGNERS[command.value.stream]
    ]
    return None if None in reasons else reasons[0]


def _numbered(command: Verified[Command], mark: Mark) -> Mark | Judgement:
    seq, prev = command.value.seq, command.value.prev
    assert seq is not None, "the header model numbers ctl"
    if seq > mark.hw + 1:
        return Gap(mark.hw + 1)
    if seq <= mark.hw:
        # Other bytes under a number that is taken (the same bytes were a Duplicate, unless long forgotten).
        fork = seq == mark.hw and command.digest != mark.head
        return NotConsumed(Reason.CHAIN_FORK if fork else Reason.SEQ_REPLAY)
    if prev != mark.head:
        return NotConsumed(Reason.CHAIN_FORK)
    return Mark(seq, command.digest)


def freshness(header: Command, now_ms: int) -> Reason | None:
    """Judge the window of a command whose number is consumed, by the control plane's clock."""
    if header.exp - header.iat > header.ttl_ms_max or not header.iat <= header.nbf + CLOCK_SKEW_MS:
        return Reason.TTL_TOO_LONG
    if now_ms > header.exp + CLOCK_SKEW_MS:
        return Reason.EXPIRED
    return Reason.NOT_YET if now_ms < header.nbf - CLOCK_SKEW_MS else None


def after(seen: Seen, command: Verified[Command], advance: Advance) -> Seen:
    """What is remembered once `command` was judged `advance`: for models and tests; the engine keeps the same in place."""
    digests = dict(seen.digests)
    digests.setdefault(CommandId(command.value.cmd_id), command.digest)
    return replace(seen, ctl=advance.ctl, digests=digests, receipted=frozenset(seen.receipted) | {command.digest})


@dataclass(frozen=True, slots=True)
class Adopt:
    """How the plane goes on with a runner's `ctl` stream; `lost` numbers are only known to the runner."""

    mark: Mark
    lost: int = 0


@dataclass(frozen=True, slots=True)
class Fork:
    """Two histories under one incarnation: the streams must restart under a new one."""


def reconcile(
    plane: Mapping[int, Digest],
    plane_hw: int,
    acked_hw: int,
    runner: Mark,
    *,
    unanswered: bool = False,
    out_hw: int = 0,
    out_head: int | None = None,
) -> Adopt | Fork:
    """What a plane does with the mark in a signed hello.

    Args:
        plane: payload digest by number, at least from `acked_hw` on.
        plane_hw: highest number the plane has ever signed in this incarnation.
        acked_hw: highest number the runner has told to have consumed.
        runner: the runner's mark.
        unanswered: whether a number the plane has signed in this incarnation has no receipt yet.
        out_hw: highest `out_seq` the plane has stored.
        out_head: highest `out_seq` the runner says exists; None leaves the comparison out.
    """
    if runner.hw < acked_hw or (out_head is not None and out_head < out_hw):
        # The runner's state is older than its own word: a restored snapshot. What it forgot must not be done twice.
        return Fork()
    if runner.hw > plane_hw:
        # The plane comes back from a backup and cannot know these numbers. The runner signed (hw, head): go on there, unless
        # something of ours may lie below: whether the runner consumed that, or other bytes under its number, the mark does not say.
        return Fork() if unanswered else Adopt(runner, lost=runner.hw - plane_hw)
    known = GENESIS if runner.hw == 0 else plane.get(runner.hw)
    return Adopt(runner) if known == runner.head else Fork()
