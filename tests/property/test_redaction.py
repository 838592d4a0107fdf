"""Masking: every occurrence of a secret and nothing else, whoever reads from where, however the log was cut into records.

What must be masked is worked out a second time here, by brute force over the whole log.
"""

import base64
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.limits import DATA_SLICE_BYTES_MAX, RECORD_HEADER_BYTES
from protocol.records import NO_SEGMENT, RecordKind, SegmentHeader, encode_record, encode_segment_header
from runner.adapters import redacted
from runner.adapters.redacted import RedactedReader, uploaded
from runner.adapters.spool import Hole, Slice
from runner.core import redaction
from runner.core.needles import EVERYTHING, NEEDLE_BYTES_MIN, Needles, needles_of
from runner.core.redaction import FEW, Finder

pytestmark = pytest.mark.slow

STREAMS = (RecordKind.STDOUT, RecordKind.STDERR)
REACH = 150
"""Some records and half a segment, so that a small log has everything a large one has."""
SECRET = b"tr0ub4dor&3 /p\xc3\xa4ss"


@pytest.fixture(autouse=True)
def small_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logs of tests are small."""
    for module in (redaction, redacted):
        monkeypatch.setattr(module, "REACH_BYTES", REACH)


@dataclass
class Log:
    """A log on disk as a shim leaves it, and what is known of it."""

    directory: Path
    end: int = 0
    kept: dict[int, bytearray] = field(default_factory=dict)
    """Records by offset, as they must go up once `mask` has run."""
    payloads: list[tuple[int, int, bytes]] = field(default_factory=list)
    """Kind, offset in the log, payload; kind 0 is a hole behind the offset."""
    base: int = 0

    def roll(self, hole: int = 0) -> None:
        """Begin a segment, `hole` bytes behind the last one."""
        self.directory.mkdir(exist_ok=True)
        if hole:
            self.payloads.append((0, self.end, b""))
            self.end += hole
        self.base = self.end
        self._add(RecordKind.SEGMENT, encode_segment_header(SegmentHeader(self.base, NO_SEGMENT, "ex_1.1")))

    def write(self, kind: int, payload: bytes) -> None:
        """One record of output."""
        if not self.kept:
            self.roll()
        self.payloads.append((kind, self.end + RECORD_HEADER_BYTES, payload))
        self._add(kind, payload)

    def _add(self, kind: int, payload: bytes) -> None:
        record = encode_record(kind, payload, 1)
        with (self.directory / f"{self.base:016x}.seg").open("ab") as file:
            file.write(record)
        self.kept[self.end] = bytearray(record)
        self.end += len(record)

    def mask(self, needles: tuple[bytes, ...]) -> "Log":
        """Mask what must be masked, byte by byte."""
        holes = [at for kind, at, _ in self.payloads if kind == 0]
        ends = [min(base for base in self.kept if base >= at) for at in holes]
        for low, high in zip([0, *ends], [*holes, self.end], strict=True):
            for kind in {kind for kind, _, _ in self.payloads} - {0}:
                places = [
                    (at + which, payload[which : which + 1])
                    for found, at, payload in self.payloads
                    if found == kind and low <= at < high
                    for which in range(len(payload))
                ]
                self._mask_run(needles, places, after=low, cut=low > 0, end=high)
        return self

    def _mask_run(
        self, needles: tuple[bytes, ...], places: list[tuple[int, bytes]], *, after: int, cut: bool, end: int
    ) -> None:
        text = b"".join(one for _, one in places)
        longest = max(map(len, needles))
        hidden: set[int] = set()
        for needle in needles:
            for start in range(len(text) - len(needle) + 1):
                whole = places[start : start + len(needle)]
                if text.startswith(needle, start) and whole[-1][0] - whole[0][0] < REACH:
                    hidden |= {place for place, _ in whole}
        near = b"".join(one for place, one in places if place > end - REACH)
        fragments = [near[-size:] for size in range(1, len(near) + 1)]
        begun = max((len(one) for one in fragments if any(n[:-1].startswith(one) for n in needles)), default=0)
        if begun >= NEEDLE_BYTES_MIN:
            hidden |= {place for place, _ in places[-begun:]}
        if cut:
            starts = {at for _, at, payload in self.payloads if after <= at < after + REACH for _ in payload[:1]}
            edge = [place for place, _ in places if max((s for s in starts if s <= place), default=-1) >= 0]
            edge = [place for place in edge if self._start(place) < after + REACH][: longest - 1]
            first = b"".join(one for place, one in places[: len(edge)])
            size = max(
                (k for k in range(1, len(first) + 1) if any(n[1:].endswith(first[:k]) for n in needles)), default=0
            )
            if size >= NEEDLE_BYTES_MIN:
                hidden |= {place for place, _ in places[:size]}
        for place in hidden:
            offset = max(at for at in self.kept if at <= place)
            self.kept[offset][place - offset] = ord("*")

    def _start(self, place: int) -> int:
        return max(at for at in self.kept if at <= place) + RECORD_HEADER_BYTES


@contextmanager
def a_log() -> Iterator[Log]:
    """An empty log."""
    with tempfile.TemporaryDirectory() as name:
        yield Log(Path(name) / "log")


def read_on(reader: RedactedReader, offset: int, size_max: int) -> tuple[dict[int, bytes], int]:
    """What can be read from `offset` on, by offset, and where that ends."""
    got = {}
    while (found := reader.read(offset, size_max)) is not None:
        if isinstance(found, Slice):
            got[found.offset] = bytes(found.data)
            assert 0 < len(found.data) <= size_max
        assert found.end > offset if isinstance(found, Hole) else found.offset == offset
        offset = found.end
    return got, offset


def as_read(log: Log, needles: Needles, offset: int = 0, size_max: int = DATA_SLICE_BYTES_MAX) -> bytes:
    """The ended log from `offset` on, without its holes."""
    reader = RedactedReader(log.directory, needles, ended=True)
    try:
        return b"".join(read_on(reader, offset, size_max)[0].values())
    finally:
        reader.close()


def truth(log: Log, offset: int = 0) -> bytes:
    """What must be read from `offset` on."""
    return b"".join(bytes(record) for at, record in log.kept.items() if at >= offset)


PIECES = st.lists(st.sampled_from([b"a", b"b", b"ab", b"aab", b"abaaba", b"\n"]), max_size=4).map(b"".join)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from([1, 2, 1, 2, 42]), PIECES),
        st.tuples(st.just(0), st.sampled_from([0, 0, 40])),
    ),
    min_size=1,
    max_size=24,
)
NEEDLES = st.lists(
    st.lists(st.sampled_from([b"a", b"b"]), min_size=2, max_size=9).map(b"".join), min_size=1, max_size=4, unique=True
)
SIZES = st.sampled_from([RECORD_HEADER_BYTES + 60, 200, DATA_SLICE_BYTES_MAX])


def lay(log: Log, steps: list[tuple[int, bytes | int]]) -> None:
    """Write what was drawn."""
    log.roll()
    for kind, what in steps:
        if isinstance(what, int):
            log.roll(what)
        else:
            log.write(kind, what)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS, NEEDLES, SIZES, st.data())
def test_any_log_is_masked_as_brute_force_says_from_every_offset(
    steps: list[tuple[int, bytes | int]], needles: list[bytes], size_max: int, data: st.DataObject
) -> None:
    """Overlapping, nested and repeated needles, streams that interleave, holes: the same bytes wherever reading begins."""
    with a_log() as log:
        lay(log, steps)
        log.mask(tuple(needles))
        assert as_read(log, Needles(tuple(needles)), 0, size_max) == truth(log)
        offset = data.draw(st.sampled_from(sorted(log.kept)))
        assert as_read(log, Needles(tuple(needles)), offset, size_max) == truth(log, offset)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS, NEEDLES, st.data())
def test_a_growing_log_is_sent_as_the_ended_one_is(
    steps: list[tuple[int, bytes | int]], needles: list[bytes], data: st.DataObject
) -> None:
    """Read after each write, now and then anew from what was read: nothing is sent that the whole log would have masked."""
    with a_log() as log:
        reader = RedactedReader(log.directory, Needles(tuple(needles)))
        got: dict[int, bytes] = {}
        at = 0
        for kind, what in [(0, 0), *steps]:
            if isinstance(what, int):
                log.roll(what)
            else:
                log.write(kind, what)
            more, at = read_on(reader, at, DATA_SLICE_BYTES_MAX)
            got.update(more)
            assert reader.looked in (log.end, 0)
            if data.draw(st.booleans()):
                reader.close()
        reader.ended = True
        got.update(read_on(reader, at, DATA_SLICE_BYTES_MAX)[0])
        reader.close()
        log.mask(tuple(needles))
        assert b"".join(got.values()) == truth(log)


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("between", [b"", b"noise\n"], ids=["in a row", "with the other stream between"])
def test_a_secret_is_masked_wherever_it_is_split(kind: RecordKind, between: bytes) -> None:
    """Over two records, at every byte, in every spelling; what stands around it stays."""
    needles = needles_of([SECRET])
    other = STREAMS[kind == RecordKind.STDOUT]
    for spelling in needles.spellings:
        for at in range(len(spelling) + 1):
            with a_log() as log:
                log.write(kind, b"<" + spelling[:at])
                if between:
                    log.write(other, between)
                log.write(kind, spelling[at:] + b">")
                sent = as_read(log, needles)
            stars = b"*" * len(spelling)
            assert spelling not in sent and b"<" + stars[:at] in sent and stars[at:] + b">" in sent
            assert between in sent and len(sent) == log.end


@pytest.mark.parametrize("step", [2, 5, 100])
def test_a_secret_that_a_hole_cut_is_masked_on_both_sides(step: int) -> None:
    """Fragments of six bytes and more, in however small records, also while the log grows; shorter ones say nothing."""
    needles = needles_of([SECRET])
    for cut in range(1, len(SECRET)):
        with a_log() as log:
            for at in range(0, cut, step):
                log.write(RecordKind.STDOUT, SECRET[at : min(at + step, cut)])
            log.roll(40)
            reader = RedactedReader(log.directory, needles)
            got, end = read_on(reader, 0, DATA_SLICE_BYTES_MAX)
            for at in range(cut, len(SECRET), step):
                log.write(RecordKind.STDOUT, SECRET[at : at + step])
                more, end = read_on(reader, end, DATA_SLICE_BYTES_MAX)
                got.update(more)
            log.write(RecordKind.STDOUT, b"\n")
            got.update(read_on(reader, end, DATA_SLICE_BYTES_MAX)[0])
            reader.close()
            log.mask(needles.spellings)
            sent = as_read(log, needles)
            assert b"".join(got.values()) == sent == truth(log)
            if step > len(SECRET):
                assert (SECRET[:cut] in sent, SECRET[cut:] + encode_record(1, b"\n", 1) in sent) == (
                    cut < NEEDLE_BYTES_MIN,
                    len(SECRET) - cut < NEEDLE_BYTES_MIN,
                )


def test_what_is_held_back_goes_when_it_is_out_of_reach() -> None:
    """The beginning of a secret on one stream holds the other one back for so long and no longer."""
    with a_log() as log:
        log.write(RecordKind.STDERR, b"a line that ends in tr0ub4")
        held = max(log.kept)
        reader = RedactedReader(log.directory, needles_of([SECRET]))
        _, end = read_on(reader, 0, DATA_SLICE_BYTES_MAX)
        assert end == held and reader.looked == log.end
        while end == held:
            log.write(RecordKind.STDOUT, b"more\n")
            _, end = read_on(reader, end, DATA_SLICE_BYTES_MAX)
        reader.close()
        assert end == log.end and REACH <= log.end - held <= 2 * REACH
        log.write(RecordKind.STDERR, SECRET[6:])
        assert b"tr0ub4" in as_read(log, needles_of([SECRET]))


@given(st.binary(min_size=7, max_size=40), st.binary(max_size=5), st.binary(max_size=5))
def test_encoded_beside_anything_a_secret_is_masked(secret: bytes, before: bytes, after: bytes) -> None:
    """In base64 of a longer text, whatever stands before and behind it: no more than the two characters that others share remain."""
    secret = secret.strip()
    if len(secret) < 7 or len(secret.splitlines()) > 1:
        return
    needles = needles_of([secret])
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        text = encode(before + secret + after)
        found = {at for start, end, _ in Finder(needles).find(text, 0) for at in range(start, end)}
        own = range(-(-len(before) * 8 // 6), (len(before) + len(secret)) * 8 // 6)
        assert found >= set(own)


@given(
    st.lists(st.binary(min_size=6, max_size=30), min_size=FEW + 1, max_size=60, unique=True),
    st.binary(max_size=200),
    st.data(),
)
def test_many_needles_are_found_as_each_by_itself(needles: list[bytes], noise: bytes, data: st.DataObject) -> None:
    """Looking words up first changes nothing of what is found."""
    wanted = data.draw(st.lists(st.sampled_from(needles), max_size=4))
    text = noise + b"".join(noise[: data.draw(st.integers(0, 9))] + needle for needle in wanted)

    def places(finders: list[Finder]) -> set[int]:
        return {at for finder in finders for start, end, _ in finder.find(text, 0) for at in range(start, end)}

    assert places([Finder(Needles(tuple(needles)))]) == places([Finder(Needles((needle,))) for needle in needles])


def test_of_a_log_whose_secrets_are_lost_only_lengths_are_sent() -> None:
    """Every word of the child is masked, also of kinds that this version does not know; our own records are not."""
    with a_log() as log:
        log.write(RecordKind.STDOUT, b"anything")
        log.write(42, b"unheard of")
        log.write(RecordKind.MARKER, b"ours")
        sent = as_read(log, EVERYTHING)
        copy = uploaded(log.directory, EVERYTHING)
    assert b"anything" not in sent and b"unheard of" not in sent and b"ours" in sent and len(sent) == log.end
    assert copy is not None and copy.redactor == "mask-1-all" and copy.streams["stdout"][0] == len("anything")


def test_the_copy_of_a_log_without_a_secret_is_the_log() -> None:
    """Then nothing is said of a copy."""
    with a_log() as log:
        log.write(RecordKind.STDOUT, b"nothing to hide\n")
        assert uploaded(log.directory, needles_of([SECRET])) is None
