"""Ids and the names of attempts."""

import pytest

from protocol.ids import DIGEST_PATTERN, GENESIS, Attempt, is_id, new_id
from tests.support.builders import an_attempt


def test_ids_sort_by_time() -> None:
    """An id of a later millisecond is greater, whatever its entropy."""
    early = new_id("cmd", 1_795_000_000_000, b"\xff" * 10)
    late = new_id("cmd", 1_795_000_000_001, b"\0" * 10)
    assert early < late
    assert is_id(early)
    assert len(early) == len("cmd_") + 26


def test_an_id_is_the_ulid_of_its_parts() -> None:
    """The smallest and the largest ULID, in lower case."""
    assert new_id("x", 0, b"\0" * 10) == "x_" + "0" * 26
    assert new_id("x", 2**48 - 1, b"\xff" * 10) == "x_7" + "z" * 25


def test_an_id_wants_ten_bytes() -> None:
    """Other entropy is our own mistake."""
    with pytest.raises(ValueError, match="10 bytes"):
        new_id("cmd", 0, b"123")


@pytest.mark.parametrize("text", ["", "a b", "a\n", "é", "a/b", "a.b", "x" * 65, "a\0"])
def test_what_is_no_id(text: str) -> None:
    """Anything a path, a terminal or a shell would take for more than a word."""
    assert not is_id(text)


def test_an_attempt_is_read_from_its_name() -> None:
    """The name of an attempt says both parts."""
    attempt = an_attempt("ex_1", 7)
    assert attempt.name == "ex_1.7"
    assert Attempt.parse("ex_1.7") == attempt


@pytest.mark.parametrize(
    "name",
    [
        "",
        "ex_1",
        "ex_1.",
        ".1",
        "ex_1.0",
        "ex_1.01",
        "ex_1.-1",
        "ex_1.1 ",
        "ex.1.1",
        "ex_1.1\n",
        "ex_1.٣",
        "../x.1",
        "ex_1." + "9" * 17,
    ],
)
def test_what_is_no_attempt(name: str) -> None:
    """Numbers have one spelling, ids are ids."""
    with pytest.raises(ValueError, match="not an attempt name"):
        Attempt.parse(name)


def test_genesis_is_a_digest() -> None:
    """The head of an empty stream has the form of every other."""
    assert DIGEST_PATTERN.fullmatch(GENESIS)
