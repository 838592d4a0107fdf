"""The log's records as bytes (docs/shim.md §3): headers, the segment record, segment names. Pure."""

from __future__ import annotations

import _struct
from binascii import crc32

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

HEADER_BYTES: Final = 16
PAYLOAD_MAX: Final = 65_536
STDOUT: Final = 1
STDERR: Final = 2
PTY: Final = 3
RESIZE: Final = 4
SEGMENT: Final = 7
MARKER: Final = 8
EXIT: Final = 9
EVENT: Final = 10
# What a child writes; the last only where it was given a descriptor for it.
OUTPUTS: Final = (STDOUT, STDERR, EVENT)
SEGMENT_FORMAT: Final = 1
NO_DIGEST: Final = bytes(32)

_HEADER: Final = _struct.Struct("<IBBHQ")
_CHECKED: Final = _struct.Struct("<IBBQ")
_SEGMENT: Final = _struct.Struct("<HQ32s")
_SIZE: Final = _struct.Struct("<HH")


class RecordError(ValueError):
    """Bytes that are not a record header of this format."""


def pack_header_into(buffer: bytearray | memoryview, at: int, length: int, kind: int, unix_ns: int) -> None:
    """Write the header of a record with `length` payload bytes at `at`."""
    check = crc32(_CHECKED.pack(length, kind, 0, unix_ns)) & 0xFFFF
    _HEADER.pack_into(buffer, at, length, kind, 0, check, unix_ns)


def pack_record(kind: int, payload: bytes, unix_ns: int) -> bytes:
    """One whole record. The payload is at most `PAYLOAD_MAX` bytes."""
    assert len(payload) <= PAYLOAD_MAX
    head = bytearray(HEADER_BYTES)
    pack_header_into(head, 0, len(payload), kind, unix_ns)
    return bytes(head) + payload


def unpack_header(data: bytes | memoryview, at: int = 0) -> tuple[int, int, int]:
    """`(length, kind, unix_ns)` of the header at `at`. Raises RecordError when it is short, torn or too long."""
    if len(data) - at < HEADER_BYTES:
        raise RecordError("short header")
    length, kind, flags, check, unix_ns = _HEADER.unpack_from(data, at)
    if check != crc32(_CHECKED.pack(length, kind, flags, unix_ns)) & 0xFFFF:
        raise RecordError("header check does not match")
    if length > PAYLOAD_MAX or flags != 0:
        raise RecordError("not a record of this version")
    return length, kind, unix_ns


def resize_record(rows: int, cols: int, unix_ns: int) -> bytes:
    """The record of a terminal's new size."""
    return pack_record(RESIZE, _SIZE.pack(rows, cols), unix_ns)


def segment_record(base: int, previous: bytes, attempt: bytes, unix_ns: int) -> bytes:
    """The record that opens the segment at `base`; `previous` is the digest of the segment before."""
    return pack_record(SEGMENT, _SEGMENT.pack(SEGMENT_FORMAT, base, previous) + attempt, unix_ns)


def unpack_segment(payload: bytes) -> tuple[int, bytes, bytes]:
    """`(base, previous digest, attempt)` of a segment record's payload. Raises RecordError."""
    if len(payload) < _SEGMENT.size:
        raise RecordError("short segment record")
    form, base, previous = _SEGMENT.unpack_from(payload)
    if form != SEGMENT_FORMAT:
        raise RecordError("segment format is not known")
    return base, previous, payload[_SEGMENT.size :]


def segment_name(base: int) -> str:
    """File name of the segment at `base`."""
    return f"{base:016x}.seg"
