"""Frames, records and names: whatever the bytes, they are read or refused by name, and what is written is read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import RemoteError
from protocol.frames import DataFrame, decode_data, encode_data
from protocol.identity import JoinString
from protocol.ids import Attempt, ExecutionId, FencingToken
from protocol.keys import b64url, b64url_decode
from protocol.limits import CHANNELS_MAX
from protocol.records import Record, decode_segment_header, encode_record, records, whole_prefix
from tests.support.builders import a_root

PAYLOADS = st.lists(st.tuples(st.integers(1, 9), st.binary(max_size=50), st.integers(0, 2**63)), max_size=6)
JOIN = f"rj1://h:1/{'A' * 22}#{a_root().fingerprint}"


def naive(written: list[tuple[int, bytes, int]], offset: int, cut: int) -> list[Record]:
    """The records that are whole in the first `cut` bytes, from what was written rather than from bytes."""
    whole, at = [], 0
    for kind, payload, unix_ns in written:
        size = 16 + len(payload)
        if at + size > cut:
            break
        whole.append(Record(offset + at, kind, unix_ns, payload))
        at += size
    return whole


@given(PAYLOADS, st.integers(0, 2**40), st.integers(0, 500), st.integers(0, 500))
def test_whole_records_are_read_at_any_split(
    written: list[tuple[int, bytes, int]], offset: int, cut: int, length_max: int
) -> None:
    """As a naive model says, for the records and for the prefix."""
    log = b"".join(encode_record(*record) for record in written)
    data = log[:cut]
    assert list(records(data, offset)) == naive(written, offset, len(data))
    assert whole_prefix(memoryview(data), length_max) == sum(
        16 + len(record.payload) for record in naive(written, 0, min(len(data), length_max))
    )


@given(PAYLOADS, st.integers(0, 500))
def test_a_log_read_in_two_parts_is_the_log(written: list[tuple[int, bytes, int]], cut: int) -> None:
    """A reader that goes on behind the last whole record misses and doubles nothing."""
    log = b"".join(encode_record(*record) for record in written)
    first = whole_prefix(log[:cut], cut)
    assert [*records(log[:first], 0), *records(log[first:], first)] == list(records(log, 0))


@given(st.binary(max_size=200))
def test_any_bytes_are_records_or_refused(data: bytes) -> None:
    """With RemoteError alone."""
    for read in (lambda: list(records(data, 0)), lambda: whole_prefix(data, 100), lambda: decode_segment_header(data)):
        try:
            read()
        except RemoteError:
            continue


@given(st.binary(max_size=100))
def test_any_bytes_are_a_data_frame_or_refused(message: bytes) -> None:
    """And what is read is what would be written."""
    try:
        frame = decode_data(message)
    except RemoteError:
        return
    assert encode_data(frame) == message


@given(st.integers(0, CHANNELS_MAX - 1), st.integers(0, 2**64 - 1), st.binary(min_size=1, max_size=100))
def test_a_data_frame_survives_the_wire(channel: int, offset: int, data: bytes) -> None:
    """All three parts."""
    frame = decode_data(encode_data(DataFrame(channel, offset, data)))
    assert (frame.channel, frame.offset, bytes(frame.data)) == (channel, offset, data)


@given(
    st.text()
    | st.integers(0, len(JOIN)).flatmap(lambda at: st.text(max_size=3).map(lambda x: JOIN[:at] + x + JOIN[at:]))
)
def test_any_text_is_a_join_string_or_refused(text: str) -> None:
    """And what is read is written the same way, but for leading zeros of the port."""
    try:
        join = JoinString.parse(text)
    except ValueError:
        return
    assert JoinString.parse(str(join)) == join


@given(st.text(max_size=80) | st.from_regex(r"[a-z_]{1,5}\.[0-9]{1,3}", fullmatch=True))
def test_any_text_is_an_attempt_or_refused(name: str) -> None:
    """And has one spelling."""
    try:
        attempt = Attempt.parse(name)
    except ValueError:
        return
    assert attempt.name == name


@given(st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True), st.integers(1, 10**16 - 1))
def test_an_attempt_survives_its_name(execution_id: str, start_token: int) -> None:
    """Both parts come back."""
    attempt = Attempt(ExecutionId(execution_id), FencingToken(start_token))
    assert Attempt.parse(attempt.name) == attempt


@given(st.binary(min_size=32, max_size=32))
def test_base64url_survives(data: bytes) -> None:
    """And has one spelling."""
    assert b64url_decode(b64url(data), 32) == data


@given(st.text(max_size=50))
def test_any_text_is_base64url_or_refused(text: str) -> None:
    """Whatever its alphabet, with ValueError alone."""
    with pytest.raises(ValueError, match="base64url"):
        b64url_decode(text + "=", 32)
