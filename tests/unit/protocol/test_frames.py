"""Binary frames."""

import pytest

from protocol.errors import Reason, RemoteError
from protocol.frames import DataFrame, data_header, decode_data, encode_data
from protocol.limits import CHANNELS_MAX, DATA_SLICE_BYTES_MAX


def test_a_slice_survives_the_wire() -> None:
    """Channel, offset and bytes come back."""
    frame = decode_data(encode_data(DataFrame(7, 2**40, b"abc")))
    assert (frame.channel, frame.offset, bytes(frame.data)) == (7, 2**40, b"abc")


def test_the_header_has_the_layout_of_the_page() -> None:
    """`u8 type, u8 version, u16 zero, u32 channel, u64 offset`, little endian."""
    assert data_header(1, 2) == b"\1\1\0\0" + b"\1\0\0\0" + b"\2\0\0\0\0\0\0\0"


def test_a_frame_is_never_empty_and_holds_a_whole_record() -> None:
    """1 to 65,552 bytes, on both sides."""
    largest = encode_data(DataFrame(0, 0, b"x" * DATA_SLICE_BYTES_MAX))
    assert len(decode_data(largest).data) == DATA_SLICE_BYTES_MAX
    for data in (b"", b"x" * (DATA_SLICE_BYTES_MAX + 1)):
        with pytest.raises(ValueError, match="65,552"):
            encode_data(DataFrame(0, 0, data))
        with pytest.raises(RemoteError):
            decode_data(data_header(0, 0) + data)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"", Reason.BAD_FRAME),
        (b"\2\1\0\0" + bytes(12) + b"x", Reason.BAD_FRAME),
        (b"\1\1\2\0" + bytes(12) + b"x", Reason.BAD_FRAME),
        (b"\1\2\0\0" + bytes(12) + b"x", Reason.UNSUPPORTED_VERSION),
        (data_header(CHANNELS_MAX, 0) + b"x", Reason.BAD_FRAME),
    ],
)
def test_what_is_no_data_frame_is_refused(message: bytes, reason: Reason) -> None:
    """Another type, a set reserve, another version, a channel out of range."""
    with pytest.raises(RemoteError) as refused:
        decode_data(message)
    assert refused.value.reason is reason
