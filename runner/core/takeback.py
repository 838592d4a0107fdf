"""A daemon that starts takes back what an earlier one left: each attempt by the table of `recovery.decide`.

Adoption and sweeps come back as inputs. A living attempt holds its claims from here on, before any command is looked at.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from protocol.commands import ExecutionStart
from protocol.errors import Reason
from protocol.execution import AttemptState
from protocol.ids import Attempt
from runner.core.admission import Refusal
from runner.core.effects import AbandonAttempt, AdoptAttempt, CollectAttempt, Effect, Note, StopAttempt, SweepAttempt
from runner.core.inputs import AttemptExited, AttemptLost, Now
from runner.core.journaling import AttemptRow
from runner.core.plans import Observed
from runner.core.recovery import RecoveryStep, decide
from runner.core.trees import resource

if TYPE_CHECKING:
    from runner.core.engine import Engine


def take_back(engine: "Engine", found: Sequence[Observed], now: Now) -> list[Effect]:
    """Every attempt of the journal, in its order, and every directory the journal does not know."""
    on_disk = {observed.attempt: observed for observed in found}
    effects: list[Effect] = []
    for row in list(engine.attempts.rows.values()):
        effects += _known(engine, row, on_disk.pop(row.attempt, None), now)
    for observed in on_disk.values():
        effects += _unknown(observed)
    return effects


def _unknown(found: Observed) -> list[Effect]:
    if decide(None, found) is RecoveryStep.CLEAR:
        return [AbandonAttempt(found.attempt)]
    return [Note("alarm.raised", {"attempt": found.attempt.name, "reason": Reason.UNKNOWN_TARGET})]


def _known(engine: "Engine", row: AttemptRow, found: Observed | None, now: Now) -> list[Effect]:
    todo = decide(row.state, found)
    if row.state is AttemptState.SETTLED:
        return [CollectAttempt(row.attempt)] if todo is RecoveryStep.COLLECT else []
    _hold(engine, row)
    match todo:
        case RecoveryStep.START_AGAIN:
            return _start_again(engine, row, now)
        case RecoveryStep.SETTLE_NEVER:
            refusal = Refusal(Reason.NOT_RELEASED, "it was stopped before it was let go")
            return engine.attempts.never(row.attempt, refusal, now)
        case RecoveryStep.ADOPT:
            return [*_caught_up(engine, row, now), *_adopt(engine, row.attempt, now)]
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


def _hold(engine: "Engine", row: AttemptRow) -> None:
    """A living attempt holds its claims from the start; nobody else asks for them before recovery is through."""
    managed = {} if row.worktree_id is None else {resource(row.worktree_id): False}
    engine.claims.want(row.digest, {f"execution:{row.attempt.execution_id}": True, **managed})


def _caught_up(engine: "Engine", row: AttemptRow, now: Now) -> list[Effect]:
    """What was let go was accepted: a journal that was set back behind the files (INTENT, and it ran) says so now."""
    return engine.attempts.accept(row, now) if row.state is AttemptState.INTENT else []


def _adopt(engine: "Engine", attempt: Attempt, now: Now) -> list[Effect]:
    """Connect, and say again what the shim may not have heard: its deadline, and a stop."""
    row = engine.attempts.rows[attempt]
    stop = [] if row.stop_by is None else [StopAttempt(attempt, row.stop_grace_ms, row.stop_by)]
    return [AdoptAttempt(attempt), *engine.leases.push(row, now), *stop]


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
    assert isinstance(start, ExecutionStart), "an attempt comes from a start"
    # The deadline in the journal may be of another boot, whose clock says nothing about this one.
    lease = engine.leases.granted(command.value, row, now)
    engine.attempts.put(replace(row, state=AttemptState.INTENT, shim=None, lease=lease))
    return engine.attempts.begin(command, start, now)
