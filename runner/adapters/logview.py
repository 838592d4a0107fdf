"""An attempt's log for a person at a terminal, straight from its files: with or without a daemon, across rolls and restarts.

Theory of operation. Whether the attempt can still write is asked *before* its log is read to the end; if it could not, then what
was read is all there is. The files are looked at every POLL_S while there is nothing new.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from protocol.errors import RemoteError
from protocol.limits import DATA_SLICE_BYTES_MAX
from protocol.logselect import LOOK_BACK_BYTES, Start, Tail, Wish
from protocol.records import Record, records
from runner.adapters.attemptfiles import LOG_DIR, read_attempt, segment_bases, segment_name
from runner.adapters.spool import Hole, SpoolReader

POLL_S: Final = 0.05
"""Between two looks at a silent log: inotify is not in the standard library, a person sees no delay below 100 ms, and
twenty `stat`s a second cost nothing."""
START_WAIT_S: Final = 40.0
"""An attempt without a shim is waited for this long: a shim that waits behind its barrier gives up after 30 s."""
READ_BYTES: Final = 4 * DATA_SLICE_BYTES_MAX
"""One read: several whole records, also the largest."""
HEADER_READ_BYTES: Final = 512
"""Holds the record that opens a segment: its header, and the longest name of an attempt."""


@dataclass(frozen=True, slots=True)
class Missing:
    """`[start, end)` of the log does not exist any more."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The log is complete. `exit` is how the attempt ended, or None where nobody could write that down."""

    exit: dict[str, Any] | None


Seen = Record | Missing | Ended


def view_log(
    directory: Path, offset: int = 0, *, follow: bool, rest: Callable[[float], None] = time.sleep
) -> Iterator[Seen]:
    """Records from the first one at or behind `offset`; with `follow` until the attempt has ended.

    `Ended` comes last, where the attempt has ended. `rest` is called while there is nothing new.

    Raises:
        RemoteError: BAD_FRAME when the log is damaged.
        OSError: the disk failed.
    """
    reader = SpoolReader(directory / LOG_DIR)
    at = _boundary(directory / LOG_DIR, offset)
    waited = 0.0
    try:
        while True:
            files = read_attempt(directory)
            for seen in _drain(reader, at):
                at, waited = seen.end, 0.0
                if seen.end > offset:
                    yield seen
            if files.exit is not None or files.state == "lost":
                yield Ended(files.exit)
                return
            if not follow:
                return
            if files.alive:
                waited = 0.0
            elif (waited := waited + POLL_S) > START_WAIT_S:
                yield Ended(None)
                return
            rest(POLL_S)
    finally:
        reader.close()


def find_start(log_dir: Path, wish: Wish) -> Start:
    """Where to begin so that what is wished for is met, without reading what comes before.

    Raises:
        RemoteError: BAD_FRAME when the log is damaged there.
        OSError: the disk failed.
    """
    bases = segment_bases(log_dir)
    start = Start(offset=wish.offset)
    if wish.tail is not None:
        start = _last_lines(log_dir, bases, wish.tail, wish.kinds)
    if wish.since_ns is not None and bases:
        # The first record that is new enough may be in the last segment that began before.
        later = bisect_left(bases, wish.since_ns, key=lambda base: _begun_ns(log_dir, base))
        start = Start(offset=max(start.offset, bases[max(0, later - 1)] if later else 0), cuts=start.cuts)
    return start


def _last_lines(log_dir: Path, bases: list[int], lines: int, kinds: frozenset[int]) -> Start:
    reader = SpoolReader(log_dir)
    try:
        newest = [] if not bases else _records_of(reader, bases[-1], None)
        end = newest[-1].end if newest else bases[-1] if bases else 0
        tail = Tail(lines, kinds, end)
        tail.feed(newest)
        for base, limit in zip(reversed(bases[:-1]), reversed(bases[1:]), strict=True):
            if tail.found or end - limit >= LOOK_BACK_BYTES:
                break
            tail.feed(_records_of(reader, base, limit))
        return tail.start()
    finally:
        reader.close()


def _records_of(reader: SpoolReader, base: int, limit: int | None) -> list[Record]:
    """The records of the segment at `base`; `limit` is where the next one begins."""
    found: list[Record] = []
    for seen in _drain(reader, base):
        if isinstance(seen, Missing) or (limit is not None and seen.offset >= limit):
            break
        found.append(seen)
    return found


def _begun_ns(log_dir: Path, base: int) -> int:
    """When a segment began; 0 where it does not say."""
    try:
        with (log_dir / segment_name(base)).open("rb") as file:
            first = next(records(file.read(HEADER_READ_BYTES), base), None)
    except (FileNotFoundError, RemoteError):
        return 0
    return 0 if first is None else first.unix_ns


def _drain(reader: SpoolReader, at: int) -> Iterator[Record | Missing]:
    while (found := reader.read(at, READ_BYTES)) is not None:
        if isinstance(found, Hole):
            yield Missing(found.start, found.end)
        else:
            yield from records(found.data, found.offset)
        at = found.end


def _boundary(log_dir: Path, offset: int) -> int:
    """Where to begin so that records are met whole: the start of the segment that holds `offset`."""
    return max((base for base in segment_bases(log_dir) if base <= offset), default=0)
