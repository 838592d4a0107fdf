"""What a daemon that starts does with each attempt: journal state × what is found on disk → one step.

Theory of operation. The journal says how far we had decided; the directory says how far the shim got. A release happens only
after PREPARED is durable, so an INTENT never ran. A shim writes `released` before it starts anything, so within one boot a free
lock without that mark means it never ran either. Across boots unsynced files prove nothing, so the attempt is lost.

Rule 1: only what was provably never released is started again.
Rule 2: another boot means that no process of ours is alive, so none is signalled.
"""

from enum import StrEnum

from protocol.execution import AttemptState
from runner.core.plans import Observed, Phase


class RecoveryStep(StrEnum):
    """What is to be done with one attempt."""

    START_AGAIN = "start_again"
    ADOPT = "adopt"
    """Its shim lives, or its exit record waits to be read: connect, or read it."""
    SETTLE_EXIT = "settle_exit"
    SETTLE_NEVER = "settle_never"
    LOST_SHIM = "lost_shim"
    LOST_REBOOT = "lost_reboot"
    COLLECT = "collect"
    """Settled already, and its shim still lingers."""
    CLEAR = "clear"
    """Nothing ran and nobody asks for it: remove the directory."""
    END_HUNG = "end_hung"
    """Its shim holds the lock and does nothing, and its end is wanted: KILL the shim, then sweep."""
    SWEEP_REMAINS = "sweep_remains"
    """Settled already, its shim is gone, and something of it lives."""
    REPORT = "report"
    """It ran and the journal does not know it: leave it alone, tell everybody."""
    NOTHING = "nothing"


def decide(state: AttemptState | None, found: Observed | None) -> RecoveryStep:
    """The step for an attempt the journal has in `state` (None: unknown) and the disk as `found` (None: no directory)."""
    match state:
        case None:
            return RecoveryStep.NOTHING if found is None else _unknown(found)
        case AttemptState.SETTLED:
            return RecoveryStep.NOTHING if found is None else _over(found)
        case AttemptState.INTENT:
            return RecoveryStep.START_AGAIN if found is None else _intended(found)
        case AttemptState.PREPARED | AttemptState.RUNNING:
            return RecoveryStep.LOST_SHIM if found is None else _begun(found, RecoveryStep.START_AGAIN)
        case AttemptState.STOPPING:
            if found is None:
                return RecoveryStep.LOST_SHIM
            step = _begun(found, RecoveryStep.SETTLE_NEVER)
            hung = step is RecoveryStep.ADOPT and not found.shim_answers
            return RecoveryStep.END_HUNG if hung else step


def _over(found: Observed) -> RecoveryStep:
    if not found.same_boot:
        return RecoveryStep.NOTHING
    if found.lock_held:
        return RecoveryStep.COLLECT if found.shim_answers else RecoveryStep.END_HUNG
    return RecoveryStep.SWEEP_REMAINS if found.child_alive else RecoveryStep.NOTHING


def _intended(found: Observed) -> RecoveryStep:
    """INTENT in the journal: its release was never due. Should the files say otherwise, the files are the evidence."""
    ended = found.exit is not None and not found.exit.unreleased
    return _begun(found, RecoveryStep.START_AGAIN) if ended or _ran(found) else RecoveryStep.START_AGAIN


def _begun(found: Observed, never_released: RecoveryStep) -> RecoveryStep:
    if found.exit is not None:
        # A record that says it was never let go, beside marks that it was, is nobody's proof.
        return never_released if found.exit.unreleased and not _ran(found) else RecoveryStep.SETTLE_EXIT
    if not found.same_boot:
        return RecoveryStep.LOST_REBOOT
    if found.lock_held:
        return RecoveryStep.ADOPT
    # Who was PREPARED left `ready` behind; where even that is gone, the files prove nothing.
    return RecoveryStep.LOST_SHIM if _ran(found) or found.phase is Phase.NONE else never_released


def _unknown(found: Observed) -> RecoveryStep:
    ran = _ran(found) or (found.exit is not None and not found.exit.unreleased)
    return RecoveryStep.REPORT if ran else RecoveryStep.CLEAR


def _ran(found: Observed) -> bool:
    """Whether it was let go, by its files, or by what lives: only what was let go can carry the cookie."""
    released = found.phase in (Phase.RELEASED, Phase.RUNNING)
    return released or (found.child_alive and found.same_boot)
