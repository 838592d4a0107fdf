"""The log of a PTY as a viewer on its machine is shown it, from the files that its shim writes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from protocol.limits import DATA_SLICE_BYTES_MAX
from protocol.records import Record, records
from runner.adapters.attemptfiles import LOG_DIR, segment_bases
from runner.adapters.spool import Hole, SpoolReader
from terminal.attach import LineRefused
from terminal.replay import LOOK_BACK_BYTES, Stripper, output_of, plan, preamble_at, size_of
from terminal.viewing import Begin, Begun, Heard, Live, Output, Sized, Skipped

READ_BYTES: Final = DATA_SLICE_BYTES_MAX
READS_MAX: Final = 4
"""Reads in a row: what the shim says meanwhile is heard behind them."""
SKIP_BYTES: Final = 1024 * 1024
"""Who is further behind than this is shown the end instead."""


class PtyLog:
    """The log of the attempt in `directory`, shown as `begin` wishes. `close` it."""

    def __init__(self, directory: Path, begin: Begin) -> None:
        self.at = 0
        """The log offset behind what was shown."""
        self._dir = directory / LOG_DIR
        self._name = directory.name
        self._begin = begin
        self._reader = SpoolReader(self._dir)

    def begin(self, received: int, *, writes: bool) -> Iterator[Heard]:
        """How the viewer is brought in. Raises RemoteError(BAD_FRAME), OSError or LineRefused."""
        start = self._begin.offset
        if start is not None and self._reader.first() <= start and self._ahead(start) <= SKIP_BYTES:
            self.at = start
            yield Begun(self._name, writes, start, received)
            yield Live(start)
            return
        found = self._newest()
        self.at = found[-1].end if found else 0
        if self._begin.attach == "none" or not found:
            yield Begun(self._name, writes, self.at, received)
        elif self._begin.attach == "redraw":
            # The program draws the screen; the modes it set before it sets no more.
            yield Begun(self._name, writes, self.at, received)
            yield Output(self.at, preamble_at(found, end=self.at))
        elif self._begin.attach == "snapshot":
            yield Begun(self._name, writes, self.at, received)
            yield Output(self.at, self._drawn(found))
        else:
            yield from self._replayed(found, received, writes=writes)
        yield Live(self.at)

    def read(self, end: int) -> Iterator[Heard]:
        """Some of what was written, up to READS_MAX reads; it ends at `end` or later. Raises RemoteError or OSError."""
        if end - self.at > SKIP_BYTES:
            yield from self._skip()
            return
        for _ in range(READS_MAX):
            found = self._reader.read(self.at, READ_BYTES)
            if found is None:
                return
            if isinstance(found, Hole):
                yield from self._skip()
                return
            self.at = found.end
            parts: list[bytes] = []
            for record in records(found.data, found.offset):
                parts.append(output_of(record))
                if size_of(record) is not None:
                    yield Output(record.offset, b"".join(parts))
                    yield Sized()
                    parts.clear()
            yield Output(self.at, b"".join(parts))

    def read_all(self) -> Iterator[Heard]:
        """All that was written, of which nothing more comes. Raises RemoteError or OSError."""
        before = -1
        while before != self.at:
            before = self.at
            yield from self.read(self.at)

    def close(self) -> None:
        """It is needed no more."""
        self._reader.close()

    def _skip(self) -> Iterator[Heard]:
        found = self._newest()
        if not found or found[-1].end <= self.at:
            return
        self.at = found[-1].end
        yield Skipped()
        for heard in self._replayed(found, 0, writes=False):
            if not isinstance(heard, Begun):
                yield heard
        yield Live(self.at)

    def _replayed(self, found: list[Record], received: int, *, writes: bool) -> Iterator[Heard]:
        begun = plan(found, end=self.at)
        yield Begun(self._name, writes, begun.cut, received)
        yield Output(begun.cut, begun.preamble)
        stripper = Stripper()
        for record in found:
            if record.end <= begun.cut:
                continue
            if size_of(record) is not None:
                yield Sized()
            elif shown := stripper.feed(output_of(record, begun.cut)):
                yield Output(record.end, shown)
        yield Output(self.at, stripper.flush())

    def _drawn(self, found: list[Record]) -> bytes:
        try:
            from terminal.snapshot import draw
        except ImportError as exc:
            raise LineRefused("a snapshot is drawn by pyte, which is not installed here: --mode replay") from exc
        return draw(found, self._begin.rows, self._begin.cols)

    def _ahead(self, offset: int) -> int:
        bases = segment_bases(self._dir)
        return max(bases, default=0) - offset

    def _newest(self) -> list[Record]:
        """The records from the beginning of a segment, as many as a replay is planned with."""
        bases = segment_bases(self._dir)
        if not bases:
            return []
        last = max(self._records(bases[-1]), key=lambda record: record.end, default=None)
        end = bases[-1] if last is None else last.end
        base = max((base for base in bases if base <= end - LOOK_BACK_BYTES), default=bases[0])
        return list(self._records(base))

    def _records(self, at: int) -> Iterator[Record]:
        while (found := self._reader.read(at, READ_BYTES)) is not None:
            if not isinstance(found, Hole):
                yield from records(found.data, found.offset)
            at = found.end
