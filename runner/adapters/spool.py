"""The logs of attempts on disk, read by offset: segments written by shims, holes between them as gaps (docs/shim.md §3)."""

import os
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from protocol.errors import RemoteError
from protocol.limits import RECORD_HEADER_BYTES
from protocol.records import whole_prefix
from runner.adapters.attemptfiles import segment_bases, segment_name

LOOKS_MAX: Final = 4
"""Listings of a log whose segments go faster than they are opened, before that is a fault."""


class Slice(NamedTuple):
    """Whole records of the log from `offset` on."""

    offset: int
    data: memoryview

    @property
    def end(self) -> int:
        """Offset behind the slice."""
        return self.offset + len(self.data)


class Hole(NamedTuple):
    """`[start, end)` of the log does not exist (any more)."""

    start: int
    end: int


class LogReader(Protocol):
    """A log by offset, as `SpoolReader` reads it."""

    def first(self) -> int:
        """See SpoolReader."""

    def read(self, offset: int, size_max: int) -> Slice | Hole | None:
        """See SpoolReader."""

    def close(self) -> None:
        """See SpoolReader."""


class SpoolReader:
    """One attempt's log. Keeps at most one segment open; `close` it. Not for use by two tasks at once."""

    def __init__(self, log_dir: Path) -> None:
        self._dir = log_dir
        self._bases: list[int] = []
        self._base = -1
        self._fd: int | None = None

    def first(self) -> int:
        """Oldest offset that is kept; 0 when there is nothing yet."""
        self._list()
        return self._bases[0] if self._bases else 0

    def read(self, offset: int, size_max: int) -> Slice | Hole | None:
        """Whole records from `offset` on, at most `size_max` bytes; None when there is nothing (yet).

        Raises:
            RemoteError: BAD_FRAME when what is on disk is no log: another program wrote to it, or the disk lies.
            OSError: the disk failed.
        """
        for _ in range(LOOKS_MAX - 1):
            try:
                return self._read(offset, size_max)
            except FileNotFoundError:
                # Listed, and deleted before it was opened: its shim needed the room. The next listing shows the hole.
                self.close()
        return self._read(offset, size_max)

    def _read(self, offset: int, size_max: int) -> Slice | Hole | None:
        found = self._read_in_segment(offset, size_max)
        if found is not None:
            return found
        # The segment that was open has no more: is there another one for this offset, or a hole?
        self._list()
        below = [base for base in self._bases if base <= offset]
        if below and below[-1] != self._base:
            self._open(below[-1])
            found = self._read_in_segment(offset, size_max)
        later = [base for base in self._bases if base > offset]
        if found is None and later:
            # The next segment seals this one: what was written between our look into it and the listing is there by now.
            return self._read_in_segment(offset, size_max) or Hole(offset, later[0])
        return found

    def close(self) -> None:
        """Give the open segment back."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
            self._base = -1

    def _read_in_segment(self, offset: int, size_max: int) -> Slice | None:
        if self._fd is None or offset < self._base:
            self._list()
            below = [base for base in self._bases if base <= offset]
            if not below:
                return None
            self._open(below[-1])
        assert self._fd is not None, "opened above"
        data = memoryview(os.pread(self._fd, size_max, offset - self._base))
        if len(data) < RECORD_HEADER_BYTES:
            return None
        length = whole_prefix(data, size_max)
        return Slice(offset, data[:length]) if length else None

    def _open(self, base: int) -> None:
        self.close()
        self._fd = os.open(self._dir / segment_name(base), os.O_RDONLY | os.O_CLOEXEC)
        self._base = base

    def _list(self) -> None:
        self._bases = segment_bases(self._dir)


__all__ = ["Hole", "LogReader", "RemoteError", "Slice", "SpoolReader"]
