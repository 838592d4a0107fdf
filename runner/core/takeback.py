"""A daemon that starts takes back what an earlier one left: each attempt by the table of `recovery.decide`.

Adoption and sweeps come back as inputs. A living attempt holds its claims from here on, before any command is looked at.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from protocol.commands import Start
from protocol.errors import Reason
from protocol.events import EventKind
from protocol.execution import AttemptState
from protocol.ids import Attempt
from runner.core.admission import Refusal
from runner.core.effects import (
    AbandonAttempt,
    AdoptAttempt,
    CollectAttempt,
    Effect,
    EndHungShim,
    Note,
    Persist,
    StopAttempt,
    SweepAttempt,
    SweepRemains,
)
from runner.core.inputs import AttemptExited, AttemptLost, Now
from runner.core.journaling import AttemptRow, PutAttempt
from runner.core.plans import Observed
from runner.core.recovery import RecoveryStep, decide
from runner.core.trees import resource
from runner.core.viewers import has_terminal

if TYPE_CHECKING:
    from runner.core.engine import Engine


def take_back(engine: "Engine", found: Sequence[Observed], now: Now) -> list[Effect]:
    """Every attempt of the journal, in its order, and every directory the journal does not know."""
    on_disk = {observed.attempt: observed for observed in found}
    effects: list[Effect] = []
    for row in list(engine.attempts.rows.values()):
        effects += _known(engine, row, on_disk.pop(row.attempt, None), now)
    for observed in on_disk.values():
        effects += _unknown(engine, observed, now)
    return effects


def _unknown(engine: "Engine", found: Observed, now: Now) -> list[Effect]:
    if decide(None, found) is RecoveryStep.CLEAR:
        return [AbandonAttempt(found.attempt)]
    told = [
        Note("alarm.raised", {"attempt": found.attempt.name, "reason": Reason.UNKNOWN_TARGET}),
        *engine.tell(EventKind.ATTEMPT_UNKNOWN, now, attempt=found.attempt, reason=Reason.UNKNOWN_TARGET),
    ]
    if not (found.lock_held and found.same_boot and found.exit is None):
        return told
    # Its output goes up and its end is heard, though nothing can be settled with it.
    engine.attempts.strangers[found.attempt] = None
    return [*told, AdoptAttempt(found.attempt)]


def _known(engine: "Engine", row: AttemptRow, found: Observed | None, now: Now) -> list[Effect]:
    todo = decide(row.state, found)
    if found is None and row.shim is not None and row.shim.boot_id != engine.statements.boot_id:
        # Without a directory only the journal knows of which boot its shim was.
        todo = RecoveryStep.LOST_REBOOT if todo is RecoveryStep.LOST_SHIM else todo
    if row.state is AttemptState.SETTLED:
        return _settled(engine, row, found, todo)
    _hold(engine, row)
    match todo:
        case RecoveryStep.START_AGAIN:
            return _start_again(engine, row, now)
        case RecoveryStep.SETTLE_NEVER:
            refusal = Refusal(Reason.NOT_RELEASED, "it was stopped before it was let go")
            return engine.attempts.never(row.attempt, refusal, now)
        case RecoveryStep.ADOPT:
            return [*_caught_up(engine, row, now), *adopt(engine, row.attempt, now)]
        case RecoveryStep.END_HUNG:
            # Should that not help, either, it is tried again.
            engine.orphans.expect_stop(row.attempt, row.stop_grace_ms, now)
            return [*_caught_up(engine, row, now), EndHungShim(row.attempt, row.shim)]
        case RecoveryStep.LOST_SHIM:
            return [*_caught_up(engine, row, now), SweepAttempt(row.attempt)]
        case RecoveryStep.LOST_REBOOT:
            lost = AttemptLost(row.attempt, Reason.REBOOT, None)
            return [*_caught_up(engine, row, now), *engine.attempts.lost(lost, now)]
        case _:
            assert todo is RecoveryStep.SETTLE_EXIT, "what is left wants an exit record"
            assert found is not None and found.exit is not None, "the table wants an exit record"
            exited = AttemptExited(row.attempt, found.exit)
            return [*_caught_up(engine, row, now), *engine.attempts.exited(exited, now)]


def _settled(engine: "Engine", row: AttemptRow, found: Observed | None, todo: RecoveryStep) -> list[Effect]:
    """Its last word is said: nothing of it may live, but for what could not be ended, which is watched on."""
    if found is not None and found.same_boot and found.child_alive and found.exit is not None and found.exit.survivors:
        engine.orphans.survivors[row.attempt] = found.exit.survivors
    match todo:
        case RecoveryStep.COLLECT:
            return [CollectAttempt(row.attempt)]
        case RecoveryStep.END_HUNG:
            return [EndHungShim(row.attempt, row.shim)]
        case RecoveryStep.SWEEP_REMAINS:
            return [SweepRemains(row.attempt)]
        case _:
            return []


def _hold(engine: "Engine", row: AttemptRow) -> None:
    """A living attempt holds its claims from the start; nobody else asks for them before recovery is through."""
    managed = {} if row.worktree_id is None else {resource(row.worktree_id): False}
    engine.claims.want(row.digest, {f"execution:{row.attempt.execution_id}": True, **managed})


def _caught_up(engine: "Engine", row: AttemptRow, now: Now) -> list[Effect]:
    """What was let go was accepted: a journal that was set back behind the files (INTENT, and it ran) says so now."""
    return engine.attempts.accept(row, now) if row.state is AttemptState.INTENT else []


def adopt(engine: "Engine", attempt: Attempt, now: Now) -> list[Effect]:
    """Connect, and say again what the shim may not have heard: its deadline, and a stop."""
    row = engine.attempts.rows[attempt]
    engine.leases.expect_loss(row, now)
    adopted = [AdoptAttempt(attempt, has_terminal(engine, row)), *engine.leases.push(row, now, lifted=True)]
    if row.stop_by is None:
        return adopted
    engine.orphans.expect_stop(attempt, row.stop_grace_ms, now)
    return [*adopted, StopAttempt(attempt, row.stop_grace_ms, row.stop_by)]


def _start_again(engine: "Engine", row: AttemptRow, now: Now) -> list[Effect]:
    """Provably never let go. An INTENT begins again with its pending command; one that has its receipt, right here."""
    engine.attempts.again.add(row.attempt)
    if engine.ledger.commands[row.digest].receipt_seq is None:
        engine.claims.drop(row.digest)
        return []
    reopened = engine.reopen(row.digest)
    if isinstance(reopened, Refusal):
        return engine.attempts.never(row.attempt, reopened, now)
    command, start = reopened
    assert isinstance(start, Start), "an attempt comes from a start"
    # The deadline in the journal may be of another boot, whose clock says nothing about this one.
    lease = engine.leases.granted(command.value, row, now)
    row = replace(row, state=AttemptState.INTENT, shim=None, lease=lease)
    engine.attempts.put(row)
    # Durable before its directory is cleared: PREPARED beside an empty one would be no proof that nothing ran.
    return [Persist((PutAttempt(row, now.wall_ms),)), *engine.attempts.begin(command, start, now)]


def sealed_secrets(engine: "Engine", attempt: Attempt) -> dict[str, str] | None:
    """The sealed secrets of an attempt's command by name; None when the command is not known or does not open any more."""
    row = engine.attempts.rows.get(attempt)
    if row is None or row.digest not in engine.ledger.commands:
        return None
    reopened = engine.reopen(row.digest)
    if isinstance(reopened, Refusal) or not isinstance(reopened[1], Start):
        return None
    return {secret.name: secret.sealed for secret in reopened[1].secrets}
