"""Vectors of bytes: data frames, records, and segments whose digests form a chain."""

import hashlib
from collections.abc import Callable

from protocol.errors import ProtocolError
from protocol.frames import DataFrame, data_header, decode_data, encode_data
from protocol.limits import CHANNELS_MAX
from protocol.records import (
    NO_SEGMENT,
    RecordKind,
    SegmentHeader,
    decode_segment_header,
    encode_record,
    encode_segment_header,
)
from protocol.records import records as read

BORN_NS = 1_795_000_000_000_000_000


def bad_case(name: str, data: bytes, reader: Callable[[bytes], object], place: str = "hex") -> dict[str, object]:
    """Bytes that a reader refuses, and why."""
    reason = None
    try:
        reader(data)
    except ProtocolError as refused:
        reason = str(refused.reason)
    return {"name": name, place: data.hex(), "reason": reason}


def frames() -> dict[str, object]:
    """Data frames that are read, and that are refused."""
    good = [DataFrame(0, 0, b"x"), DataFrame(7, 2**40, b"\0\xff"), DataFrame(CHANNELS_MAX - 1, 2**64 - 1, b"abc")]
    good.append(DataFrame(1, 5, b"half", goes_on=True))
    bad = {
        "empty": b"",
        "no data": data_header(0, 0),
        "another type": b"\2" + data_header(0, 0)[1:] + b"x",
        "another version": b"\1\2" + data_header(0, 0)[2:] + b"x",
        "another flag": b"\1\1\2\0" + data_header(0, 0)[4:] + b"x",
        "channel out of range": data_header(CHANNELS_MAX, 0) + b"x",
    }
    return {
        "good": [
            {
                "channel": f.channel,
                "offset": str(f.offset),
                "data": bytes(f.data).hex(),
                "goes_on": f.goes_on,
                "frame": encode_data(f).hex(),
            }
            for f in good
        ],
        "bad": [bad_case(name, data, decode_data, "frame") for name, data in bad.items()],
    }


def segment(base: int, previous: bytes, *body: tuple[int, bytes]) -> bytes:
    """One segment file."""
    header = encode_segment_header(SegmentHeader(base, previous, "ex_1.1"))
    parts = [(RecordKind.SEGMENT, header), *body]
    return b"".join(encode_record(kind, payload, BORN_NS + n) for n, (kind, payload) in enumerate(parts))


def records() -> dict[str, object]:
    """A log of two segments with a gap between them, damaged headers, and segment headers."""
    first = segment(0, NO_SEGMENT, (RecordKind.STDOUT, b"hello\n"), (RecordKind.STDERR, b"\xff\0"))
    base = len(first) + 1000
    second = segment(base, hashlib.sha256(first).digest(), (RecordKind.STDOUT, b"late"), (RecordKind.EXIT, b"{}"))
    damaged = {"length": 0, "kind": 4, "flags": 5, "check": 6, "time": 8}
    headers = {"too short": b"\1\0", "another format": b"\2\0" + bytes(40), "no text": b"\1\0" + bytes(40) + b"\xff"}
    return {
        "segments": [
            {"base": at, "hex": data.hex(), "sha256": hashlib.sha256(data).hexdigest(), "records": told(data, at)}
            for at, data in ((0, first), (base, second))
        ],
        "gap": {"start": len(first), "end": base},
        "end": base + len(second),
        "chain": hashlib.sha256(second).hexdigest(),
        "incomplete": {"hex": first[:-1].hex(), "records": told(first[:-1], 0)},
        "damaged": [bad_case(name, flipped(first, at), lambda data: told(data, 0)) for name, at in damaged.items()],
        "headers": [bad_case(name, data, decode_segment_header) for name, data in headers.items()],
    }


def told(data: bytes, offset: int) -> list[dict[str, object]]:
    """Whole records as JSON."""
    return [
        {"offset": r.offset, "kind": r.kind, "unix_ns": str(r.unix_ns), "payload": r.payload.hex()}
        for r in read(data, offset)
    ]


def flipped(data: bytes, at: int) -> bytes:
    """`data` with one bit changed."""
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
