"""Which part of a log is shown: by stream, by time, by offset, and the last lines of it.

Theory of operation. Where a reading begins is looked for from the end, segment by segment (`Tail`), or by the times that segments
begin at; the reading itself is then told what to leave out of the records it meets (`Selection`). Both sides do the same, so
the same log gives the same lines. Rule 1: the look back is bounded (`LOOK_BACK_BYTES`). Rule 2: a wrong guess of where to begin costs
time and shows nothing wrong: `Selection` leaves out what comes before.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, NamedTuple

from protocol.limits import MIB
from protocol.logtext import STREAMS, Standard, gap_of
from protocol.records import Record

LOOK_BACK_BYTES: Final = 64 * MIB
"""How far back the last lines are looked for: a second or two of work at worst, and more than anybody reads."""
STREAM_NAMES: Final[Mapping[str, Standard]] = MappingProxyType({each.word: each for each in Standard})
START_HEADER: Final = "X-Log-Start"
CUTS_HEADER: Final = "X-Log-Cuts"
"""Headers of an answer over HTTP: where its first record is, and what a reader leaves out (`write_cuts`)."""
CUTS_CHARS_MAX: Final = 256
_CUT: Final = re.compile(r"([0-9]{1,3})@([0-9]{1,16})\+([0-9]{1,5})")


class Cut(NamedTuple):
    """Where the output of one kind begins: `skip` bytes into the payload of the record at `offset`."""

    offset: int
    skip: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where a reading begins: the offset of a record or hole, and what is left out behind it, by kind of record."""

    offset: int = 0
    cuts: Mapping[int, Cut] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is wanted of a log; None wants everything."""

    offset: int = 0
    """From the record that holds this offset."""
    since_ns: int | None = None
    """From the first record that is not older."""
    tail: int | None = None
    """The last lines, of both streams together."""
    stream: Standard | None = None

    @property
    def kinds(self) -> frozenset[int]:
        """Kinds of records whose output is wanted."""
        return frozenset(kind for kind, to in STREAMS.items() if self.stream in (None, to))


class Selection:
    """Leaves out of a reading what is not wanted."""

    def __init__(self, wish: Wish, cuts: Mapping[int, Cut] | None = None) -> None:
        self._wish = wish
        self._kinds = wish.kinds
        self._cuts = dict(cuts or {})
        self._begun = wish.since_ns is None

    def cut(self, cuts: Mapping[int, Cut]) -> None:
        """Where each kind begins, once that is known."""
        self._cuts = dict(cuts)

    def take(self, record: Record) -> Record | None:
        """The record as far as it is wanted, None where it is not."""
        hole = gap_of(record)
        if (record.end if hole is None else hole[1]) <= self._wish.offset:
            return None
        if not self._begun:
            if record.unix_ns < (self._wish.since_ns or 0):
                return None
            self._begun = True
        if hole is not None or record.kind not in STREAMS:
            return record
        if record.kind not in self._kinds:
            return None
        cut = self._cuts.get(record.kind)
        if cut is None or record.offset > cut.offset:
            return record
        if record.offset < cut.offset or cut.skip >= len(record.payload):
            return None
        return record._replace(payload=record.payload[cut.skip :])

    def wants_gap(self, end: int) -> bool:
        """Whether a hole that ends there is shown."""
        return self._begun and end > self._wish.offset


class Tail:
    """Finds where the last lines begin, fed with the records of a log from its last segment to its first.

    A line has its place where it ends; an unfinished one ends with its last byte. A line is shown whole.
    """

    def __init__(self, lines: int, kinds: Iterable[int], end: int) -> None:
        self._left = lines
        self._kinds = frozenset(kinds)
        self._met: set[int] = set()
        """Kinds of which something was met."""
        self._open: set[int] = set()
        """Kinds whose oldest wanted line has not shown its beginning yet."""
        self._end = end
        self._first = end
        self._cuts = dict.fromkeys(self._kinds, Cut(end, 0))

    @property
    def found(self) -> bool:
        """Whether nothing further back matters."""
        return self._left == 0 and not self._open

    def feed(self, segment: Iterable[Record]) -> None:
        """The records of the segment before the one that was fed last, in their own order."""
        for record in reversed(list(segment)):
            if self.found:
                return
            if record.kind in self._kinds and record.payload:
                self._take(record)
            self._first = record.offset

    def start(self) -> Start:
        """Where to begin, as far as was looked."""
        cuts = self._cuts | dict.fromkeys(self._open, Cut(self._first, 0))
        return Start(offset=min((cut.offset for cut in cuts.values()), default=self._end), cuts=cuts)

    def _take(self, record: Record) -> None:
        kind, payload = record.kind, record.payload
        if kind not in self._met:
            self._met.add(kind)
            if not payload.endswith(b"\n") and self._left:
                self._left -= 1
                self._open.add(kind)
        ends = payload.count(b"\n")
        if ends <= self._left:
            self._left -= ends
            self._open |= {kind} if ends else set()
            return
        at = len(payload)
        while (at := payload.rfind(b"\n", 0, at)) >= 0:
            if self._left:
                self._left -= 1
                self._open.add(kind)
            elif kind in self._open:
                self._open.discard(kind)
                self._cuts[kind] = Cut(record.offset, at + 1)
                return
            else:
                return


def write_cuts(cuts: Mapping[int, Cut]) -> str:
    """Cuts as one word of a header: `1@4096+17,2@5000+0`."""
    return ",".join(f"{kind}@{cut.offset}+{cut.skip}" for kind, cut in sorted(cuts.items()))


def read_cuts(text: str) -> Mapping[int, Cut]:
    """What `write_cuts` wrote. Raises ValueError."""
    found: dict[int, Cut] = {}
    for part in text.split(",") if text else ():
        match = _CUT.fullmatch(part)
        if match is None or len(text) > CUTS_CHARS_MAX:
            raise ValueError("no list of cuts")
        found[int(match[1])] = Cut(int(match[2]), int(match[3]))
    return found
