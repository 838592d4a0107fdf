"""A session after the handshake, as two machines that know no transport: what to send, what to send again, what was answered.

Theory of operation. Towards the runner travel commands: numbered ones until the runner's mark (told by `beat` and `need`)
covers them, safety ones until a receipt names them. Towards the plane travel report items: each until its own final answer,
so one item that is refused blocks no other. Everything may be lost, doubled or reordered on the way; what has had no answer for
RETRY_MS is sent again, each by its own clock, since a stream that never falls silent would else never repeat what it lost.
Logs are not here: they have offsets of their own.

Rule 1: a machine holds a bounded number of items (`room`); the rest waits in a database. Rule 2: both take `now_ms` from one
monotonic clock of their side and never look at another. Rule 3: `outgoing` is asked after every input and at every tick.
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
    full: bool = False


@dataclass(frozen=True, slots=True)
class ItemsAnswered:
    """These items are final: stored, or refused for ever."""

    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class _SentItem:
    item: ReportItem
    sent_ms: int
    report: int


@dataclass(slots=True)
class RunnerSession:
    """The runner's side. Feed it items in the order of `out_seq`; `outgoing` says what to send now."""

    out_hw: int
    """Every item up to here is known to be stored."""
    beat_ms: int
    cursor: int = field(init=False)
    """Highest `out_seq` it was fed."""
    _fresh: list[ReportItem] = field(default_factory=list)
    _waiting: dict[int, _SentItem] = field(default_factory=dict)
    _reports: int = 0
    _beats: dict[int, int] = field(default_factory=dict)
    _beat_n: int = 0

    def __post_init__(self) -> None:
        self.cursor = self.out_hw

    @property
    def room(self) -> int:
        """How many more items it takes; never negative."""
        return max(0, OUTBOX_ROOM - len(self._fresh) - len(self._waiting))

    @property
    def waiting(self) -> bool:
        """Whether anything that was sent has no answer yet: then `outgoing` is to be asked again after RETRY_MS."""
        return bool(self._waiting)

    def feed(self, items: Iterable[ReportItem]) -> None:
        """Take items to report; those up to `cursor` are known already."""
        for item in items:
            if item.out_seq > self.cursor:
                assert self.room > 0, "feed no more than room"
                self._fresh.append(item)
                self.cursor = item.out_seq

    def again(self, items: Iterable[ReportItem]) -> None:
        """Report these once more although they were answered: a command came twice and wants its receipt.

        What is above `cursor` comes by `feed` anyway, and what finds no room is asked for again by its command.
        """
        known = self._waiting.keys() | {item.out_seq for item in self._fresh}
        for item in items:
            if item.out_seq <= self.cursor and item.out_seq not in known and self.room > 0:
                self._fresh.append(item)
                known = known | {item.out_seq}

    def outgoing(self, now_ms: int) -> list[Report]:
        """Reports to send now: what had no answer for RETRY_MS, then what is fresh, as far as REPORTS_IN_FLIGHT_MAX allows."""
        if not (self._fresh or self._waiting):
            return []
        silent = [sent.item for sent in self._waiting.values() if now_ms - sent.sent_ms >= RETRY_MS]
        for item in silent:
            del self._waiting[item.out_seq]
        self._fresh[:0] = silent
        in_flight = len({sent.report for sent in self._waiting.values()})
        reports: list[Report] = []
        while self._fresh and in_flight + len(reports) < REPORTS_IN_FLIGHT_MAX:
            items = _fitting(self._fresh)
            del self._fresh[: len(items)]
            self._reports += 1
            self._waiting.update((item.out_seq, _SentItem(item, now_ms, self._reports)) for item in items)
            reports.append(Report(items=items))
        return reports

    def beat(
        self,
        now_ms: int,
        hw: int,
        leases: Sequence[HeldLease] = (),
        attempts: Sequence[AttemptName] = (),
        *,
        lost: Sequence[HeldLease] = (),
        full: bool = False,
        admission: str = "open",
    ) -> Beat:
        """The next beat."""
        self._beat_n += 1
        self._beats[self._beat_n] = now_ms
        while len(self._beats) > BEATS_IN_FLIGHT_MAX:
            del self._beats[min(self._beats)]
        return Beat(
            n=self._beat_n,
            hw=hw,
            leases=list(leases),
            attempts=list(attempts),
            lost=list(lost),
            full=full,
            admission=admission,
        )

    def receive(self, message: Reported | Beaten) -> ItemsAnswered | BeatAnswered | None:
        """Take an answer; None when it tells nothing new."""
        if isinstance(message, Beaten):
            sent_ms = self._beats.pop(message.n, None)
            if sent_ms is None:
                return None
            self._beats = {n: at for n, at in self._beats.items() if n > message.n}
            self.beat_ms = message.beat_ms
            return BeatAnswered(
                sent_ms, message.now_ms, message.beat_ms, tuple(message.leases), tuple(message.hints), message.full
            )
        held = self._waiting.keys() | {item.out_seq for item in self._fresh}
        final = tuple({answer.out_seq: answer for answer in message.answers if answer.out_seq in held}.values())
        numbers = {answer.out_seq for answer in final}
        self._waiting = {n: sent for n, sent in self._waiting.items() if n not in numbers}
        self._fresh = [item for item in self._fresh if item.out_seq not in numbers]
        return ItemsAnswered(final) if final else None


def _fitting(items: Sequence[ReportItem]) -> list[ReportItem]:
    """As many of the first items as fit one report, as a list of its own; always at least one."""
    size = 0
    for count, item in enumerate(items):
        # In a text frame every quote is escaped and text is UTF-8: count what is sent, not what is held.
        size += len(item.body.encode()) + item.body.count('"') + item.body.count("\\") + _ITEM_OVERHEAD_BYTES
        if count == REPORT_ITEMS_MAX or (count and size > REPORT_BYTES_MAX):
            return list(items[:count])
    return list(items)


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
    _furthest: int = field(init=False)
    """The number after the last that was ever sent here: going back to resend does not unsend it."""
    _sent_ms: dict[str, int] = field(default_factory=dict)
    """When each unanswered command was sent last, by digest; a safety command that is not here is to be sent now."""
    _asked: int = 0
    """Number the stream was sent again from, on the runner's word; the same word does it once until it moves or times out."""

    def __post_init__(self) -> None:
        self._next = self._furthest = self.acked_hw + 1

    @property
    def room(self) -> int:
        """How many more `ctl` commands may be under way; safety commands wait for no room."""
        return max(0, COMMANDS_UNACKED_MAX - len(self._ctl) - len(self._safety))

    def queue(self, command: SentCommand) -> None:
        """Take a sealed command to send; doubles are ignored."""
        if command.seq is None:
            self._safety.setdefault(command.cmd_digest, command)
        elif command.seq > self.acked_hw:
            self._ctl.setdefault(command.seq, command)

    def outgoing(self, now_ms: int) -> list[CommandFrame]:
        """Commands to send now: safety first, then `ctl` in order; what had no answer for RETRY_MS goes again."""
        due = [c for c in self._safety.values() if self._silent(c, now_ms)]
        first = self._ctl.get(min(self._ctl, default=0))
        if first is not None and first.seq is not None and first.seq < self._next and self._silent(first, now_ms):
            self._next, self._asked = first.seq, 0
        while (command := self._ctl.get(self._next)) is not None:
            due.append(command)
            self._next += 1
        self._furthest = max(self._furthest, self._next)
        self._sent_ms.update((command.cmd_digest, now_ms) for command in due)
        return [CommandFrame(env=command.env) for command in due]

    def _silent(self, command: SentCommand, now_ms: int) -> bool:
        sent_ms = self._sent_ms.get(command.cmd_digest)
        return sent_ms is None or now_ms - sent_ms >= RETRY_MS

    def receive(self, message: Need | Beat) -> None:
        """Take the runner's mark. Raises RemoteError when it asks for what was never sent."""
        if isinstance(message, Beat):
            self.consumed(message.hw)
            return
        if message.seq > self._furthest:
            raise RemoteError(Reason.SEQ_GAP, "asked for a number from the future", CloseCode.BAD_FRAME)
        self.consumed(message.seq - 1)
        # Every later number that met the same gap asks once more, and a number that is refused stays a gap for ever:
        # going back at each word would send the stream in circles.
        if message.seq == self.acked_hw + 1 and message.seq != self._asked:
            self._next = self._asked = message.seq

    def consumed(self, hw: int) -> None:
        """The runner has consumed `ctl` up to `hw`."""
        if hw > self.acked_hw:
            self.acked_hw = hw
            self._next = max(self._next, hw + 1)
            self._furthest = max(self._furthest, self._next)
            for seq in [seq for seq in self._ctl if seq <= hw]:
                self._sent_ms.pop(self._ctl.pop(seq).cmd_digest, None)

    def receipted(self, cmd_digest: str, seq: int | None) -> None:
        """A receipt came: a safety command is done with, a numbered one is consumed."""
        if seq is None:
            if self._safety.pop(cmd_digest, None) is not None:
                self._sent_ms.pop(cmd_digest, None)
        elif seq in self._ctl and self._ctl[seq].cmd_digest == cmd_digest:
            self.consumed(seq)
