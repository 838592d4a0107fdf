"""Records and segment headers of the log."""

import struct

import pytest

from protocol.errors import Reason, RemoteError
from protocol.limits import RECORD_PAYLOAD_BYTES_MAX
from protocol.records import (
    NO_SEGMENT,
    Record,
    RecordKind,
    SegmentHeader,
    decode_segment_header,
    encode_record,
    encode_segment_header,
    records,
    whole_prefix,
)

TWO = encode_record(RecordKind.STDOUT, b"one", 1) + encode_record(RecordKind.STDERR, b"", 2)


def test_records_have_absolute_offsets() -> None:
    """Headers count; the end of one is the offset of the next."""
    read = list(records(TWO, 100))
    assert read == [Record(100, 1, 1, b"one"), Record(119, 2, 2, b"")]
    assert [record.end for record in read] == [119, 135]
    assert list(records(memoryview(TWO), 100)) == read


def test_an_incomplete_tail_is_left_out() -> None:
    """A reader takes what is whole."""
    assert len(list(records(TWO[:-1], 0))) == 1
    assert list(records(TWO[:15], 0)) == []
    assert whole_prefix(TWO, 1000) == len(TWO)
    assert whole_prefix(TWO, len(TWO) - 1) == 19
    assert whole_prefix(TWO[:-1], 1000) == 19
    assert whole_prefix(TWO, 18) == 0


def test_the_layout_is_that_of_the_page() -> None:
    """Little endian: length, kind, flags, check, time."""
    record = encode_record(RecordKind.PTY, b"x", 5)
    assert record[:6] == b"\1\0\0\0\3\0"
    assert record[8:] == b"\5\0\0\0\0\0\0\0x"


@pytest.mark.parametrize("at", range(16))
def test_a_damaged_header_is_noticed(at: int) -> None:
    """Each of its 16 bytes is covered."""
    damaged = bytearray(TWO)
    damaged[at] ^= 1
    with pytest.raises(RemoteError) as refused:
        list(records(bytes(damaged), 0))
    assert refused.value.reason is Reason.BAD_FRAME
    with pytest.raises(RemoteError):
        whole_prefix(bytes(damaged), 1000)


def test_a_record_holds_64_kib() -> None:
    """Not a byte more, on either side."""
    largest = encode_record(1, b"x" * RECORD_PAYLOAD_BYTES_MAX, 0)
    assert len(next(records(largest, 0)).payload) == RECORD_PAYLOAD_BYTES_MAX
    with pytest.raises(ValueError, match="64 KiB"):
        encode_record(1, b"x" * (RECORD_PAYLOAD_BYTES_MAX + 1), 0)


def test_a_kind_from_the_future_is_passed_on() -> None:
    """Kinds are numbers to a reader."""
    assert next(records(encode_record(200, b"x", 0), 0)).kind == 200


def test_a_segment_header_names_base_predecessor_and_attempt() -> None:
    """What is written is read."""
    header = SegmentHeader(4096, NO_SEGMENT, "ex_1.1")
    assert decode_segment_header(encode_segment_header(header)) == header


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", Reason.BAD_FRAME),
        (b"\1\0" + bytes(39), Reason.BAD_FRAME),
        (struct.pack("<HQ32s", 2, 0, b""), Reason.UNSUPPORTED_VERSION),
        (struct.pack("<HQ32s", 1, 0, b"") + b"\xff", Reason.BAD_FRAME),
    ],
)
def test_a_bad_segment_header_is_refused(payload: bytes, reason: Reason) -> None:
    """Too short, of another format, or with a name that is no text."""
    with pytest.raises(RemoteError) as refused:
        decode_segment_header(payload)
    assert refused.value.reason is reason
