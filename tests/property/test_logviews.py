"""A log in each format: the same however it was cut, nothing lost, and nothing that a terminal would obey."""

import base64
import contextlib
import itertools
import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.limits import MIB
from protocol.logselect import LOOK_BACK_BYTES, Cut, Selection, Tail, Wish, read_cuts, write_cuts
from protocol.logtext import Standard
from protocol.logviews import Format, make_view
from protocol.records import Record, RecordKind

NAUGHTY = Path(__file__).parents[3] / "shared" / "vectors" / "blns" / "blns.json"
BOTH = frozenset(Standard)
OUTPUT = st.sampled_from([RecordKind.STDOUT, RecordKind.STDERR, RecordKind.PTY])
PIECES = st.one_of(
    st.binary(max_size=40),
    st.lists(st.sampled_from([b"\n", b"\r\n", b"\r", b"a", b"\xe2\x82\xac", b"\xf0\x9f", b"\x1b[2J", b"\0"])).map(
        b"".join
    ),
)
WRITES = st.lists(st.tuples(OUTPUT, PIECES), max_size=8)


def log_of(writes: Iterable[tuple[int, bytes, int]]) -> list[Record]:
    """Records at their offsets, each with its time."""
    found: list[Record] = []
    for kind, payload, unix_ns in writes:
        found.append(Record(found[-1].end if found else 0, kind, unix_ns, payload))
    return found


def shown(form: Format, log: Iterable[Record], safe: frozenset[Standard] = frozenset()) -> dict[Standard, bytes]:
    """What a view prints."""
    view = make_view(form, safe)
    said = dict.fromkeys(Standard, b"")
    for pieces in (*map(view.show, log), view.finish()):
        for piece in pieces:
            said[piece.to] += piece.data
    return said


def cast(printed: bytes) -> tuple[str, float]:
    """What a recording shows in the end, and how long it takes."""
    events = [json.loads(line) for line in printed.splitlines()[1:]]
    return "".join(data for _, code, data in events if code == "o"), sum(event[0] for event in events)


@pytest.mark.parametrize("safe", [frozenset(), BOTH])
@pytest.mark.parametrize("form", [form for form in Format if form is not Format.JSON])
@given(writes=WRITES, cuts=st.lists(st.integers(1, 40)))
def test_a_log_is_shown_alike_however_it_is_cut(
    form: Format, safe: frozenset[Standard], writes: list[tuple[RecordKind, bytes]], cuts: list[int]
) -> None:
    """Characters, line ends and escape sequences cut in two come out as if they had come at once."""
    whole = [(kind, data, 10**18 + n * 1000) for n, (kind, data) in enumerate(writes)]
    bounds = sorted({0, *cuts, 10_000})
    parts = [(k, data[a:b], t) for k, data, t in whole for a, b in itertools.pairwise(bounds) if data[a:b]]
    one, other = shown(form, log_of(whole), safe), shown(form, log_of(parts), safe)
    if form is Format.ASCIICAST:
        assert cast(one[Standard.OUT])[0] == cast(other[Standard.OUT])[0]
    else:
        assert one == other


@given(writes=WRITES)
def test_json_lines_lose_nothing(writes: list[tuple[RecordKind, bytes]]) -> None:
    """Every record with its offset, kind, time and bytes."""
    log = log_of((kind, data, 10**18 + n) for n, (kind, data) in enumerate(writes))
    lines = [json.loads(line) for line in shown(Format.JSON, log)[Standard.OUT].splitlines()]
    for line, record in zip(lines, log, strict=True):
        data = base64.b64decode(line["data_base64"]) if "data_base64" in line else line["data"].encode()
        assert (line["offset"], line["kind"], data) == (
            record.offset,
            RecordKind(record.kind).name.lower(),
            record.payload,
        )


@pytest.mark.parametrize("form", list(Format))
@given(writes=st.lists(st.tuples(st.integers(1, 12), PIECES), max_size=8))
def test_a_terminal_can_obey_nothing(form: Format, writes: list[tuple[int, bytes]]) -> None:
    """Whatever was written, also by kinds of records that are no output."""
    said = shown(form, log_of((kind, data, 1) for kind, data in writes), BOTH)
    for printed in said.values():
        assert harmless(printed.decode("utf-8"))


@pytest.mark.skipif(not NAUGHTY.exists(), reason="the list of naughty strings is not beside this checkout")
@pytest.mark.parametrize("form", list(Format))
def test_naughty_strings_change_no_terminal(form: Format) -> None:
    """The public list, each string cut in the middle."""
    for text in json.loads(NAUGHTY.read_text("utf-8")):
        data = text.encode("utf-8", "surrogatepass")
        middle = len(data) // 2
        for kind in (RecordKind.STDOUT, RecordKind.MARKER, RecordKind.EXIT):
            log = log_of([(kind, data[:middle], 1), (kind, data[middle:], 2)])
            for printed in shown(form, log, BOTH).values():
                assert harmless(printed.decode("utf-8"))


def harmless(text: str) -> bool:
    """No control, format or separator character but the ends of lines, tabs, and the joiners of scripts."""
    return all(
        char in "\n\t\u200c\u200d" or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for char in text
    )


def last_lines(log: list[Record], lines: int, kinds: frozenset[int]) -> dict[int, bytes]:
    """The model: every line of every stream with the place where it ends, and the last of them."""
    found: list[tuple[int, int, bytes]] = []
    within: dict[int, tuple[int, bytes]] = {}
    for record in log:
        for at, byte in enumerate(record.payload if record.kind in kinds else b""):
            text = within.get(record.kind, (0, b""))[1] + bytes([byte])
            within[record.kind] = (record.offset + at, text)
            if byte == 10:
                found.append((record.offset + at, record.kind, text))
                del within[record.kind]
    found += [(place, kind, text) for kind, (place, text) in within.items()]
    found.sort()
    said = dict.fromkeys(kinds, b"")
    for _, kind, text in found[len(found) - min(lines, len(found)) :]:
        said[kind] += text
    return said


@given(
    writes=st.lists(
        st.tuples(OUTPUT, st.lists(st.sampled_from([b"\n", b"a", b"bc"]), max_size=5).map(b"".join), st.booleans()),
        max_size=14,
    ),
    lines=st.integers(0, 8),
    stream=st.sampled_from([None, *Standard]),
)
def test_the_last_lines_are_the_last_lines(
    writes: list[tuple[RecordKind, bytes, bool]], lines: int, stream: Standard | None
) -> None:
    """Of both streams together or of one, in whatever segments they are, as a model says that knows no segments."""
    wish = Wish(tail=lines, stream=stream)
    log = log_of((kind, data, 1) for kind, data, _ in writes)
    segments: list[list[Record]] = [[]]
    for record, (_, _, rolls) in zip(log, writes, strict=True):
        segments += [[]] if rolls else []
        segments[-1].append(record)
    tail = Tail(lines, wish.kinds, log[-1].end if log else 0)
    for segment in reversed(segments):
        tail.feed(segment)
    start = tail.start()
    selection = Selection(wish, read_cuts(write_cuts(start.cuts)))
    said = dict.fromkeys(wish.kinds, b"")
    for record in log:
        if record.offset >= start.offset and (taken := selection.take(record)) is not None:
            said[record.kind] += taken.payload
    assert said == last_lines(log, lines, wish.kinds)


@given(st.text(max_size=20))
def test_cuts_that_are_none_are_refused(text: str) -> None:
    """By name, whatever a control plane says."""
    with contextlib.suppress(ValueError):
        assert all(isinstance(cut, Cut) for cut in read_cuts(text).values())


def test_the_look_back_is_bounded() -> None:
    """A number that a person waits for."""
    assert 8 * MIB < LOOK_BACK_BYTES <= 256 * MIB
