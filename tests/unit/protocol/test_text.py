"""Text between people and machines: what is typed is read exactly, what strangers say is never obeyed by a terminal."""

import json
import struct
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.logtext import LogText, Piece, Standard
from protocol.records import Record, RecordKind
from protocol.text import Visible, duration_ms, show_age, show_duration, show_size, size_bytes, visible

NAUGHTY = Path(__file__).parents[4] / "shared" / "vectors" / "blns" / "blns.json"
DANGEROUS = (
    "\x1b[31m",
    "\x1b]0;title\x07",
    "\x9b2J",
    "\u202e",
    "\u2066",
    "\u200b",
    "\x00",
    "\x7f",
    "\r",
    "\u2028",
    "\ud800",
)


def harmless(text: str, keep: str = "") -> bool:
    """Nothing in it is a control, format, surrogate or separator that a terminal may obey."""
    return all(
        char in keep or char in "\u200c\u200d" or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        for char in text
    )


@pytest.mark.parametrize(
    ("text", "ms"),
    [("500ms", 500), ("10s", 10_000), ("10m", 600_000), ("2h", 7_200_000), ("1d", 86_400_000), ("1h30m", 5_400_000)],
)
def test_durations_are_read_in_the_units_people_type(text: str, ms: int) -> None:
    """Each unit, and a sequence of them."""
    assert duration_ms(text) == ms


@pytest.mark.parametrize("text", ["", "10", "s", "-1s", "1.5s", "1s1h", "1s 1s", "10S", "1m30", "٣s", "9" * 400 + "s"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    """Nothing is guessed, least of all a unit."""
    with pytest.raises(ValueError, match=r"duration"):
        duration_ms(text)


@given(st.integers(0, 2**53 - 1))
def test_a_shown_duration_is_read_back(ms: int) -> None:
    """Exactly, whatever its length."""
    assert duration_ms(show_duration(ms)) == ms
    assert show_duration(-ms).removeprefix("-") == show_duration(ms)


@given(st.integers(0, 2**53 - 1))
def test_a_shown_age_is_near(ms: int) -> None:
    """Never more than it is, and within one of its finer unit."""
    shown = duration_ms(show_age(ms))
    assert shown <= ms <= shown + max(shown // 20, 1000)


@given(st.integers(0, 2**40), st.sampled_from([("", 1), ("B", 1), ("KiB", 2**10), ("MiB", 2**20), ("GiB", 2**30)]))
def test_sizes_are_read_in_binary_units(count: int, unit: tuple[str, int]) -> None:
    """With or without a space, up to what JSON can hold."""
    name, factor = unit
    if count * factor < 2**53:
        assert size_bytes(f"{count}{name}") == size_bytes(f"{count} {name}".strip()) == count * factor


@pytest.mark.parametrize("text", ["", "KiB", "1KB", "1.5MiB", "-1", "1 2", "9" * 17])
def test_what_is_no_size_is_refused(text: str) -> None:
    """Decimal units are not binary ones in another spelling."""
    with pytest.raises(ValueError, match=r"bytes"):
        size_bytes(text)


def test_sizes_are_shown_in_the_largest_unit() -> None:
    """With a decimal only where there is one."""
    assert [show_size(n) for n in (0, 1023, 1024, 1536, 8 << 20)] == ["0 B", "1023 B", "1 KiB", "1.5 KiB", "8 MiB"]


@given(st.text(st.characters(exclude_categories=[])))
def test_visible_text_obeys_nobody(text: str) -> None:
    """Any text, lone surrogates too, and it can be encoded."""
    assert harmless(visible(text))
    visible(text).encode("utf-8")


@pytest.mark.parametrize("text", DANGEROUS)
def test_a_dangerous_character_is_named(text: str) -> None:
    """Escaped as Python writes it, so that a person sees what was there."""
    assert "\\" in visible(f"a{text}b")


def test_ordinary_text_stays_as_it_is() -> None:
    """Other scripts, spaces, backslashes and joined emoji."""
    for text in ("make -j4 'a b'", "naïve\u00a0日本語", "C:\\x1b", "👩\u200d💻"):
        assert visible(text) == text


@pytest.mark.skipif(not NAUGHTY.exists(), reason="the list of naughty strings is not beside this checkout")
def test_naughty_strings_obey_nobody() -> None:
    """The public list, as text and as a stream."""
    for text in json.loads(NAUGHTY.read_text("utf-8")):
        assert harmless(visible(text))
        stream = Visible()
        shown = stream.feed(text.encode("utf-8", "surrogatepass")) + stream.feed(b"", final=True)
        assert harmless(shown.decode("utf-8"), keep="\n\t")


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=5))
def test_a_stream_is_shown_alike_however_it_is_cut(data: bytes, cuts: list[int]) -> None:
    """Characters and line ends cut in two by a read come out whole, and nothing dangerous does."""
    whole = Visible()
    expected = whole.feed(data) + whole.feed(b"", final=True)
    pieces, stream, at = b"", Visible(), 0
    for cut in sorted(cut for cut in cuts if cut <= len(data)):
        pieces += stream.feed(data[at:cut])
        at = cut
    assert pieces + stream.feed(data[at:]) + stream.feed(b"", final=True) == expected
    assert harmless(expected.decode("utf-8"), keep="\n\t")


def test_lines_of_a_terminal_stay_lines() -> None:
    """CR LF is one line end; a lone CR, which would overwrite the line, is shown."""
    assert Visible().feed(b"one\r\ntwo\rthree\n") == b"one\ntwo\\rthree\n"


def a_record(kind: int, payload: bytes) -> Record:
    """A record of that kind."""
    return Record(0, kind, 0, payload)


def test_streams_are_kept_apart_and_byte_exact() -> None:
    """Output goes where it came from; other records, known or not, print nothing."""
    text = LogText()
    kinds = (RecordKind.STDOUT, RecordKind.STDERR, RecordKind.PTY, RecordKind.MARKER, 200)
    assert [list(text.show(a_record(kind, b"\x1b[1m\xff"))) for kind in kinds] == [
        [Piece(Standard.OUT, b"\x1b[1m\xff")],
        [Piece(Standard.ERR, b"\x1b[1m\xff")],
        [Piece(Standard.OUT, b"\x1b[1m\xff")],
        [],
        [],
    ]


def test_a_hole_is_named_on_stderr() -> None:
    """With its length."""
    gap = a_record(RecordKind.GAP, struct.pack("<QQ", 100, 350))
    assert list(LogText().show(gap)) == [Piece(Standard.ERR, b"[gap: 250 bytes missing]\n")]


def test_a_terminal_gets_only_what_it_cannot_obey() -> None:
    """One stream is a terminal, the other a file."""
    text = LogText(frozenset({Standard.OUT}))
    assert list(text.show(a_record(RecordKind.STDOUT, b"\x1b[1m\xe2\x82"))) == [Piece(Standard.OUT, b"\\x1b[1m")]
    assert list(text.show(a_record(RecordKind.STDERR, b"\x1b[1m"))) == [Piece(Standard.ERR, b"\x1b[1m")]
    assert list(text.finish()) == [Piece(Standard.OUT, b"\\xe2\\x82")]
