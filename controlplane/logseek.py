"""Where a reading of a stored log begins: the last lines, a point in time, the record that holds an offset.

Theory of operation. A stored log has no index. A segment opens with a record that names the attempt and the offset it is at, so
segments are found by looking for that name backwards, and only the segments that matter are read. What a program printed is
taken for such a record only if it foresaw its own offset and forged a header: it then spoils where its own `tail` begins, never what
a reading from the start or a proof sees, which do not ask here.

Everything blocks: for a worker thread.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from controlplane.limits import DIGEST_BLOCK_BYTES
from controlplane.logstore import next_gap
from controlplane.rows import LogRow
from protocol.errors import RemoteError
from protocol.limits import MIB, RECORD_HEADER_BYTES
from protocol.logselect import LOOK_BACK_BYTES, Start, Tail, Wish
from protocol.records import Record, RecordKind, SegmentHeader, decode_segment_header, encode_segment_header, records

HALVE_ABOVE_BYTES: Final = 16 * MIB
"""A point in time is looked for by halves while more than this is left: two segments of the usual size."""


def find_start(row: LogRow, path: Path, wish: Wish) -> Start:
    """Where to begin so that what is wished for is met. Raises OSError."""
    if row.end == 0:
        return Start()
    with _stored(row, path) as log:
        start = Start(offset=log.holding(wish.offset))
        if wish.tail is not None:
            start = log.last_lines(wish.tail, wish.kinds)
        if wish.since_ns is not None:
            start = Start(offset=max(start.offset, log.since(wish.since_ns)), cuts=start.cuts)
        return start


def records_around(row: LogRow, path: Path, offset: int, size_max: int) -> Iterator[Record]:
    """The records from the start of the segment that holds `offset` to the end of the log, behind the last hole.

    Nothing where that is more than `size_max` bytes. Raises OSError.
    """
    last = row.gaps[-1][1] if row.gaps else 0
    if row.end <= last:
        return
    with _stored(row, path) as log:
        base = log.segment_at(max(offset, last))
        if row.end - base <= size_max:
            yield from log.records(base, row.end)


def segment_of(row: LogRow, path: Path, offset: int) -> int:
    """Where the segment begins that holds `offset`; of one in a hole, where that ends. Raises OSError."""
    gap = next_gap(row.gaps, offset)
    if gap is not None and gap[0] <= offset:
        return gap[1]
    with _stored(row, path) as log:
        return log.segment_at(offset)


@contextmanager
def _stored(row: LogRow, path: Path) -> Iterator["_Stored"]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield _Stored(row, fd)
    finally:
        os.close(fd)


class _Stored:
    """A log that is open for looking."""

    def __init__(self, row: LogRow, fd: int) -> None:
        self._row = row
        self._fd = fd
        self._name = row.attempt.encode("utf-8")
        # The name stands at the end of the record that opens a segment.
        self._before_name = RECORD_HEADER_BYTES + len(encode_segment_header(SegmentHeader(0, bytes(32), "")))

    def holding(self, offset: int) -> int:
        """The start of the record or hole that holds `offset`; the end of the log for what lies behind it."""
        if offset >= self._row.end:
            return self._row.end
        if (gap := self._gap_at(offset)) is not None:
            return gap[0]
        base = self.segment_at(offset)
        for record in self.records(base, self._limit(base)):
            if record.end > offset:
                return record.offset
        return base

    def since(self, since_ns: int) -> int:
        """The start of the first record that is not older; the end where there is none."""
        low, high = 0, self._row.end
        while high - low > HALVE_ABOVE_BYTES:
            middle = self.segment_at((low + high) // 2)
            if middle <= low:
                break
            first = next(self.records(middle, self._limit(middle)), None)
            if first is None or first.unix_ns < since_ns:
                low = middle
            else:
                high = middle
        while low < self._row.end:
            if (gap := self._gap_at(low)) is not None:
                low = gap[1]
                continue
            limit = self._limit(low)
            for record in self.records(low, limit):
                if record.unix_ns >= since_ns:
                    return record.offset
            low = limit
        return self._row.end

    def last_lines(self, lines: int, kinds: frozenset[int]) -> Start:
        """Where the last lines begin, as far as is looked back."""
        end = at = self._row.end
        tail = Tail(lines, kinds, end)
        while at > 0 and not tail.found and end - at < LOOK_BACK_BYTES:
            if (gap := self._gap_at(at - 1)) is not None:
                at = gap[0]
                continue
            base = self.segment_at(at - 1)
            tail.feed(self.records(base, at))
            at = base
        return tail.start()

    def _gap_at(self, offset: int) -> tuple[int, int] | None:
        gap = next_gap(self._row.gaps, offset)
        return gap if gap is not None and gap[0] <= offset else None

    def _limit(self, offset: int) -> int:
        """Where the next hole, or the end, is."""
        gap = next_gap(self._row.gaps, offset)
        return self._row.end if gap is None else gap[0]

    def segment_at(self, offset: int) -> int:
        """Where the segment begins that holds `offset`, which is in no hole: behind a hole at the latest."""
        floor = max((end for _start, end in self._row.gaps if end <= offset), default=0)
        # The name of a segment that begins at `offset` ends behind it.
        stop = min(self._row.end, offset + self._before_name + len(self._name))
        while stop > floor:
            begin = max(floor, stop - DIGEST_BLOCK_BYTES)
            block = os.pread(self._fd, stop - begin, begin)
            at = len(block)
            while (at := block.rfind(self._name, 0, at + len(self._name) - 1 if at < len(block) else at)) >= 0:
                base = begin + at - self._before_name
                if base >= floor and self._begins_at(base):
                    return base
            if begin == floor:
                break
            stop = begin + len(self._name) - 1
        return floor

    def _begins_at(self, base: int) -> bool:
        head = os.pread(self._fd, self._before_name + len(self._name), base)
        try:
            first = next(records(head, base), None)
            if first is None or first.kind != RecordKind.SEGMENT:
                return False
            header = decode_segment_header(first.payload)
        except RemoteError:
            return False
        return (header.base, header.attempt) == (base, self._row.attempt)

    def records(self, start: int, stop: int) -> Iterator[Record]:
        """Whole records of `[start, stop)`, up to the first that is damaged."""
        at = start
        while at < stop:
            block = memoryview(os.pread(self._fd, min(DIGEST_BLOCK_BYTES, stop - at), at))
            begun = at
            try:
                for record in records(block, begun):
                    yield record
                    at = record.end
            except RemoteError:
                return
            if at == begun:
                return
