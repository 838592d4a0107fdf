"""Reading a log from disk: whatever the layout, the damage and the moment, whole records in order, holes, or a named error."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import RemoteError
from protocol.limits import DATA_SLICE_BYTES_MAX, RECORD_HEADER_BYTES
from runner.adapters import spool as spool_module
from runner.adapters.spool import Hole, Slice, SpoolReader
from tests.support.spool import SEGMENT_HEAD, Spool

pytestmark = pytest.mark.slow

PAYLOADS = st.lists(st.binary(max_size=200), max_size=6)
SEGMENTS = st.lists(st.tuples(st.sampled_from([0, 0, 1, 40]), PAYLOADS), min_size=1, max_size=5)
SIZES = st.sampled_from([RECORD_HEADER_BYTES + 200, 500, DATA_SLICE_BYTES_MAX])
READS_MAX = 200
"""Far more than a log of these sizes takes."""


@contextmanager
def a_spool(segments: list[tuple[int, list[bytes]]], torn: int = 0) -> Iterator[tuple[Spool, SpoolReader]]:
    """A log and its reader."""
    with tempfile.TemporaryDirectory() as name:
        spool = Spool(Path(name) / "log")
        for hole, payloads in segments:
            spool.roll(hole)
            for payload in payloads:
                spool.write(payload)
        if torn:
            spool.tear(torn)
        reader = SpoolReader(spool.directory)
        try:
            yield spool, reader
        finally:
            reader.close()


def read_all(reader: SpoolReader, offset: int, size_max: int) -> tuple[list[tuple[int, bytes]], list[Hole], int, bool]:
    """Slices and holes from `offset` on, where it ended, and whether that was by damage."""
    slices: list[tuple[int, bytes]] = []
    holes: list[Hole] = []
    for _ in range(READS_MAX):
        try:
            found = reader.read(offset, size_max)
        except RemoteError:
            return slices, holes, offset, True
        if found is None:
            return slices, holes, offset, False
        if isinstance(found, Slice):
            assert found.offset == offset and 0 < len(found.data) <= size_max
            slices.append((offset, bytes(found.data)))
        else:
            assert found.start == offset < found.end
            holes.append(found)
        offset = found.end
    raise AssertionError("it goes on for ever")


def expected(spool: Spool, offset: int) -> dict[int, bytes]:
    """The kept records from `offset` on, byte by byte position of their beginning."""
    return {at: data for at, data in spool.kept.items() if at >= offset and spool.on_disk(at)}


def joined(slices: list[tuple[int, bytes]], spool: Spool) -> dict[int, bytes]:
    """Slices cut at the records' own bounds."""
    cut = {}
    for at, data in slices:
        end = at + len(data)
        while at < end:
            record = spool.kept[at]
            cut[at] = data[: len(record)]
            data, at = data[len(record) :], at + len(record)
    return cut


@given(SEGMENTS, SIZES, st.integers(0, 20), st.lists(st.integers(0, 9), max_size=3), st.integers(0, 99))
def test_any_log_is_read_from_any_record_on(
    segments: list[tuple[int, list[bytes]]], size_max: int, torn: int, dropped: list[int], start: int
) -> None:
    """Every record that is there once and in order, every range that is not as a hole; a torn tail is not there (yet)."""
    with a_spool(segments, torn) as (spool, reader):
        for at in dropped:
            spool.drop(at)
        offset = spool.boundaries()[start % len(spool.boundaries())]
        slices, holes, end, damaged = read_all(reader, offset, size_max)
        assert not damaged
        assert joined(slices, spool) == expected(spool, offset)
        assert end == spool.end
        assert not any(hole.start <= at < hole.end for hole in holes for at in expected(spool, offset))
        assert reader.first() == min(base for base in spool.bases if spool.path(base).exists())


@given(SEGMENTS, SIZES, st.integers(0, 9), st.integers(0, 10_000), st.integers(1, 255))
def test_a_damaged_segment_is_read_up_to_the_damage(
    segments: list[tuple[int, list[bytes]]], size_max: int, which: int, at: int, flip: int
) -> None:
    """Any byte for any other: a header that is damaged ends the reading there, by name; payloads have their digests elsewhere."""
    with a_spool(segments) as (spool, reader):
        base = spool.bases[which % len(spool.bases)]
        data = bytearray(spool.path(base).read_bytes())
        at %= len(data)
        data[at] ^= flip
        spool.path(base).write_bytes(data)
        hit = max(record for record in spool.kept if record <= base + at)
        slices, _holes, end, damaged = read_all(reader, 0, size_max)
        in_header = base + at - hit < RECORD_HEADER_BYTES
        assert damaged == in_header and end == (hit if in_header else spool.end)
        before = {offset: record for offset, record in expected(spool, 0).items() if offset < hit}
        read = joined(slices, spool)
        assert {offset: read[offset] for offset in read if offset < hit} == before


@given(SEGMENTS, SIZES, st.integers(0, 9), st.integers(0, 10_000))
def test_a_segment_that_was_cut_is_read_up_to_the_cut(
    segments: list[tuple[int, list[bytes]]], size_max: int, which: int, at: int
) -> None:
    """What is missing before the next segment is a hole, what is missing at the end has not come."""
    with a_spool(segments) as (spool, reader):
        base = spool.bases[which % len(spool.bases)]
        data = spool.path(base).read_bytes()
        at %= len(data)
        spool.path(base).write_bytes(data[:at])
        slices, _holes, _end, damaged = read_all(reader, 0, size_max)
        bound = min((other for other in spool.bases if other > base), default=spool.end)
        kept = {
            offset: record
            for offset, record in spool.kept.items()
            if not base <= offset < bound or offset + len(record) <= base + at
        }
        assert not damaged and joined(slices, spool) == kept


@given(st.lists(st.binary(max_size=300), max_size=3), st.integers(0, 400))
def test_any_bytes_as_a_log_are_read_or_refused(files: list[bytes], offset: int) -> None:
    """With RemoteError alone, and to an end."""
    with tempfile.TemporaryDirectory() as name:
        for number, data in enumerate(files):
            (Path(name) / f"{number * 100:016x}.seg").write_bytes(data)
        (Path(name) / "not a segment").write_bytes(b"x")
        reader = SpoolReader(Path(name))
        try:
            read_all(reader, offset, DATA_SLICE_BYTES_MAX)
        finally:
            reader.close()


def test_a_segment_that_is_sealed_while_we_look_is_no_hole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1. The reader is at the end. 2. The shim writes a record and rolls. 3. The listing shows the next segment; the record comes first."""
    spool = Spool(tmp_path / "log")
    spool.write(b"one")
    reader = SpoolReader(spool.directory)
    at = read_all(reader, 0, DATA_SLICE_BYTES_MAX)[2]
    listdir = spool_module.os.listdir

    def between(path: Path) -> list[str]:
        if len(spool.bases) == 1:
            spool.write(b"two")
            spool.roll()
        return listdir(path)

    monkeypatch.setattr(spool_module.os, "listdir", between)
    slices, holes, end, _damaged = read_all(reader, at, DATA_SLICE_BYTES_MAX)
    reader.close()
    assert joined(slices, spool) == expected(spool, at)
    assert (holes, end) == ([], spool.end)
    assert end - at == RECORD_HEADER_BYTES + 3 + SEGMENT_HEAD


def test_a_reader_that_is_sent_ahead_into_a_later_segment_reads_there() -> None:
    """With an earlier segment open, an offset inside a later one is no end of the log."""
    with a_spool([(0, [b"one"]), (0, [b"two"])]) as (spool, reader):
        ahead = spool.end
        spool.write(b"three")
        assert isinstance(reader.read(0, DATA_SLICE_BYTES_MAX), Slice)
        found = reader.read(ahead, DATA_SLICE_BYTES_MAX)
        assert isinstance(found, Slice) and (found.offset, bytes(found.data)) == (ahead, spool.kept[ahead])
