"""Binary frames: verbatim slices of an attempt's log. Everything else on the connection is JSON text (`messages`)."""

import struct
from typing import Final, NamedTuple

from protocol.errors import Reason, RemoteError
from protocol.limits import CHANNELS_MAX, DATA_HEADER_BYTES, DATA_SLICE_BYTES_MAX

_DATA: Final = struct.Struct("<BBHIQ")
_GOES_ON: Final = 1
FRAME_DATA: Final = 1
FRAME_VERSION: Final = 1

assert _DATA.size == DATA_HEADER_BYTES


class DataFrame(NamedTuple):
    """`data` is the log of `channel` from `offset` on; `goes_on`: its last record ends in a later frame."""

    channel: int
    offset: int
    data: bytes | memoryview
    goes_on: bool = False


def data_header(channel: int, offset: int, *, goes_on: bool = False) -> bytes:
    """The 16 bytes in front of a slice: `u8 type, u8 version, u16 flags, u32 channel, u64 offset`, little endian.

    Flags: 1, the last record ends in a later frame.
    """
    return _DATA.pack(FRAME_DATA, FRAME_VERSION, _GOES_ON if goes_on else 0, channel, offset)


def encode_data(frame: DataFrame) -> bytes:
    """A data frame as bytes. Raises ValueError when it is empty or too long."""
    if not 0 < len(frame.data) <= DATA_SLICE_BYTES_MAX:
        raise ValueError("a data frame carries 1 to 65,552 bytes")
    return data_header(frame.channel, frame.offset, goes_on=frame.goes_on) + frame.data


def decode_data(message: bytes) -> DataFrame:
    """Read a binary frame; `data` is a view of `message`. Raises RemoteError(BAD_FRAME | UNSUPPORTED_VERSION)."""
    if not DATA_HEADER_BYTES < len(message) <= DATA_HEADER_BYTES + DATA_SLICE_BYTES_MAX:
        raise RemoteError(Reason.BAD_FRAME, "a data frame has no or too much data")
    kind, version, flags, channel, offset = _DATA.unpack_from(message)
    if kind != FRAME_DATA or flags & ~_GOES_ON or channel >= CHANNELS_MAX:
        raise RemoteError(Reason.BAD_FRAME, "not a data frame")
    if version != FRAME_VERSION:
        raise RemoteError(Reason.UNSUPPORTED_VERSION, "a data frame of another version")
    return DataFrame(channel, offset, memoryview(message)[DATA_HEADER_BYTES:], bool(flags & _GOES_ON))
