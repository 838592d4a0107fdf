"""Bytes for an attempt's stdin: each piece is signed by the key that the signed start names, over its place in the stream.

Whoever carries a piece can drop or repeat it and nothing else: the shim takes each offset once, in order (docs/protocol.md §11).
"""

import struct
from base64 import b64decode, b64encode
from typing import Final

from protocol.errors import Reason, RemoteError
from protocol.ids import Attempt
from protocol.keys import SIGNATURE_BYTES, PrivateKey, PublicKey, b64url, b64url_decode
from protocol.limits import INPUT_PIECE_BYTES_MAX
from protocol.messages import Input

_CONTEXT: Final = b"local-runner.input.v1\0"
_PLACE: Final = struct.Struct("<QB")


def signed_bytes(attempt: str, offset: int, data: bytes, *, end: bool) -> bytes:
    """What is signed: context, attempt, NUL, offset (u64), whether it is the end (u8), bytes."""
    return b"".join((_CONTEXT, attempt.encode("ascii"), b"\0", _PLACE.pack(offset, end), data))


def sign_piece(key: PrivateKey, attempt: Attempt, offset: int, data: bytes, *, end: bool) -> Input:
    """A piece to send. Raises ValueError for more than INPUT_PIECE_BYTES_MAX."""
    if len(data) > INPUT_PIECE_BYTES_MAX:
        raise ValueError(f"a piece has at most {INPUT_PIECE_BYTES_MAX} bytes")
    signature = key.sign(signed_bytes(attempt.name, offset, data, end=end))
    return Input(
        attempt=attempt.name, offset=offset, data=b64encode(data).decode("ascii"), end=end, sig=b64url(signature)
    )


def open_piece(piece: Input, key: PublicKey) -> bytes:
    """Its bytes. Raises RemoteError(BAD_SIG | BAD_FRAME); nothing of it counts then."""
    try:
        data = b64decode(piece.data.encode("ascii"), validate=True)
        signature = b64url_decode(piece.sig, SIGNATURE_BYTES)
    except ValueError:
        raise RemoteError(Reason.BAD_FRAME, "not base64") from None
    if not key.verifies(signature, signed_bytes(piece.attempt, piece.offset, data, end=piece.end)):
        raise RemoteError(Reason.BAD_SIG, "it is not signed by the key that the start names")
    return data
