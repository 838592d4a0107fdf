"""Reading a stored log: whole records for a client, digests for whoever wants to prove it.

A client gets the bytes as the runner sent them. Where bytes exist nowhere, or are no records, it gets one record of kind GAP whose
payload is `<QQ` (start, end) and goes on behind it: a reader is never stuck and never told a hole is data.
"""

import hashlib
import os
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio.to_thread

from controlplane.limits import DIGEST_BLOCK_BYTES, READ_BLOCK_BYTES
from controlplane.logstore import Log, next_gap
from controlplane.rows import LogRow
from protocol.errors import RemoteError
from protocol.limits import RECORD_HEADER_BYTES
from protocol.records import NO_SEGMENT, Record, RecordKind, decode_segment_header, encode_record, records, whole_prefix

if TYPE_CHECKING:
    from hashlib import _Hash

_GAP: Final = struct.Struct("<QQ")
_STREAM_NAMES: Final[dict[int, str]] = {RecordKind.STDOUT: "stdout", RecordKind.STDERR: "stderr", RecordKind.PTY: "pty"}


def gap_record(start: int, end: int) -> bytes:
    """The record that stands for a hole."""
    return encode_record(RecordKind.GAP, _GAP.pack(start, end), 0)


async def read_log(log: Log, offset: int, more: Callable[[], bool] | None) -> AsyncIterator[bytes]:
    """Whole records from `offset` on.

    `more` is None for what is there now; else it is asked at the end whether waiting is worth it.
    """
    while True:
        end, gap = log.end, next_gap(log.gaps, offset)
        if gap is not None and gap[0] <= offset:
            yield gap_record(offset, gap[1])
            offset = gap[1]
            continue
        limit = end if gap is None else gap[0]
        if offset < limit:
            block = await anyio.to_thread.run_sync(_read, log.path, offset, min(READ_BLOCK_BYTES, limit - offset))
            whole = _whole(block)
            if whole:
                yield block[:whole]
                offset += whole
                continue
            if gap is not None or log.complete or len(block) == READ_BLOCK_BYTES:
                # No record starts here, and none will: what cannot be read is a hole too.
                yield gap_record(offset, limit)
                offset = limit
                continue
        elif gap is not None:
            continue
        if more is None or log.complete or not more():
            return
        if log.end == end:
            await log.wait()


def _whole(block: bytes) -> int:
    try:
        return whole_prefix(block, len(block))
    except RemoteError:
        return _sound(block)


def _sound(block: bytes) -> int:
    """Length of the records before the first damaged header."""
    at = 0
    try:
        for record in records(block, 0):
            at = record.end
    except RemoteError:
        pass
    return at


def is_boundary(log: Log, offset: int) -> bool:
    """Whether a reader may start at `offset`: at the end, in a gap, or where a record begins."""
    gap = next_gap(log.gaps, offset)
    if offset >= log.end or (gap is not None and gap[0] <= offset):
        return True
    header = _read(log.path, offset, min(RECORD_HEADER_BYTES, log.end - offset))
    try:
        whole_prefix(header, 0)
    except RemoteError:
        return False
    return len(header) == RECORD_HEADER_BYTES


def _read(path: Path, offset: int, size: int) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        return os.pread(fd, size, offset)
    finally:
        os.close(fd)


@dataclass(frozen=True, slots=True, kw_only=True)
class Digests:
    """What a stored log adds up to, to be compared with the signed settlement."""

    streams: dict[str, tuple[int, str]]
    """Bytes and SHA-256 by stream."""
    end: int
    segments: int
    chain: str
    """SHA-256 of the last segment, or zeros where there is none."""
    chain_ok: bool
    """Every segment that follows another one directly names its digest, its own place and the attempt."""


class _Reckoning:
    """Digests of one log, record by record."""

    def __init__(self, attempt: str) -> None:
        self.attempt = attempt
        self.streams: dict[str, tuple[int, _Hash]] = {name: (0, hashlib.sha256()) for name in ("stdout", "stderr")}
        self.segment: _Hash | None = None
        self.previous: bytes | None = NO_SEGMENT
        self.segments = 0
        self.sound = True

    def take(self, record: Record, raw: memoryview) -> None:
        """Count one record; `raw` is all of it."""
        if record.kind == RecordKind.SEGMENT:
            self._begin(record)
        if self.segment is not None:
            self.segment.update(raw)
        name = _STREAM_NAMES.get(record.kind)
        if name is not None:
            size, digest = self.streams.get(name) or (0, hashlib.sha256())
            digest.update(record.payload)
            self.streams[name] = (size + len(record.payload), digest)

    def hole(self) -> None:
        """Bytes are missing: whether the segment before was whole is not known, so its link proves nothing."""
        self.segment = self.previous = None

    def _begin(self, record: Record) -> None:
        if self.segment is not None:
            self.previous = self.segment.digest()
        self.segment = hashlib.sha256()
        self.segments += 1
        try:
            header = decode_segment_header(record.payload)
        except RemoteError:
            self.sound = False
            return
        linked = self.previous is None or header.previous == self.previous
        self.sound = self.sound and linked and header.base == record.offset and header.attempt == self.attempt


def digests(row: LogRow, path: Path) -> Digests:
    """Read a log once and add it up. Blocking: for a worker thread."""
    sums = _Reckoning(row.attempt)
    for record, raw in _walk(row, path, sums):
        sums.take(record, raw)
    chain = "0" * 64 if sums.segment is None else sums.segment.hexdigest()
    return Digests(
        streams={name: (size, digest.hexdigest()) for name, (size, digest) in sums.streams.items()},
        end=row.end,
        segments=sums.segments,
        chain=chain,
        chain_ok=sums.sound,
    )


def _walk(row: LogRow, path: Path, sums: _Reckoning) -> Iterator[tuple[Record, memoryview]]:
    if row.end == 0:
        return
    offset = 0
    while offset < row.end:
        gap = next_gap(row.gaps, offset)
        if gap is not None and gap[0] <= offset:
            sums.hole()
            offset = gap[1]
            continue
        limit = row.end if gap is None else gap[0]
        block = memoryview(_read(path, offset, min(DIGEST_BLOCK_BYTES, limit - offset)))
        whole = _whole(bytes(block))
        for record in records(block[:whole], offset):
            yield record, block[record.offset - offset : record.end - offset]
        if whole == 0:
            sums.hole()
            sums.sound = False
            offset = limit
        offset += whole
