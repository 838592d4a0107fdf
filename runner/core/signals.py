"""Signals to living attempts: each is passed on once, however often a daemon dies in between.

Theory of operation. The shim remembers ids, so the same signal may be asked for again until its answer is heard; the receipt waits
for that answer, or for the end of the attempt.
"""

from typing import TYPE_CHECKING, Final

from protocol.commands import Command, ExecutionSignal
from protocol.envelope import Verified
from protocol.errors import Reason
from protocol.execution import AttemptState
from protocol.ids import Attempt, Digest
from protocol.receipt import Outcome
from runner.core.admission import Refusal
from runner.core.effects import Effect, SignalAttempt
from runner.core.inputs import AttemptSignalled, Now

if TYPE_CHECKING:
    from runner.core.engine import Engine

ID_BYTES: Final = 8
"""Of the command's digest: enough to tell the signals of one attempt apart."""
PENDING_MAX: Final = 256
"""As many ids as a shim remembers."""


class Signals:
    """Signals that have no answer yet, by their id."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._pending: Final[dict[bytes, tuple[Digest, Attempt]]] = {}

    def send(self, command: Verified[Command], args: ExecutionSignal, now: Now, *, again: bool = False) -> list[Effect]:
        """A signed signal to an attempt that runs. `again`: an earlier daemon may have sent it."""
        row = self._engine.attempts.rows.get(args.attempt)
        refusal = None
        if row is None:
            refusal = Refusal(Reason.UNKNOWN_TARGET, "there is no such attempt")
        elif row.state is AttemptState.INTENT:
            refusal = Refusal(Reason.NOT_RUNNING, "it has not begun")
        elif row.state is AttemptState.SETTLED:
            refusal = Refusal(Reason.NOT_RUNNING, "it is over")
        elif len(self._pending) >= PENDING_MAX:
            refusal = Refusal(Reason.CAPACITY, "too many signals have no answer")
        if refusal is not None:
            outcome = Outcome.FAILED if again else Outcome.REFUSED
            return self._engine.receipt(command.digest, outcome, now, reason=refusal.reason, detail=refusal.detail)
        name = bytes.fromhex(command.digest.rpartition(":")[2])[:ID_BYTES]
        self._pending[name] = (command.digest, args.attempt)
        return [SignalAttempt(args.attempt, name, args.signal, args.to == "tree")]

    def answered(self, signalled: AttemptSignalled, now: Now) -> list[Effect]:
        """The shim told how many processes it reached."""
        digest, _ = self._pending.pop(signalled.id, (None, None))
        if digest is None:
            return []
        return self._engine.receipt(digest, Outcome.DONE, now, result={"reached": signalled.count})

    def ended(self, attempt: Attempt, now: Now) -> list[Effect]:
        """It is settled: whether it got what has no answer yet nobody knows."""
        effects: list[Effect] = []
        for name, (digest, other) in list(self._pending.items()):
            if other == attempt:
                del self._pending[name]
                detail = "it ended before its shim told whom the signal reached"
                effects += self._engine.receipt(digest, Outcome.FAILED, now, reason=Reason.NOT_RUNNING, detail=detail)
        return effects
