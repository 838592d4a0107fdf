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
    REPORT = "report"
    """It ran and the journal does not know it: leave it alone, tell everybody."""
    NOTHING = "nothing"


def decide(state: AttemptState | None, found: Observed | None) -> RecoveryStep:
    """The step for an attempt the journal has in `state` (None: unknown) and the disk as `found` (None: no directory)."""
    match state:
        case None:
            return RecoveryStep.NOTHING if found is None else _unknown(found)
        case AttemptState.SETTLED:
            living = found is not None and found.lock_held
            return RecoveryStep.COLLECT if living else RecoveryStep.NOTHING
        case AttemptState.INTENT:
            return RecoveryStep.START_AGAIN if found is None else _intended(found)
        case AttemptState.PREPARED | AttemptState.RUNNING:
            return RecoveryStep.LOST_SHIM if found is None else _begun(found, RecoveryStep.START_AGAIN)
        case AttemptState.STOPPING:
            return RecoveryStep.LOST_SHIM if found is None else _begun(found, RecoveryStep.SETTLE_NEVER)


def _intended(found: Observed) -> RecoveryStep:
    """INTENT in the journal: its release was never due. Should the files say otherwise, the files are the evidence."""
    ran = found.phase in (Phase.RELEASED, Phase.RUNNING)
    return _begun(found, RecoveryStep.START_AGAIN) if ran else RecoveryStep.START_AGAIN


def _begun(found: Observed, never_released: RecoveryStep) -> RecoveryStep:
    if found.exit is not None:
        return never_released if found.exit.unreleased else RecoveryStep.SETTLE_EXIT
    if not found.same_boot:
        return RecoveryStep.LOST_REBOOT
    if found.lock_held:
        return RecoveryStep.ADOPT
    return RecoveryStep.LOST_SHIM if found.phase in (Phase.RELEASED, Phase.RUNNING) else never_released


def _unknown(found: Observed) -> RecoveryStep:
    ran = found.phase in (Phase.RELEASED, Phase.RUNNING) or (found.exit is not None and not found.exit.unreleased)
    return RecoveryStep.REPORT if ran else RecoveryStep.CLEAR
