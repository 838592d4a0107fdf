"""A session after the handshake, as two machines that know no transport: what to send, what to send again, what was answered.

Theory of operation. Towards the runner travel commands: numbered ones until the runner's mark (told by `beat` and `need`)
covers them, safety ones until a receipt names them. Towards the plane travel report items: each until its own final answer,
so one item that is refused blocks no other. Everything may be lost, doubled or reordered on the way; a silence of RETRY_MS sends again.
Logs are not here: they have offsets of their own.

Rule 1: a machine holds a bounded number of items (`room`); the rest waits in a database. Rule 2: both take `now_ms` from one
monotonic clock of their side and never look at another.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from protocol.errors import CloseCode, Reason, RemoteError
from protocol.limits import (
    COMMANDS_UNACKED_MAX,
    REPORT_BYTES_MAX,
    REPORT_ITEMS_MAX,
    REPORTS_IN_FLIGHT_MAX,
    RETRY_MS,
)
from protocol.messages import (
    Answer,
    AttemptName,
    Beat,
    Beaten,
    CommandFrame,
    HeldLease,
    Hint,
    Need,
    Renewal,
    Report,
    Reported,
    ReportItem,
)

OUTBOX_ROOM: Final = REPORTS_IN_FLIGHT_MAX * REPORT_ITEMS_MAX
BEATS_IN_FLIGHT_MAX: Final = 8
"""Beats whose answer is awaited; an answer to an older one tells nothing any more."""
_ITEM_OVERHEAD_BYTES: Final = 64


@dataclass(frozen=True, slots=True)
class BeatAnswered:
    """A beat that was sent at `sent_ms` was answered."""

    sent_ms: int
    now_ms: int
    beat_ms: int
    leases: tuple[Renewal, ...]
    hints: tuple[Hint, ...]


@dataclass(frozen=True, slots=True)
class ItemsAnswered:
    """These items are final: stored, or refused for ever."""

    answers: tuple[Answer, ...]


@dataclass(slots=True)
class RunnerSession:
    """The runner's side. Feed it items in the order of `out_seq`; `outgoing` says what to send now."""

    out_hw: int
    """Every item up to here is known to be stored."""
    beat_ms: int
    cursor: int = field(init=False)
    """Highest `out_seq` it was fed."""
    _fresh: list[ReportItem] = field(default_factory=list)
    _waiting: dict[int, ReportItem] = field(default_factory=dict)
    _sent_ms: int = 0
    _beats: dict[int, int] = field(default_factory=dict)
    _beat_n: int = 0

    def __post_init__(self) -> None:
        self.cursor = self.out_hw

    @property
    def room(self) -> int:
        """How many more items it takes."""
        return OUTBOX_ROOM - len(self._fresh) - len(self._waiting)

    def feed(self, items: Iterable[ReportItem]) -> None:
        """Take items to report; those up to `cursor` are known already."""
        for item in items:
            if item.out_seq > self.cursor:
                assert self.room > 0, "feed no more than room"
                self._fresh.append(item)
                self.cursor = item.out_seq

    def again(self, items: Iterable[ReportItem]) -> None:
        """Report these once more although they were answered: a command came twice and wants its receipt."""
        known = self._waiting.keys() | {item.out_seq for item in self._fresh}
        self._fresh.extend(item for item in items if item.out_seq not in known)

    def outgoing(self, now_ms: int) -> list[Report]:
        """Reports to send now: what is fresh, and everything unanswered after a silence."""
        if self._waiting and now_ms - self._sent_ms >= RETRY_MS:
            self._fresh = [*self._waiting.values(), *self._fresh]
            self._waiting.clear()
        reports = []
        while self._fresh:
            items = _fitting(self._fresh)
            del self._fresh[: len(items)]
            self._waiting.update((item.out_seq, item) for item in items)
            self._sent_ms = now_ms
            reports.append(Report(items=list(items)))
        return reports

    def beat(
        self, now_ms: int, hw: int, leases: Sequence[HeldLease] = (), attempts: Sequence[AttemptName] = ()
    ) -> Beat:
        """The next beat."""
        self._beat_n += 1
        self._beats[self._beat_n] = now_ms
        while len(self._beats) > BEATS_IN_FLIGHT_MAX:
            del self._beats[min(self._beats)]
        return Beat(n=self._beat_n, hw=hw, leases=list(leases), attempts=list(attempts))

    def receive(self, message: Reported | Beaten) -> ItemsAnswered | BeatAnswered | None:
        """Take an answer; None when it tells nothing new."""
        if isinstance(message, Beaten):
            sent_ms = self._beats.pop(message.n, None)
            if sent_ms is None:
                return None
            self._beats = {n: at for n, at in self._beats.items() if n > message.n}
            self.beat_ms = message.beat_ms
            return BeatAnswered(sent_ms, message.now_ms, message.beat_ms, tuple(message.leases), tuple(message.hints))
        final = tuple(a for a in message.answers if self._waiting.pop(a.out_seq, None) is not None)
        return ItemsAnswered(final) if final else None


def _fitting(items: Sequence[ReportItem]) -> Sequence[ReportItem]:
    """As many of the first items as fit one report; always at least one."""
    size = 0
    for count, item in enumerate(items):
        # In a text frame every quote of an envelope is escaped: count what is sent, not what is held.
        size += len(item.body) + item.body.count('"') + item.body.count("\\") + _ITEM_OVERHEAD_BYTES
        if count == REPORT_ITEMS_MAX or (count and size > REPORT_BYTES_MAX):
            return items[:count]
    return items


@dataclass(frozen=True, slots=True)
class SentCommand:
    """A sealed command: `seq` is None on the safety stream."""

    cmd_digest: str
    seq: int | None
    env: str


@dataclass(slots=True)
class PlaneSession:
    """The plane's side: what of the sealed commands the runner still has to get."""

    acked_hw: int
    """The runner has consumed `ctl` up to here."""
    _ctl: dict[int, SentCommand] = field(default_factory=dict)
    _safety: dict[str, SentCommand] = field(default_factory=dict)
    _next: int = field(init=False)
    _urgent: list[SentCommand] = field(default_factory=list)
    _moved_ms: int = 0
    _safety_ms: int = 0

    def __post_init__(self) -> None:
        self._next = self.acked_hw + 1

    @property
    def room(self) -> int:
        """How many more commands may be under way."""
        return COMMANDS_UNACKED_MAX - len(self._ctl) - len(self._safety)

    def queue(self, command: SentCommand) -> None:
        """Take a sealed command to send; doubles are ignored."""
        if command.seq is None:
            if command.cmd_digest not in self._safety:
                self._safety[command.cmd_digest] = command
                self._urgent.append(command)
        elif command.seq > self.acked_hw:
            self._ctl.setdefault(command.seq, command)

    def outgoing(self, now_ms: int) -> list[CommandFrame]:
        """Commands to send now: safety first, then `ctl` in order; after a silence everything unanswered again."""
        if self._ctl and self._next > min(self._ctl) and now_ms - self._moved_ms >= RETRY_MS:
            self._next = min(self._ctl)
        if self._safety and not self._urgent and now_ms - self._safety_ms >= RETRY_MS:
            self._urgent = list(self._safety.values())
        if self._urgent:
            self._safety_ms = now_ms
        frames = [CommandFrame(env=command.env) for command in self._urgent]
        self._urgent = []
        while (command := self._ctl.get(self._next)) is not None:
            frames.append(CommandFrame(env=command.env))
            self._next += 1
            self._moved_ms = now_ms
        return frames

    def receive(self, message: Need | Beat) -> None:
        """Take the runner's mark. Raises RemoteError when it asks for what was never sent."""
        if isinstance(message, Beat):
            self.consumed(message.hw)
            return
        if message.seq > self._next:
            raise RemoteError(Reason.SEQ_GAP, "asked for a number from the future", CloseCode.BAD_FRAME)
        self.consumed(message.seq - 1)
        self._next = max(message.seq, self.acked_hw + 1)

    def consumed(self, hw: int) -> None:
        """The runner has consumed `ctl` up to `hw`."""
        if hw > self.acked_hw:
            self.acked_hw = hw
            self._next = max(self._next, hw + 1)
            self._ctl = {seq: command for seq, command in self._ctl.items() if seq > hw}

    def receipted(self, cmd_digest: str, seq: int | None) -> None:
        """A receipt came: a safety command is done with, a numbered one is consumed."""
        if seq is None:
            self._safety.pop(cmd_digest, None)
            self._urgent = [command for command in self._urgent if command.cmd_digest != cmd_digest]
        elif seq in self._ctl and self._ctl[seq].cmd_digest == cmd_digest:
            self.consumed(seq)
