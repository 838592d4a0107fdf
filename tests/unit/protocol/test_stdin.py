"""Signed pieces of stdin: what was signed comes out, and nothing else does."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import Reason, RemoteError
from protocol.ids import Attempt
from protocol.keys import PrivateKey
from protocol.limits import FRAME_BYTES_MAX, INPUT_PIECE_BYTES_MAX, JSON_INT_MAX
from protocol.messages import Input, decode_from_plane, encode
from protocol.stdin import open_piece, sign_piece

KEY = PrivateKey(b"k" * 32)
ATTEMPT = Attempt.parse("ex_1.1")


@given(st.binary(max_size=2000), st.integers(0, JSON_INT_MAX), st.booleans())
def test_a_piece_comes_out_as_it_was_signed(data: bytes, offset: int, end: bool) -> None:
    """Through the frame that carries it."""
    piece = sign_piece(KEY, ATTEMPT, offset, data, end=end)
    heard = decode_from_plane(encode(piece))
    assert isinstance(heard, Input) and open_piece(heard, KEY.public) == data


def test_the_largest_piece_fits_a_frame() -> None:
    """And a larger one is not made."""
    attempt = Attempt.parse("e" * 64 + ".9007199254740991")
    assert (
        len(encode(sign_piece(KEY, attempt, JSON_INT_MAX, b"\xff" * INPUT_PIECE_BYTES_MAX, end=True))) < FRAME_BYTES_MAX
    )
    with pytest.raises(ValueError, match="at most"):
        sign_piece(KEY, attempt, 0, bytes(INPUT_PIECE_BYTES_MAX + 1), end=False)


@pytest.mark.parametrize(
    "change",
    [
        {"attempt": "ex_1.2"},
        {"offset": 8},
        {"data": "b3RoZXI="},
        {"end": True},
        {"sig": "A" * 86},
    ],
)
def test_a_piece_that_was_changed_is_none(change: dict[str, object]) -> None:
    """Whatever of it."""
    piece = sign_piece(KEY, ATTEMPT, 7, b"mine", end=False).model_copy(update=change)
    with pytest.raises(RemoteError) as caught:
        open_piece(piece, KEY.public)
    assert caught.value.reason in (Reason.BAD_SIG, Reason.BAD_FRAME)


def test_another_key_signs_nothing() -> None:
    """Also where everything else is right."""
    piece = sign_piece(PrivateKey(b"o" * 32), ATTEMPT, 7, b"mine", end=False)
    with pytest.raises(RemoteError, match="BAD_SIG"):
        open_piece(piece, KEY.public)
