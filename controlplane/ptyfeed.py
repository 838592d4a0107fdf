"""The log of a PTY as a viewer's terminal gets it: how it is brought to what is shown, and then what comes, as it comes.

Rule 1: frames end where records do, so a viewer that comes back goes on at a record. Rule 2: what is live is read by the event loop,
from pages that were written a moment ago; what is looked for further back is a worker's thing. Rule 3: where the log has a hole,
or is damaged, nothing is guessed: it is shown anew from behind.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, NamedTuple

from controlplane import logseek
from controlplane.limits import PTY_SKIP_BYTES
from controlplane.logstore import Log, next_gap
from controlplane.ptymessages import encode_output, to_viewer
from controlplane.rows import LogRow
from protocol.errors import RemoteError
from protocol.limits import DATA_SLICE_BYTES_MAX, KIB, PTY_SEGMENT_BYTES
from protocol.records import Record, RecordKind, records
from terminal import replay

_FRAME_BYTES: Final = 64 * KIB
"""Output in one frame: the fastest measured, and one record always fits."""
_LOOK_BYTES_MAX: Final = 4 * PTY_SEGMENT_BYTES
"""Read for a replay at most, should a log be no ring of small segments: further back nothing is known of its modes."""
Attach = Literal["replay", "snapshot", "redraw", "none"]


class Size(NamedTuple):
    """Of the terminal."""

    rows: int
    cols: int


class Lost(Exception):
    """What comes next in the log is not there: it goes on at `end`."""

    def __init__(self, end: int) -> None:
        self.end = end
        super().__init__(end)


@dataclass(frozen=True, slots=True)
class Opening:
    """How a viewer is brought in: it begins at `offset` with this size, gets `frames`, and goes on with the log at `end`."""

    offset: int
    size: Size
    frames: tuple[str | bytes, ...]
    end: int


@dataclass(frozen=True, slots=True)
class Step:
    """What is next: output, then a size where it changed; `end` is the log offset behind both."""

    end: int
    data: bytes
    size: Size | None


class Feed:
    """What of a log a viewer gets from `offset` on, a frame at a time. `close` it."""

    def __init__(self, log: Log, offset: int) -> None:
        self.offset = offset
        self._log = log
        self._fd = -1

    def take(self) -> Step | None:
        """The next frame of what is there; None: nothing is. Raises Lost, or OSError."""
        limit = self._log.whole
        if self.offset >= limit:
            return None
        if self._log.gaps and (gap := next_gap(self._log.gaps, self.offset)) is not None:
            if gap[0] <= self.offset:
                raise Lost(gap[1])
            limit = min(limit, gap[0])
        if self._fd < 0:
            self._fd = os.open(self._log.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        block = os.pread(self._fd, min(DATA_SLICE_BYTES_MAX, limit - self.offset), self.offset)
        step = _step(block, self.offset)
        if step is None:
            raise Lost(limit)
        self.offset = step.end
        return step

    def close(self) -> None:
        """It is needed no more."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _step(block: bytes, offset: int) -> Step | None:
    """The records that `block` begins with, up to the first that tells a size."""
    parts: list[bytes] = []
    end, size = offset, None
    try:
        for record in records(block, offset):
            end = record.end
            if record.kind == RecordKind.PTY:
                parts.append(record.payload)
            elif (told := replay.size_of(record)) is not None:
                size = Size(*told)
                break
    except RemoteError:
        pass
    return None if end == offset else Step(end, b"".join(parts) if len(parts) != 1 else parts[0], size)


def open_at(row: LogRow, path: Path, attach: Attach, start: int | None, known: Size) -> Opening:
    """How a viewer is brought in. `known` is the size where the log tells none. Blocking: for a worker. Raises OSError."""
    end = row.end
    if start is not None and _is_there(row, start):
        found = _look_back(row, path, min(start, end))
        return Opening(start, _size_at(found, start, known), (), start)
    found = _look_back(row, path, end - replay.LOOK_BACK_BYTES)
    size = _size_at(found, end, known)
    if attach == "snapshot":
        # Only the process that draws needs an emulator.
        from terminal import snapshot

        drawn = snapshot.draw(found, size.rows, size.cols)
        return Opening(end, size, tuple(_output(end, drawn)), end)
    if attach == "redraw" and found:
        # The program draws the screen; the modes it set before it sets no more.
        return Opening(end, size, tuple(_output(end, replay.preamble_at(found, end=end))), end)
    if attach != "replay" or not found:
        return Opening(end, size, (), end)
    plan = replay.plan(found, end=end)
    begun = _size_at(found, plan.cut, known)
    return Opening(plan.cut, begun, tuple(_replayed(found, plan.cut, plan.preamble, begun)), end)


def _is_there(row: LogRow, start: int) -> bool:
    """Whether a viewer that has the log up to `start` gets what comes behind: it is no more than may be shown at once, and whole."""
    if start > row.end:
        # We lost in a crash what it has already; the runner sends that again.
        return not row.complete
    gap = next_gap(row.gaps, start)
    return row.end - start <= PTY_SKIP_BYTES and gap is None


def _look_back(row: LogRow, path: Path, offset: int) -> list[Record]:
    """The records from the beginning of the segment that holds `offset`, behind the last hole."""
    if row.end == 0:
        return []
    return [*logseek.records_around(row, path, max(0, offset), _LOOK_BYTES_MAX)]


def _size_at(found: Iterable[Record], offset: int, known: Size) -> Size:
    for record in found:
        if record.offset >= offset:
            break
        told = replay.size_of(record)
        known = known if told is None else Size(*told)
    return known


def _replayed(found: Iterable[Record], cut: int, preamble: bytes, size: Size) -> Iterator[str | bytes]:
    """The log from `cut` on, without what a terminal would answer."""
    stripper, held, at = replay.Stripper(), bytearray(), cut
    yield from _output(cut, preamble)
    for record in found:
        if record.end <= cut:
            continue
        if record.kind == RecordKind.PTY:
            held += stripper.feed(replay.output_of(record, cut))
            at = record.end
            if len(held) >= _FRAME_BYTES:
                yield from _output(at, bytes(held))
                held.clear()
        elif (told := replay.size_of(record)) is not None and Size(*told) != size:
            yield from _output(at, bytes(held))
            held.clear()
            size = Size(*told)
            yield size_frame(size)
    yield from _output(at, bytes(held + stripper.flush()))


def _output(offset: int, data: bytes) -> Iterator[bytes]:
    """`data` in frames, which all say the offset behind the last."""
    for at in range(0, len(data), _FRAME_BYTES):
        yield encode_output(offset, data[at : at + _FRAME_BYTES])


def size_frame(size: Size) -> str:
    """The size, for a viewer."""
    return to_viewer("size", rows=size.rows, cols=size.cols)
