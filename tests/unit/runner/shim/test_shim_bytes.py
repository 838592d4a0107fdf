"""Records, frames and JSON as bytes: what is packed comes back, what is broken is told."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.shim import files, records, wire

pytestmark = pytest.mark.slow

PAYLOAD = st.binary(max_size=300)
U64 = st.integers(0, (1 << 64) - 1)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(st.integers(0, 255), PAYLOAD, U64)
def test_a_record_comes_back(kind: int, payload: bytes, unix_ns: int) -> None:
    """Header and payload survive packing."""
    data = records.pack_record(kind, payload, unix_ns)
    assert records.unpack_header(data) == (len(payload), kind, unix_ns)
    assert data[records.HEADER_BYTES :] == payload


@given(PAYLOAD, U64, st.integers(0, 8 * records.HEADER_BYTES - 1))
def test_a_flipped_header_bit_is_seen(payload: bytes, unix_ns: int, bit: int) -> None:
    """No single bit of a header can change unseen."""
    data = bytearray(records.pack_record(records.STDOUT, payload, unix_ns))
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(records.RecordError):
        records.unpack_header(bytes(data))


@given(U64, st.binary(min_size=32, max_size=32), st.binary(max_size=100))
def test_a_segment_record_comes_back(base: int, previous: bytes, attempt: bytes) -> None:
    """Base, digest and attempt survive packing."""
    data = records.segment_record(base, previous, attempt, 5)
    assert records.unpack_header(data)[1] == records.SEGMENT
    assert records.unpack_segment(data[records.HEADER_BYTES :]) == (base, previous, attempt)


def test_a_header_has_the_documented_layout() -> None:
    """One fixed example, written out by hand."""
    data = records.pack_record(records.STDERR, b"hi", 0x0102030405060708)
    assert data[:6] == bytes.fromhex("02000000 02 00".replace(" ", ""))
    assert data[8:] == bytes.fromhex("0807060504030201") + b"hi"
    from zlib import crc32

    assert struct.unpack_from("<H", data, 6)[0] == crc32(data[:6] + data[8:16]) & 0xFFFF


@given(st.lists(st.tuples(st.integers(0, 255), PAYLOAD), max_size=8), st.integers(1, 50))
def test_frames_come_back_however_they_are_cut(frames: list[tuple[int, bytes]], step: int) -> None:
    """The stream may arrive in any pieces."""
    stream = b"".join(wire.pack(kind, body) for kind, body in frames)
    inbox = bytearray()
    taken = []
    for at in range(0, len(stream), step):
        inbox += stream[at : at + step]
        while (frame := wire.take(inbox)) is not None:
            taken.append(frame)
    assert taken == frames
    assert not inbox


@pytest.mark.parametrize(
    ("kind", "length", "fits"),
    [
        (wire.STOP, 65_536, True),
        (wire.STOP, 65_537, False),
        (wire.RELEASE, 262_144, True),
        (wire.RELEASE, 262_145, False),
    ],
)
def test_a_frame_has_a_bound_of_its_type(kind: int, length: int, fits: bool) -> None:
    """The bound is seen in the first five bytes, before anything is buffered."""
    inbox = bytearray(struct.pack("<IB", length, kind))
    if fits:
        assert wire.take(inbox) is None
    else:
        with pytest.raises(wire.WireError):
            wire.take(inbox)


@pytest.mark.parametrize("inbox", [b"\0\0\0\0", b"\0\0\0\0\x04more"])
def test_an_empty_frame_is_broken(inbox: bytes) -> None:
    """A length counts its type, so it is never zero."""
    with pytest.raises(wire.WireError):
        wire.take(bytearray(inbox))


def test_bodies_may_grow_at_the_end() -> None:
    """A later version's longer body is read as far as it is known."""
    assert wire.unpack_lease(struct.pack("<QQBI", 1, 2, 0, 3) + b"more") == (1, 2, 0, 3)
    assert wire.unpack_hello(struct.pack("<HHQ", 1, 2, 3) + b"more") == (1, 2, 3)
    assert wire.unpack_stop(struct.pack("<I", wire.GRACE_OF_SPEC) + b"me") == (None, "me")
    for unpack in (wire.unpack_lease, wire.unpack_hello, wire.unpack_stop, wire.unpack_offset):
        with pytest.raises(wire.WireError):
            unpack(b"x")
    with pytest.raises(wire.WireError):
        wire.unpack_lease(struct.pack("<QQB", 1, 2, 3))


def test_a_lease_may_leave_the_grace_out() -> None:
    """The body of before still says what it said; a grace cut short is broken."""
    assert wire.unpack_lease(struct.pack("<QQB", 1, 2, 0)) == (1, 2, 0, None)
    assert wire.unpack_lease(wire.pack_lease(1, 2, 0, None)) == (1, 2, 0, None)
    assert wire.unpack_lease(wire.pack_lease(1, 2, 0, 20_000)) == (1, 2, 0, 20_000)
    for cut in range(1, 4):
        with pytest.raises(wire.WireError):
            wire.unpack_lease(wire.pack_lease(1, 2, 0, 20_000)[:-cut])


@given(JSON)
def test_json_is_read_and_written_like_the_standard_librarys(value: Any) -> None:
    """Our writer and `json` agree in both directions."""
    text = files.encode(value)
    assert json.loads(text) == value
    assert files.decode(text.encode("ascii")) == value
    assert files.decode(json.dumps(value).encode()) == value


@pytest.mark.parametrize("text", ["", "{", "nul", '{"a":1,"a":2}', "[NaN]", "1 2", "[" * 100_000, "\xff"])
def test_what_is_not_json_is_refused(text: str) -> None:
    """Broken, doubled, non-finite and bottomless texts raise ValueError."""
    with pytest.raises(ValueError, match=r".*"):
        files.decode(text.encode("latin-1"))
