"""What viewers of a PTY sign: what was signed comes out, and nothing else does."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from protocol.errors import Reason, RemoteError
from protocol.keys import PrivateKey
from protocol.limits import FRAME_BYTES_MAX, JSON_INT_MAX, TERMINAL_CELLS_MAX, TYPED_BYTES_MAX
from protocol.messages import Resized, Typed, decode_from_plane, encode
from protocol.terminals import check_resized, open_typed, sign_resized, sign_typed

KEY = PrivateKey(b"k" * 32)
NAME = "ex_1.1"


@given(st.binary(max_size=2000), st.integers(0, JSON_INT_MAX))
def test_what_is_typed_comes_out_as_it_was_signed(data: bytes, offset: int) -> None:
    """Through the frame that carries it."""
    heard = decode_from_plane(encode(sign_typed(KEY, NAME, "vw_1", offset, data)))
    assert isinstance(heard, Typed) and open_typed(heard, KEY.public) == data


def test_the_largest_piece_fits_a_frame() -> None:
    """And a larger one is not made."""
    name, viewer = "e" * 64 + ".9007199254740991", "v" * 40
    assert len(encode(sign_typed(KEY, name, viewer, JSON_INT_MAX, b"\xff" * TYPED_BYTES_MAX))) < FRAME_BYTES_MAX
    with pytest.raises(ValueError, match="at most"):
        sign_typed(KEY, NAME, "vw_1", 0, bytes(TYPED_BYTES_MAX + 1))


@pytest.mark.parametrize(
    "change",
    [
        {"attempt": "ex_1.2"},
        {"viewer": "vw_2"},
        {"offset": 8},
        {"data": "b3RoZXI="},
        {"data": "no base64"},
        {"sig": "A" * 86},
    ],
)
def test_a_piece_that_was_changed_is_none(change: dict[str, object]) -> None:
    """Whatever of it."""
    piece = sign_typed(KEY, NAME, "vw_1", 7, b"mine").model_copy(update=change)
    with pytest.raises(RemoteError) as caught:
        open_typed(piece, KEY.public)
    assert caught.value.reason in (Reason.BAD_SIG, Reason.BAD_FRAME)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"attempt": "ex_1.2"},
        {"viewer": "vw_2"},
        {"gen": 2},
        {"rows": 25},
        {"cols": 81},
        {"redraw": True},
        {"sig": "A" * 86},
        {"sig": "*"},
    ],
)
def test_a_size_counts_as_it_was_signed_and_no_other(change: dict[str, object]) -> None:
    """Rows and columns cannot change places, either."""
    said = decode_from_plane(encode(sign_resized(KEY, NAME, "vw_1", 1, 24, 80)))
    assert isinstance(said, Resized)
    if not change:
        check_resized(said, KEY.public)
        return
    with pytest.raises(RemoteError):
        check_resized(said.model_copy(update=change), KEY.public)


def test_what_is_typed_is_no_size_and_no_stdin() -> None:
    """Each signature says what it is for."""
    typed = sign_typed(KEY, NAME, "vw_1", 1, b"\x18\0\x50\0\0")
    sized = sign_resized(KEY, NAME, "vw_1", 1, 24, 80)
    with pytest.raises(RemoteError):
        check_resized(sized.model_copy(update={"sig": typed.sig}), KEY.public)


@pytest.mark.parametrize("size", [(0, 80), (24, 0), (TERMINAL_CELLS_MAX + 1, 80), (24, TERMINAL_CELLS_MAX + 1)])
def test_a_size_that_no_terminal_has_is_not_signed(size: tuple[int, int]) -> None:
    """Nor read."""
    with pytest.raises(ValidationError):
        sign_resized(KEY, NAME, "vw_1", 1, *size)
