"""Reading a stored log: whole records for a client, digests for whoever wants to prove it.

A client gets the bytes as the runner sent them. Where bytes exist nowhere, or are no records, it gets one record of kind GAP whose
payload is `<QQ` (start, end) and goes on behind it: a reader is never stuck and never told a hole is data.
"""

import os
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

import anyio.to_thread

from controlplane.limits import DIGEST_BLOCK_BYTES, READ_BLOCK_BYTES
from controlplane.logstore import Log, next_gap
from controlplane.rows import LogRow
from protocol.errors import RemoteError
from protocol.limits import RECORD_HEADER_BYTES
from protocol.logproof import Claim, Reckoning, Sums
from protocol.records import RecordKind, encode_record, records, whole_prefix

_GAP: Final = struct.Struct("<QQ")


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


def digests(row: LogRow, path: Path, claim: Claim | None) -> Sums:
    """Read a log once and add it up; `claim` is what it will be compared with. Blocking: for a worker thread."""
    reckoning = Reckoning(row.attempt, frozenset() if claim is None else claim.marks)
    offset = 0
    while offset < row.end:
        gap = next_gap(row.gaps, offset)
        if gap is not None and gap[0] <= offset:
            reckoning.hole(offset, gap[1])
            offset = gap[1]
            continue
        limit = row.end if gap is None else gap[0]
        block = memoryview(_read(path, offset, min(DIGEST_BLOCK_BYTES, limit - offset)))
        whole = _whole(bytes(block))
        for record in records(block[:whole], offset):
            reckoning.take(record, block[record.offset - offset : record.end - offset])
        if whole == 0:
            words = "is not there any more" if len(block) < min(DIGEST_BLOCK_BYTES, limit - offset) else "is no record"
            reckoning.fault(f"what was stored at {offset} {words}")
            reckoning.hole(offset, limit)
            offset = limit
        offset += whole
    return reckoning.sums()
