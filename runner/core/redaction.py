"""Which bytes of an uploaded log are masked: the spellings of a command's secrets, found in the streams of the log as it is read.

Theory of operation. A needle is one spelling of one secret. A stream is all payloads of one kind of record, joined. Every byte of a
record's payload that belongs to an occurrence of a needle in its stream becomes `*`; headers stay, so lengths and offsets do.

Rule 1: the union of all occurrences is masked, overlapping and nested ones too. Rule 2: an occurrence counts when its last byte is less
than `REACH_BYTES` of log behind its first. So a byte is masked or not for what stands within `REACH_BYTES` of it, wherever reading began.
Rule 3: what may yet become an occurrence is held back until its stream goes on, the log has grown out of reach, or it has ended.
Rule 4: a hole or the end may have cut a secret: the fragment beside it is masked from `NEEDLE_BYTES_MIN` on.
"""

import struct
from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from protocol.limits import MIB, RECORD_HEADER_BYTES
from protocol.records import RecordKind
from runner.core.needles import NEEDLE_BYTES_MIN, Needles

MASK: Final = b"*"
REACH_BYTES: Final = 1 * MIB
"""Four rounds of the shim's gather: two halves of a secret that one process wrote in a row are nearer to each other than this."""
STRUCTURE: Final = frozenset(
    (RecordKind.RESIZE, RecordKind.GAP, RecordKind.SEGMENT, RecordKind.MARKER, RecordKind.EXIT)
)
"""Records of our own. Whatever a later version writes beside them is taken for words of the child."""
_HEAD: Final = struct.Struct("<IB")


# --- finding ----------------------------------------------------------------------------------------------------

_WORDS: Final[tuple[tuple[Literal["Q", "I"], int], ...]] = (("Q", 8), ("I", 4))
FEW: Final = 16
"""Needles that are looked for one by one, at a few hundred MB/s; for more, words of the text are looked up first."""
STEP_MAX: Final = 8
"""Words; the more, the more beginnings of a needle have to be known."""


class _Group(NamedTuple):
    """Needles so long that each holds one whole word of every `step`, wherever it begins: a text without these words has none of them."""

    code: Literal["Q", "I"]
    size: int
    step: int
    words: frozenset[int]
    needles: tuple[bytes, ...]


def _group(code: Literal["Q", "I"], size: int, needles: tuple[bytes, ...]) -> _Group:
    step = min(STEP_MAX, (min(map(len, needles)) + 1) // size - 1)
    words = {array(code, needle[at : at + size])[0] for needle in needles for at in range(step * size)}
    return _Group(code, size, step, frozenset(words), needles)


class Finder:
    """All occurrences of needles in a text. Bytes in, places out."""

    def __init__(self, needles: Needles) -> None:
        self.longest: Final = needles.longest
        self._all: Final = needles.spellings
        self._plain: tuple[bytes, ...] = ()
        self._groups: Final[list[_Group]] = []
        rest = tuple(sorted(needles.spellings, key=len, reverse=True))
        for code, size in _WORDS:
            fitting = tuple(needle for needle in rest if len(needle) >= 2 * size - 1)
            if len(fitting) > FEW:
                # The shortest of them decide the step: a few are better looked for by themselves.
                many = fitting[:-FEW] if len(fitting) > 2 * FEW else fitting
                self._groups.append(_group(code, size, many))
                rest = rest[len(many) :]
        self._plain = rest

    def find(self, text: bytes, known: int) -> Iterator[tuple[int, int, bytes]]:
        """Where occurrences lie that end behind `known`: start, end and needle; those of one needle that overlap are one."""
        wanted = list(self._plain)
        for group in self._groups:
            words = array(group.code, text[: len(text) // group.size * group.size])
            if not group.words.isdisjoint(words[:: group.step]):
                wanted += group.needles
        for needle in wanted:
            at = text.find(needle, max(0, known - len(needle) + 1))
            while at >= 0:
                start = at
                while 0 <= (following := text.find(needle, at + 1)) < at + len(needle):
                    at = following
                yield start, at + len(needle), needle
                at = following

    def begun(self, text: bytes) -> int:
        """Where the longest end of `text` begins that is the beginning of a needle; its length when there is none."""
        first = len(text)
        for needle in self._all:
            at = text.find(needle[0], max(0, len(text) - len(needle) + 1), first)
            while at >= 0 and not needle.startswith(text[at:]):
                at = text.find(needle[0], at + 1, first)
            first = first if at < 0 else at
        return first

    def ending(self, text: bytes) -> int:
        """The length of the longest beginning of `text` that is the end of a needle, or 0."""
        longest = 0
        for needle in self._all:
            for size in range(min(len(needle) - 1, len(text)), longest, -1):
                if needle.endswith(text[:size]):
                    longest = size
                    break
        return longest

    def within(self, text: bytes) -> bool:
        """Whether `text` may be the middle of a needle."""
        return any(text in needle[:-1] for needle in self._all)


# --- masking ----------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """Whole records from `offset` on, masked."""

    offset: int
    data: memoryview


class Missing(NamedTuple):
    """`[start, end)` of the log is not there."""

    start: int
    end: int


@dataclass(slots=True)
class _Block:
    """Records that were fed together and are not all taken yet."""

    offset: int
    data: bytearray
    ends: list[int]
    """Offsets behind its records."""


class _Span(NamedTuple):
    """A part of a stream: `size` bytes that lie at `offset` of the log, in the record that begins at `record`."""

    record: int
    offset: int
    size: int


@dataclass(slots=True)
class _Stream:
    """The end of one stream, as far as it may belong to what comes."""

    tail: bytes = b""
    spans: list[_Span] = field(default_factory=list)
    """Where `tail` lies."""
    edge: bytes | None = None
    """What came since the hole before it, while the end of a cut needle may still stand there."""
    edge_spans: list[_Span] = field(default_factory=list)
    seen: bool = False
    """Something of it came since the last hole."""


class Masker:
    """Masks one log that is fed in order from a record boundary on. `cut`: what was before it is not there any more."""

    def __init__(self, needles: Needles, start: int, *, cut: bool = False) -> None:
        self.end = start
        """Everything below was fed."""
        self.masked = False
        """Whether any byte was masked."""
        self.finished = False
        """Whether nothing will come any more."""
        self._finder = Finder(needles)
        self._everything = needles.everything
        self._streams: dict[int, _Stream] = {}
        self._queue: deque[_Block | Missing] = deque()
        self._hole_end = start if cut else -REACH_BYTES
        self._ready = start
        """Everything below is final."""

    # --- in -----------------------------------------------------------------------------------------------------

    def feed(self, records: bytes | memoryview) -> None:
        """Whole records, sound ones, that begin at `end`."""
        block = _Block(self.end, bytearray(records), [])
        found: dict[int, list[_Span]] = {}
        at, size = 0, len(block.data)
        while at < size:
            length, kind = _HEAD.unpack_from(block.data, at)
            if length and kind not in STRUCTURE:
                offset = self.end + at
                found.setdefault(kind, []).append(_Span(offset, offset + RECORD_HEADER_BYTES, length))
            at += RECORD_HEADER_BYTES + length
            block.ends.append(self.end + at)
        self._queue.append(block)
        self.end += size
        for kind, spans in found.items():
            if self._everything:
                self._mask_text(spans, _starts(spans), 0, sum(span.size for span in spans))
            else:
                stream = self._streams.setdefault(kind, _Stream())
                if not stream.seen and spans[0].offset < self._hole_end + REACH_BYTES:
                    stream.edge = b""
                stream.seen = True
                self._match(stream, block, spans)
        self._judge()

    def hole(self, end: int) -> None:
        """`[self.end, end)` is not there: it may have cut a secret on both sides."""
        self._cut()
        self._streams.clear()
        self._queue.append(Missing(self.end, end))
        self.end = self._hole_end = self._ready = end

    def finish(self) -> None:
        """Nothing will come any more."""
        self._cut()
        self.finished = True
        self._ready = self.end

    # --- out ----------------------------------------------------------------------------------------------------

    def take(self, offset: int, size_max: int) -> Run | Missing | None:
        """What is final at `offset`, at most `size_max` bytes of it; what lies before is given up. None: nothing yet.

        Raises LookupError when no record begins at `offset`.
        """
        while self._queue:
            first = self._queue[0]
            if isinstance(first, Missing):
                if offset < first.end:
                    return Missing(offset, first.end)
            elif offset < first.ends[-1]:
                return self._take(first, offset, size_max)
            self._queue.popleft()
        return None

    def _take(self, block: _Block, offset: int, size_max: int) -> Run | None:
        at = bisect_right(block.ends, offset)
        if offset != (block.ends[at - 1] if at else block.offset):
            raise LookupError("no record begins there")
        last = bisect_right(block.ends, min(offset + size_max, self._ready)) - 1
        if last < at:
            return None
        return Run(offset, memoryview(block.data)[offset - block.offset : block.ends[last] - block.offset])

    # --- one stream ---------------------------------------------------------------------------------------------

    def _match(self, stream: _Stream, block: _Block, spans: list[_Span]) -> None:
        """Mask what became whole with these payloads, and keep the end of the stream for the next ones."""
        view = memoryview(block.data)
        low = block.offset
        text = b"".join((stream.tail, *(view[at - low : at - low + size] for _, at, size in spans)))
        known = len(stream.tail)
        if stream.edge is not None:
            self._grow_edge(stream, text[known:], spans)
        spans = [*stream.spans, *spans]
        starts = _starts(spans)
        for start, end, needle in self._finder.find(text, known):
            if _place(spans, starts, end - 1) - _place(spans, starts, start) < REACH_BYTES:
                self._mask_text(spans, starts, start, end)
                continue
            # Overlapping ones that are near enough one by one.
            size = len(needle)
            for at in range(start, end - size + 1):
                near = _place(spans, starts, at + size - 1) - _place(spans, starts, at) < REACH_BYTES
                if near and text.startswith(needle, at):
                    self._mask_text(spans, starts, at, at + size)
        _keep(stream, text, spans, min(len(text), max(0, self._finder.longest - 1)))

    def _grow_edge(self, stream: _Stream, text: bytes, spans: list[_Span]) -> None:
        assert stream.edge is not None, "asked before"
        at = 0
        for span in spans:
            room = self._finder.longest - 1 - len(stream.edge)
            if span.offset >= self._hole_end + REACH_BYTES or room <= 0:
                break
            stream.edge += text[at : at + min(room, span.size)]
            stream.edge_spans.append(span)
            at += span.size

    def _settle_edge(self, stream: _Stream) -> None:
        """Mask what a hole left of a needle at the beginning of the stream."""
        if stream.edge is not None:
            size = self._finder.ending(stream.edge)
            if size >= NEEDLE_BYTES_MIN:
                self._mask_text(stream.edge_spans, _starts(stream.edge_spans), 0, size)
            stream.edge, stream.edge_spans = None, []

    def _judge(self) -> None:
        """How far everything is final."""
        self._ready = self.end
        for stream in self._streams.values():
            _out_of_reach(stream, self.end)
            at = self._finder.begun(stream.tail) if stream.spans else 0
            if at < len(stream.tail):
                self._ready = min(self._ready, _span_at(stream.spans, at).record)
            if stream.edge is not None:
                waits = len(stream.edge) < self._finder.longest - 1 and self._finder.within(stream.edge)
                if not waits or self.end >= self._hole_end + REACH_BYTES:
                    self._settle_edge(stream)
                elif stream.edge_spans:
                    self._ready = min(self._ready, stream.edge_spans[0].record)

    def _cut(self) -> None:
        """The log ends here, for good or for a while."""
        for stream in self._streams.values():
            self._settle_edge(stream)
            _out_of_reach(stream, self.end)
            at = self._finder.begun(stream.tail)
            if len(stream.tail) - at >= NEEDLE_BYTES_MIN:
                self._mask_text(stream.spans, _starts(stream.spans), at, len(stream.tail))

    def _mask_text(self, spans: list[_Span], starts: list[int], start: int, end: int) -> None:
        """Mask `[start, end)` of the text that lies at `spans`."""
        self.masked = True
        for which in range(bisect_right(starts, start) - 1, bisect_left(starts, end)):
            low, high = max(start - starts[which], 0), min(end - starts[which], spans[which].size)
            self._mask(spans[which].offset + low, high - low)

    def _mask(self, offset: int, size: int) -> None:
        for block in reversed(self._queue):
            if isinstance(block, _Block) and block.offset <= offset:
                at = offset - block.offset
                if at < len(block.data):
                    block.data[at : at + size] = MASK * size
                return


def _starts(spans: list[_Span]) -> list[int]:
    """Where in the text each span begins."""
    starts, at = [], 0
    for span in spans:
        starts.append(at)
        at += span.size
    return starts


def _place(spans: list[_Span], starts: list[int], at: int) -> int:
    """The offset in the log of one byte of the text."""
    which = bisect_right(starts, at) - 1
    return spans[which].offset + at - starts[which]


def _span_at(spans: list[_Span], at: int) -> _Span:
    return spans[bisect_right(_starts(spans), at) - 1]


def _keep(stream: _Stream, text: bytes, spans: list[_Span], size: int) -> None:
    """The last `size` bytes of `text` are the stream's tail."""
    stream.tail = text[len(text) - size :]
    kept: list[_Span] = []
    while size > 0:
        span = spans.pop()
        part = min(span.size, size)
        kept.append(_Span(span.record, span.offset + span.size - part, part))
        size -= part
    stream.spans = kept[::-1]


def _out_of_reach(stream: _Stream, end: int) -> None:
    """Forget what is too far back to be one occurrence with anything at `end`."""
    least = end - REACH_BYTES
    while stream.spans and stream.spans[0].offset <= least:
        record, offset, size = stream.spans[0]
        gone = min(size, least - offset + 1)
        stream.tail = stream.tail[gone:]
        stream.spans[:1] = [] if gone == size else [_Span(record, offset + gone, size - gone)]


__all__ = ["MASK", "REACH_BYTES", "Finder", "Masker", "Missing", "Run"]
