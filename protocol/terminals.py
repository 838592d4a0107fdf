"""What a viewer of a PTY types and says: signed by the key that its signed `pty.attach` names, over its place in the viewer's own count.

Whoever carries it can drop or repeat it and nothing else: the shim takes each offset of each viewer once, in order, and of sizes the
newest (docs/terminals.md).
"""

import struct
from base64 import b64decode, b64encode
from typing import Final

from protocol.channels import Resized, Typed
from protocol.errors import Reason, RemoteError
from protocol.keys import SIGNATURE_BYTES, PrivateKey, PublicKey, b64url, b64url_decode
from protocol.limits import TYPED_BYTES_MAX

_TYPED: Final = b"local-runner.typed.v1\0"
_RESIZED: Final = b"local-runner.resized.v1\0"
_OFFSET: Final = struct.Struct("<Q")
_SIZE: Final = struct.Struct("<QHHB")


def typed_bytes(attempt: str, viewer: str, offset: int, data: bytes) -> bytes:
    """What is signed: context, attempt, NUL, viewer, NUL, offset (u64), bytes."""
    return b"".join((_TYPED, attempt.encode("ascii"), b"\0", viewer.encode("ascii"), b"\0", _OFFSET.pack(offset), data))


def resized_bytes(attempt: str, viewer: str, gen: int, rows: int, cols: int, *, redraw: bool) -> bytes:
    """What is signed: context, attempt, NUL, viewer, NUL, gen (u64), rows, cols (u16 each), redraw (u8)."""
    place = _SIZE.pack(gen, rows, cols, redraw)
    return b"".join((_RESIZED, attempt.encode("ascii"), b"\0", viewer.encode("ascii"), b"\0", place))


def sign_typed(key: PrivateKey, attempt: str, viewer: str, offset: int, data: bytes) -> Typed:
    """A message to send. Raises ValueError for more than TYPED_BYTES_MAX."""
    if len(data) > TYPED_BYTES_MAX:
        raise ValueError(f"at most {TYPED_BYTES_MAX} bytes are typed at once")
    signature = b64url(key.sign(typed_bytes(attempt, viewer, offset, data)))
    return Typed(attempt=attempt, viewer=viewer, offset=offset, data=b64encode(data).decode("ascii"), sig=signature)


def sign_resized(
    key: PrivateKey, attempt: str, viewer: str, gen: int, rows: int, cols: int, *, redraw: bool = False
) -> Resized:
    """A message to send. Raises ValueError for a size that no terminal has."""
    signature = b64url(key.sign(resized_bytes(attempt, viewer, gen, rows, cols, redraw=redraw)))
    return Resized(attempt=attempt, viewer=viewer, gen=gen, rows=rows, cols=cols, redraw=redraw, sig=signature)


def open_typed(typed: Typed, key: PublicKey) -> bytes:
    """Its bytes. Raises RemoteError(BAD_SIG | BAD_FRAME); nothing of it counts then."""
    try:
        data = b64decode(typed.data.encode("ascii"), validate=True)
    except ValueError:
        raise RemoteError(Reason.BAD_FRAME, "not base64") from None
    _check(typed.sig, typed_bytes(typed.attempt, typed.viewer, typed.offset, data), key)
    return data


def check_resized(said: Resized, key: PublicKey) -> None:
    """Raises RemoteError(BAD_SIG | BAD_FRAME); it does not count then."""
    signed = resized_bytes(said.attempt, said.viewer, said.gen, said.rows, said.cols, redraw=said.redraw)
    _check(said.sig, signed, key)


def _check(sig: str, signed: bytes, key: PublicKey) -> None:
    try:
        signature = b64url_decode(sig, SIGNATURE_BYTES)
    except ValueError:
        raise RemoteError(Reason.BAD_FRAME, "not base64") from None
    if not key.verifies(signature, signed):
        raise RemoteError(Reason.BAD_SIG, "it is not signed by the key of this viewer")
