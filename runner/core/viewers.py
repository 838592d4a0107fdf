"""Viewers of PTYs: each is let in once, under one key, however often a daemon dies in between.

Theory of operation. Who is let in is kept in the attempt's own directory, beside what its shim counts: the same viewer may be let in
again until its file is there, so a command without a receipt is simply done once more. The receipt waits for the file, or for the end
of the attempt. What viewers type never passes through here.
"""

from typing import TYPE_CHECKING, Final

from protocol.commands import Command, Kind, PtyAttach
from protocol.envelope import Verified
from protocol.errors import Reason
from protocol.execution import AttemptState
from protocol.ids import Attempt, Digest
from protocol.receipt import Outcome
from runner.core.admission import Refusal
from runner.core.effects import AdmitViewer, Effect
from runner.core.inputs import Now, ViewerAdmitted, ViewerNotAdmitted
from runner.core.journaling import AttemptRow

if TYPE_CHECKING:
    from runner.core.engine import Engine

PENDING_MAX: Final = 1024
"""Files that are being written: a disk that stands still must not fill memory."""


class Viewers:
    """Viewers whose file is not there yet, by the digest of their command."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._pending: Final[dict[Digest, PtyAttach]] = {}

    def attach(self, command: Verified[Command], args: PtyAttach, now: Now, *, again: bool = False) -> list[Effect]:
        """A signed word that lets a viewer in. `again`: an earlier daemon may have done it."""
        refusal = self._refusal(args)
        if refusal is not None:
            outcome = Outcome.FAILED if again else Outcome.REFUSED
            return self._engine.receipt(command.digest, outcome, now, reason=refusal.reason, detail=refusal.detail)
        self._pending[command.digest] = args
        return [AdmitViewer(args.attempt, args.viewer, args.key, args.mode, command.digest)]

    def _refusal(self, args: PtyAttach) -> Refusal | None:
        row = self._engine.attempts.rows.get(args.attempt)
        if row is None:
            return Refusal(Reason.UNKNOWN_TARGET, "there is no such attempt")
        if row.state is AttemptState.SETTLED:
            return Refusal(Reason.NOT_RUNNING, "it is over")
        if not has_terminal(self._engine, row):
            return Refusal(Reason.NOT_A_PTY, "it has no terminal")
        if row.state is AttemptState.INTENT:
            return Refusal(Reason.NOT_RUNNING, "it has not begun")
        if len(self._pending) >= PENDING_MAX:
            return Refusal(Reason.CAPACITY, "too many viewers are on their way in")
        return None

    def heard(self, happened: ViewerAdmitted | ViewerNotAdmitted, now: Now) -> list[Effect]:
        """The file is there, or why it is not."""
        args = self._pending.pop(happened.digest, None)
        if args is None:
            return []
        if isinstance(happened, ViewerAdmitted):
            result = {"viewer": args.viewer, "mode": args.mode.value}
            return self._engine.receipt(happened.digest, Outcome.DONE, now, result=result)
        outcome = Outcome.REFUSED if happened.refused else Outcome.FAILED
        return self._engine.receipt(happened.digest, outcome, now, reason=happened.reason, detail=happened.detail)

    def ended(self, attempt: Attempt, now: Now) -> list[Effect]:
        """It is settled: there is nothing to look at any more, whether its file came to be or not."""
        effects: list[Effect] = []
        for digest in [digest for digest, args in self._pending.items() if args.attempt == attempt]:
            del self._pending[digest]
            detail = "it ended before the viewer was let in"
            effects += self._engine.receipt(digest, Outcome.FAILED, now, reason=Reason.NOT_RUNNING, detail=detail)
        return effects


def has_terminal(engine: "Engine", row: AttemptRow) -> bool:
    """Whether an attempt is a PTY: its command says so, which is known as long as the attempt lives."""
    command = engine.ledger.commands.get(row.digest)
    return command is not None and command.kind == Kind.PTY_OPEN
