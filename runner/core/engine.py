"""The judgement of the runner: one input in, effects out.

Theory of operation. Every input is stepped to the end before the next one is looked at. What must be remembered is in Persist
effects, which the pump makes durable before it performs anything else of the same turn: journal before effect. Effects that take
time (a shim, git) come back as inputs. Bytes of logs never pass through here.

Rule 1: everything past `open_envelope` takes Verified. Rule 2: a command whose number was consumed gets exactly one receipt, from
`_receipt`. Rule 3: an attempt that was accepted gets exactly one settlement, from `Attempts`. Rule 4: no clock, no I/O, no logging.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, assert_never

from protocol.commands import (
    Args,
    ArgsRefused,
    Audience,
    Command,
    ExecutionSignal,
    ExecutionStop,
    LeaseAcquire,
    LeaseRelease,
    PtyAttach,
    Start,
    Stream,
    WorktreeCreate,
    WorktreeRemove,
    parse_args,
)
from protocol.envelope import PayloadType, Verified, open_envelope
from protocol.errors import EnvelopeError, Reason
from protocol.events import Event, EventKind
from protocol.handshake import Established
from protocol.identity import Certificate
from protocol.ids import Attempt, CommandId, Digest
from protocol.keys import PrivateKey
from protocol.keyset import Keyset, Role
from protocol.receipt import Outcome
from protocol.replay import Advance, Mark
from protocol.session import BeatAnswered, ItemsAnswered
from protocol.wire import JsonObject
from runner.core.admission import PENDING_MAX, Refusal, refuse_args, refuse_header
from runner.core.attempts import Attempts
from runner.core.claims import Claims
from runner.core.effects import Effect, KeepIdentity, Note, Offer, Persist
from runner.core.gate import Gate
from runner.core.inbox import Inbox
from runner.core.inputs import (
    AttemptExited,
    AttemptLost,
    AttemptNotPrepared,
    AttemptPrepared,
    AttemptSignalled,
    EnvelopeReceived,
    HeadroomMeasured,
    Input,
    Now,
    OrphansFound,
    OwnerAdmission,
    OwnerStop,
    OwnerSweep,
    PolicyChanged,
    RemainsSwept,
    SessionDown,
    SessionUp,
    ShimSilent,
    Tick,
    ViewerAdmitted,
    ViewerNotAdmitted,
    Woke,
    WorktreeCreated,
    WorktreeFailed,
    WorktreeRemoved,
)
from runner.core.journaling import Image, PutAnswered, PutCommand, PutEvent, PutMark, PutReceipt
from runner.core.leases import Leases
from runner.core.ledger import COMMANDS_REMEMBERED_MAX, Ledger
from runner.core.orphans import Orphans
from runner.core.plans import CommandRow, Observed
from runner.core.policy import Policy
from runner.core.rhythm import Rhythm
from runner.core.signals import Signals
from runner.core.statements import Statements
from runner.core.takeback import take_back
from runner.core.trees import Trees
from runner.core.viewers import Viewers

_Queued = Start | WorktreeCreate | WorktreeRemove


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineIdentity:
    """Who this runner is."""

    key: PrivateKey
    certificate: Certificate
    keyset: Verified[Keyset]
    boot_id: str


class Engine:
    """The runner's state and its one door, `step`."""

    def __init__(self, identity: EngineIdentity, policy: Policy, base_env: Mapping[str, str], image: Image) -> None:
        certificate = identity.certificate
        self.certificate: Certificate = certificate
        self.me: Audience = Audience(org=certificate.org, runner=certificate.runner, inc=certificate.inc)
        self.keyset: Verified[Keyset] = identity.keyset
        self.policy: Policy = policy
        self.ledger: Final = Ledger(
            ctl=image.marks.get(certificate.inc, Mark()),
            commands={row.digest: row for row in image.commands},
            tombstones=dict(image.tombstones),
        )
        for row in image.commands:
            self.ledger.first.setdefault(row.cmd_id, row.digest)
        self.statements: Final = Statements(
            org=certificate.org,
            runner=certificate.runner,
            inc=certificate.inc,
            key=identity.key,
            boot_id=identity.boot_id,
            out_head=image.out_head,
        )
        self.claims: Final[Claims[Digest]] = Claims()
        self.attempts: Final = Attempts(self, image.attempts)
        self.signals: Final = Signals(self)
        self.viewers: Final = Viewers(self)
        self.leases: Final = Leases(self)
        self.trees: Final = Trees(self, image.worktrees)
        self.gate: Final = Gate(self, image)
        self.rhythm: Final = Rhythm(self)
        self.orphans: Final = Orphans(self)
        self.base_env: Final = base_env
        self._answered: list[int] = []
        self._waiting: dict[Digest, tuple[Verified[Command], _Queued]] = {}
        self.inbox: Final = Inbox(self)
        self.keys = identity.keyset.value.keys_for(Role.COMMAND, Role.SAFETY)
        """What commands may be signed with."""

    # --- the door -----------------------------------------------------------------------------------------------

    def step(self, happened: Input, now: Now) -> list[Effect]:
        """Everything that follows from `happened` at `now`, in order."""
        match happened:
            case EnvelopeReceived(env):
                return self.inbox.received(env, now)
            case SessionUp(established):
                return self._session_up(established, now)
            case SessionDown():
                self.rhythm.down()
                return self._answers(now)
            case BeatAnswered():
                return self.rhythm.answered(happened, now)
            case ItemsAnswered(answers):
                self._answered.extend(answer.out_seq for answer in answers)
                refused = [answer for answer in answers if not answer.stored]
                return [Note("report.refused", {"out_seq": each.out_seq, "reason": each.reason}) for each in refused]
            case AttemptPrepared():
                return self.attempts.prepared(happened, now)
            case AttemptNotPrepared():
                return self.attempts.not_prepared(happened, now)
            case AttemptExited():
                return self.attempts.exited(happened, now)
            case AttemptLost():
                return self.attempts.lost(happened, now)
            case AttemptSignalled():
                return self.signals.answered(happened, now)
            case ViewerAdmitted() | ViewerNotAdmitted():
                return self.viewers.heard(happened, now)
            case WorktreeCreated() | WorktreeRemoved() | WorktreeFailed():
                return self.trees.heard(happened, now)
            case OwnerStop():
                return self.attempts.owner_stop(happened, now)
            case PolicyChanged(policy):
                self.policy = policy
                return [Note("policy.loaded", {"policy_digest": policy.digest})]
            case Tick() | Woke() | HeadroomMeasured() | OwnerAdmission():
                return self._machine(happened, now)
            case ShimSilent() | OrphansFound() | RemainsSwept() | OwnerSweep():
                return self.orphans.heard(happened, now)
            case _:
                assert_never(happened)

    def _machine(self, happened: Tick | Woke | HeadroomMeasured | OwnerAdmission, now: Now) -> list[Effect]:
        match happened:
            case Tick():
                parts = (self._answers, self.leases.tick, self.orphans.tick, self.gate.tick, self.rhythm.tick)
                return [effect for part in parts for effect in part(now)]
            case Woke():
                return self.rhythm.woke(happened, now)
            case HeadroomMeasured() | OwnerAdmission():
                return self.gate.heard(happened, now)
            case _:
                assert_never(happened)

    def recover(self, found: Sequence[Observed], now: Now) -> list[Effect]:
        """What a daemon that starts does: each attempt by the table, then every command whose effect is still owed."""
        self.gate.recover(now)
        self.rhythm.begun(now)
        effects = [*take_back(self, found, now), *self.leases.tick(now), *self.orphans.scan(now)]
        for digest in [row.digest for row in self.ledger.commands.values() if row.receipt_seq is None]:
            effects += self._resume(digest, now)
        return effects

    @property
    def wake_at_ms(self) -> int | None:
        """When a Tick is due (BOOTTIME), None: never. Beats, and a look at all processes each minute, wake an idle runner."""
        moments = (self.rhythm.next_moment_ms(), self.orphans.next_moment_ms(), self.gate.drain_deadline_ms)
        return min((moment for moment in moments if moment is not None), default=None)

    # --- commands -----------------------------------------------------------------------------------------------

    def consumed(self, command: Verified[Command], advance: Advance, now: Now) -> list[Effect]:
        header = command.value
        row = CommandRow(
            digest=command.digest,
            cmd_id=CommandId(header.cmd_id),
            kind=header.kind,
            seq=header.seq,
            envelope=command.envelope,
            policy_digest=self.policy.digest,
            receipt_seq=None,
        )
        self.ledger.add(row, advance.ctl)
        if len(self.ledger.commands) > COMMANDS_REMEMBERED_MAX:
            self.ledger.forget({attempt.digest for attempt in self.attempts.living_rows()})
        mark = (PutMark(self.me.inc, advance.ctl),) if header.stream is Stream.CTL else ()
        effects: list[Effect] = [Persist((*mark, PutCommand(row, now.wall_ms)))]
        if advance.refuse is not None:
            return effects + self.refuse(
                row.digest, Refusal(advance.refuse, "the id came with other bytes before"), now
            )
        return effects + self._judge(command, now)

    def _judge(self, command: Verified[Command], now: Now) -> list[Effect]:
        """Every verdict that has a receipt; then the effect, or its place in the queue."""
        header = command.value
        refusal = refuse_header(header, self.keyset.value, self.policy, self.plane_ms(now)) or self._cancelled(header)
        if refusal is None:
            try:
                args = parse_args(header)
            except ArgsRefused as exc:
                return self.refuse(command.digest, Refusal(exc.reason, exc.detail), now)
            refusal = (
                refuse_args(header, args, self.policy, self.attempts.living_beside(args))
                or self.gate.refusal(args)
                or self.trees.refusal(header, args)
            )
        if refusal is not None:
            return self.refuse(command.digest, refusal, now)
        match args:
            case ExecutionStop():
                return self.attempts.stop(command, args, now)
            case ExecutionSignal():
                return self.signals.send(command, args, now)
            case PtyAttach():
                return self.viewers.attach(command, args, now)
            case LeaseRelease():
                return self.leases.release(command, args, now)
            case LeaseAcquire():
                return self.leases.acquire(command, args, now)
            case Start() | WorktreeCreate() | WorktreeRemove():
                return self._enqueue(command, args, now)
            case _:
                assert_never(args)

    def _cancelled(self, header: Command) -> Refusal | None:
        buried = self.ledger.tombstones.get(header.cmd_id)
        return None if buried is None else Refusal(Reason.CANCELLED_BEFORE_START, "it was stopped before it came")

    def _enqueue(self, command: Verified[Command], args: _Queued, now: Now) -> list[Effect]:
        if len(self._waiting) >= PENDING_MAX:
            return self.refuse(command.digest, Refusal(Reason.CAPACITY, "too many commands are pending"), now)
        effects: list[Effect] = []
        if isinstance(args, Start):
            admitted = self.attempts.admit(command, args, now)
            if isinstance(admitted, Refusal):
                return self.refuse(command.digest, admitted, now)
            effects += admitted
            resources = self.attempts.resources(args)
        else:
            resources = self.trees.resources(args)
        self._waiting[command.digest] = (command, args)
        if self.claims.want(command.digest, resources):
            effects += self._begin(command.digest, now)
        return effects

    def _begin(self, digest: Digest, now: Now) -> list[Effect]:
        """The claims are granted: judge what may have changed while it waited, and do it."""
        command, args = self._waiting.pop(digest)
        if isinstance(args, Start):
            return self.attempts.begin(command, args, now)
        return self.trees.begin(command, args, now)

    def reopen(self, digest: Digest) -> tuple[Verified[Command], Args] | Refusal:
        """A command of an earlier daemon, from the journal: with the keys of today, or why not."""
        try:
            row = self.ledger.commands[digest]
            command = open_envelope(row.envelope, PayloadType.COMMAND, self.keys, Command.parse)
            return command, parse_args(command.value)
        except (EnvelopeError, ArgsRefused) as exc:
            return Refusal(exc.reason, "it does not open any more")

    def _resume(self, digest: Digest, now: Now) -> list[Effect]:
        """A command that an earlier daemon consumed and did not receipt.

        A start is judged again, as it is about to begin. What may have been done, or half done, is carried to its end.
        """
        reopened = self.reopen(digest)
        if isinstance(reopened, Refusal):
            return [*self.attempts.forget_intent(digest, now), *self.refuse(digest, reopened, now)]
        command, args = reopened
        if isinstance(args, WorktreeCreate | WorktreeRemove):
            return self._enqueue(command, args, now)
        if isinstance(args, ExecutionSignal):
            return self.signals.send(command, args, now, again=True)
        if isinstance(args, PtyAttach):
            return self.viewers.attach(command, args, now, again=True)
        effects = self._judge(command, now)
        refused = self.ledger.commands[digest].receipt_seq is not None
        return effects + (self.attempts.forget_intent(digest, now) if refused else [])

    # --- answers ------------------------------------------------------------------------------------------------

    def refuse(self, digest: Digest, refusal: Refusal, now: Now) -> list[Effect]:
        """The receipt of a command that has no effect."""
        after_ms = refusal.retry_after_ms
        result: JsonObject | None = None if after_ms is None else {"retry_after_ms": after_ms}
        return self.receipt(digest, Outcome.REFUSED, now, reason=refusal.reason, detail=refusal.detail, result=result)

    def receipt(
        self,
        digest: Digest,
        outcome: Outcome,
        now: Now,
        *,
        reason: Reason | None = None,
        detail: str = "",
        result: JsonObject | None = None,
    ) -> list[Effect]:
        """The one receipt of a command, durable before it is offered."""
        row = self.ledger.commands[digest]
        item = self.statements.receipt(
            row,
            outcome,
            keyset_version=self.keyset.value.version,
            at_ms=now.wall_ms,
            reason=reason,
            detail=detail,
            result=result,
        )
        self.ledger.receipted(digest, item.out_seq)
        event = "command.accepted" if outcome in (Outcome.ACCEPTED, Outcome.DONE) else "command.refused"
        return [
            Persist((PutReceipt(digest, item, now.wall_ms),)),
            Offer((item,)),
            Note(event, {"cmd_id": row.cmd_id, "kind": row.kind, "seq": row.seq, "reason": reason}),
        ]

    def tell(self, kind: EventKind, now: Now, *, attempt: Attempt | None = None, **facts: Any) -> list[Effect]:
        """An event for people and dashboards, durable until it is answered; `facts` are fields of `Event`."""
        if attempt is not None:
            facts |= {"execution_id": attempt.execution_id, "start_token": attempt.start_token}
        item = self.statements.event(Event(kind=kind, at_ms=now.wall_ms, **facts))
        return [Persist((PutEvent(item, now.wall_ms),)), Offer((item,))]

    def free(self, digest: Digest, now: Now) -> list[Effect]:
        """The effect of a command is over: whoever waited for its resources begins."""
        # What recovery took back holds claims without a pending command.
        woken = [other for other in self.claims.drop(digest) if other in self._waiting]
        return [effect for other in woken for effect in self._begin(other, now)]

    def _answers(self, now: Now) -> list[Effect]:
        """Remember answered items; not urgent, so it rides on a turn that commits anyway, or on a beat."""
        answered, self._answered = tuple(self._answered), []
        return [Persist((PutAnswered(answered, now.wall_ms),))] if answered else []

    # --- session and time ---------------------------------------------------------------------------------------

    def plane_ms(self, now: Now) -> int:
        """The control plane's clock, as far as it is known."""
        return self.rhythm.plane_ms(now)

    def _session_up(self, established: Established, now: Now) -> list[Effect]:
        effects: list[Effect] = []
        if established.keyset.value.version > self.keyset.value.version or established.certificate is not None:
            self.keyset = established.keyset
            self.keys = self.keyset.value.keys_for(Role.COMMAND, Role.SAFETY)
            effects.append(KeepIdentity(established.keyset, established.certificate))
            effects.append(Note("keyset.updated", {"version": self.keyset.value.version}))
        if established.certificate is not None:
            self.certificate = established.certificate.value
            inc = self.certificate.inc
            self.me = self.me.model_copy(update={"inc": inc})
            self.statements.inc = inc
            self.ledger.ctl = established.ctl
            effects.append(Note("incarnation.raised", {"inc": inc}))
        return [*effects, *self.rhythm.up(established, now)]
