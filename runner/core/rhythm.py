"""The engine's rhythm: sessions, beats, what both sides know of each other, and waking up.

Theory of operation. A beat is sent when the plane's interval is over or a lease is due, whichever comes first. Every RECONCILE_MS, on
connecting and after a wake it carries full lists, and its answer a hint for every attempt the plane counts as ours; what one side
has and the other has not is told, fetched or reported again, so that no lost message matters for longer than that.

Rule 1: a hint is unsigned: it makes us ask and repeat, never act. Rule 2: after a sleep leases are renewed first, judged after.
"""

from typing import TYPE_CHECKING, Final

from protocol.errors import Reason
from protocol.events import EventKind
from protocol.execution import AttemptState
from protocol.handshake import Established
from protocol.ids import Attempt, CommandId
from protocol.limits import FETCH_ITEMS_MAX, HANDSHAKE_TIMEOUT_MS, RECONCILE_MS, WAKE_WAIT_MS
from protocol.messages import Fetch, Hint
from protocol.session import BeatAnswered
from runner.core.effects import Effect, Note, Redial, ReportAgain, Say, ScanOrphans, SendBeat
from runner.core.inputs import Now, Woke
from runner.core.journaling import AttemptRow

if TYPE_CHECKING:
    from runner.core.engine import Engine

RENEW_RETRY_MS: Final = 2 * 1000
"""A renewal that has no answer yet is asked for again no sooner than this."""


class Rhythm:
    """When to speak, and what to make of the answers."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self.session_up = False
        self.plane_offset_ms: int | None = None
        """Control plane's wall clock minus our BOOTTIME, from the last welcome or beat."""
        self.beat_ms = 0
        self.next_beat_ms = 0
        self.renew_after_ms = 0
        """No renewal is asked for before this (BOOTTIME)."""
        self._full_at_ms = 0
        self.unsure_until_ms = 0
        self.waking_until_ms = 0
        """Until then (BOOTTIME) leases whose deadline passed in a sleep are renewed and not judged."""
        self._woke_ms = self._slept_ms = 0
        self._late_ms = 0
        """How old the plane's word on its clock may have been when it came."""
        self._unknown: set[Attempt] = set()

    # --- questions ----------------------------------------------------------------------------------------------

    def plane_ms(self, now: Now) -> int:
        """The control plane's clock; our own wall clock before the first welcome of this daemon."""
        return now.wall_ms if self.plane_offset_ms is None else now.boot_ms + self.plane_offset_ms

    def plane_latest_ms(self, now: Now) -> int:
        """The latest it can be there: what we know of its clock was said while it was on its way to us."""
        return self.plane_ms(now) + self._late_ms

    def waking(self, now: Now) -> bool:
        """Whether the machine woke up a moment ago and leases are being renewed."""
        return now.boot_ms < self.waking_until_ms

    def next_moment_ms(self) -> int | None:
        """When a Tick is due (BOOTTIME) for a beat, a lease, or the end of waking up."""
        lease_ms = self._engine.leases.next_moment_ms(renewing=self.session_up)
        moments = (self.next_beat_ms if self.session_up else None, lease_ms)
        return min((moment for moment in moments if moment is not None), default=None)

    # --- what happens -------------------------------------------------------------------------------------------

    def up(self, established: Established, now: Now) -> list[Effect]:
        """A handshake succeeded: full lists first of all."""
        self.session_up = True
        self.plane_offset_ms = established.now_ms - now.boot_ms
        # A handshake takes no longer than its timeout, which stands still while the machine sleeps.
        asleep = now.boot_ms - self._woke_ms <= HANDSHAKE_TIMEOUT_MS
        self._late_ms = HANDSHAKE_TIMEOUT_MS + (self._slept_ms if asleep else 0)
        self.beat_ms = established.beat_ms
        self._full_at_ms = now.boot_ms
        self._unknown.clear()
        return self._beat(now)

    def down(self) -> None:
        """The connection is gone."""
        self.session_up = False

    def begun(self, now: Now) -> None:
        """The machine woke, or this daemon started and cannot know whether it did a moment ago: shims may be waiting for a renewal."""
        self.unsure_until_ms = now.boot_ms + WAKE_WAIT_MS

    def woke(self, woke: Woke, now: Now) -> list[Effect]:
        """The machine slept: what is connected is dead or unsure, leases may be over, anything may have ended."""
        self._woke_ms, self._slept_ms = now.boot_ms, woke.slept_ms
        self.waking_until_ms = now.boot_ms + WAKE_WAIT_MS
        self.begun(now)
        self._engine.orphans.woke(woke.slept_ms)
        self._full_at_ms = now.boot_ms
        return [Note("machine.woke", {"slept_ms": woke.slept_ms}), Redial(), ScanOrphans()]

    def tick(self, now: Now) -> list[Effect]:
        """A beat, if one is due."""
        if not self.session_up:
            return []
        renewal = now.boot_ms >= self.renew_after_ms and self._engine.leases.due(now)
        return self._beat(now) if renewal or now.boot_ms >= self.next_beat_ms else []

    def beat_now(self, now: Now) -> list[Effect]:
        """Something the plane should know at once."""
        return self._beat(now) if self.session_up else []

    def _beat(self, now: Now) -> list[Effect]:
        engine = self._engine
        self.next_beat_ms = now.boot_ms + self.beat_ms
        self.renew_after_ms = now.boot_ms + RENEW_RETRY_MS
        full = now.boot_ms >= self._full_at_ms
        if full:
            self._full_at_ms = now.boot_ms + RECONCILE_MS
        beat = SendBeat(
            engine.ledger.ctl.hw,
            engine.leases.held(),
            (*engine.attempts.living_names(), *engine.attempts.strangers),
            engine.leases.lost(),
            full,
            engine.gate.admission,
        )
        return [beat]

    def answered(self, answered: BeatAnswered, now: Now) -> list[Effect]:
        """The plane's clock and interval, renewed leases, hints."""
        self.beat_ms = answered.beat_ms
        self.plane_offset_ms = answered.now_ms - now.boot_ms
        self._late_ms = now.boot_ms - answered.sent_ms
        effects = self._engine.leases.beat_answered(answered, now)
        if self.waking(now) and answered.sent_ms >= self._woke_ms:
            # Renewed first: now what was not renewed is judged.
            self.waking_until_ms = 0
            effects += self._engine.leases.tick(now)
        return effects + self._hinted(answered.hints) + (self._strangers(answered, now) if answered.full else [])

    def _hinted(self, hints: tuple[Hint, ...]) -> list[Effect]:
        """What the plane waits for: fetch the command it names, or say again what became of it."""
        missing: dict[str, None] = {}
        again: dict[int, None] = {}
        for hint in hints:
            digest = self._engine.ledger.first.get(CommandId(hint.cmd_id))
            row = self._engine.attempts.rows.get(Attempt.parse(hint.attempt))
            if digest is None:
                missing[hint.cmd_id] = None
            elif (receipt := self._engine.ledger.commands[digest].receipt_seq) is not None and _never_began(row):
                again[receipt] = None
            if row is not None and row.settled_seq is not None:
                again[row.settled_seq] = None
        effects: list[Effect] = [ReportAgain(tuple(again))] if again else []
        if missing:
            effects.append(Say(Fetch(cmd_ids=list(missing)[:FETCH_ITEMS_MAX])))
        return effects

    def _strangers(self, answered: BeatAnswered, now: Now) -> list[Effect]:
        """Attempts that live here and that the plane does not count as ours: told once, kept, ended by a signed word only."""
        known = {hint.attempt for hint in answered.hints}
        effects: list[Effect] = []
        for row in self._engine.attempts.living_rows():
            if row.attempt.name in known or row.attempt in self._unknown:
                continue
            self._unknown.add(row.attempt)
            effects.append(Note("attempt.unknown", {"attempt": row.attempt.name}))
            effects += self._engine.tell(
                EventKind.ATTEMPT_UNKNOWN, now, attempt=row.attempt, reason=Reason.UNKNOWN_TARGET
            )
        return effects


def _never_began(row: AttemptRow | None) -> bool:
    """Whether the receipt of its command is the last word there is: it was refused, and so never settled."""
    return row is None or (row.state is AttemptState.SETTLED and row.settled_seq is None)
