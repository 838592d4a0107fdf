"""Whether a log is the one that was signed: whole, with holes, edited, cut short, put together from others."""

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import RemoteError
from protocol.logproof import Claim, Proof, Reckoning, claim_of, prove
from protocol.records import NO_SEGMENT, RecordKind, SegmentHeader, encode_record, encode_segment_header, records

ATTEMPT = "ex_1.1"
Segment = tuple[int, bytes]


def a_segment(base: int, previous: bytes, *writes: bytes, attempt: str = ATTEMPT) -> Segment:
    """A segment as a shim writes it."""
    header = encode_segment_header(SegmentHeader(base, previous, attempt))
    output = [encode_record(RecordKind.STDOUT, data, 1) for data in writes]
    return base, encode_record(RecordKind.SEGMENT, header, 1) + b"".join(output)


def a_log(*skips: int) -> list[Segment]:
    """Segments, each behind a hole of that length where it is not 0."""
    found: list[Segment] = []
    for n, skip in enumerate(skips):
        end = found[-1][0] + len(found[-1][1]) if found else 0
        found.append(a_segment(end + skip, digest(found[-1]) if found else NO_SEGMENT, b"one%d" % n, b"two\n"))
    return found


def digest(segment: Segment) -> bytes:
    """What the next segment names."""
    return hashlib.sha256(segment[1]).digest()


def signed(log: list[Segment], **over: object) -> Claim:
    """What the shim says of a log, when nothing of it was lost."""
    output = b"".join(one.payload for base, data in log for one in records(data, base) if one.kind == RecordKind.STDOUT)
    streams = {"stdout": (len(output), hashlib.sha256(output).hexdigest()), "stderr": (0, hashlib.sha256().hexdigest())}
    claim = Claim(end=log[-1][0] + len(log[-1][1]), segments=len(log), chain=digest(log[-1]).hex(), streams=streams)
    return replace(claim, **over)  # type: ignore[arg-type]


def proof_of(log: list[Segment], claim: Claim | None) -> Proof:
    """Read what is stored, and compare."""
    reckoning = Reckoning(ATTEMPT, frozenset() if claim is None else claim.marks)
    at = 0
    for base, data in log:
        if base > at:
            reckoning.hole(at, base)
        at = base
        try:
            for record in records(data, base):
                reckoning.take(record, data[record.offset - base : record.end - base])
                at = record.end
        except RemoteError as exc:
            reckoning.fault(exc.detail)
    return prove(reckoning.sums(), claim)


def test_a_whole_log_is_proven() -> None:
    """From its last segment to its first, and its streams."""
    log = a_log(0, 0, 0)
    proof = proof_of(log, signed(log))
    assert proof.ok and proof.missing == [] and proof.proven[0].startswith("bytes 0 to ")
    assert [words.partition(":")[0] for words in proof.proven[1:]] == ["stderr", "stdout"]


def test_holes_where_nothing_was_kept_break_no_proof() -> None:
    """The segment behind names the one in front; what is missing is said."""
    log = a_log(40, 0, 100, 0)
    proof = proof_of(log, replace(signed(log), streams={"stdout": (1000, "ab" * 32)}))
    assert proof.ok, proof.wrong
    assert [words.partition(":")[0] for words in proof.missing] == [
        "bytes 0 to 40",
        f"bytes {log[2][0] - 100} to {log[2][0]}",
        "stdout",
    ]


def test_a_middle_that_was_dropped_is_proven_on_both_sides() -> None:
    """By the digests that were signed for it; without them the head is not proven."""
    log = a_log(0, 0, 0, 0, 0)
    gone = (log[2][0], log[4][0], digest(log[1]).hex(), digest(log[3]).hex())
    left = [log[0], log[1], log[4]]
    proof = proof_of(left, signed(log, dropped=gone))
    assert proof.ok, proof.wrong
    assert proof.proven[0].startswith(f"bytes 0 to {log[2][0]}") and "dropped" in proof.missing[0]
    unsigned = proof_of(left, signed(log))
    assert not unsigned.ok and f"bytes 0 to {log[2][0]} are not proven" in " ".join(unsigned.wrong)
    edited = [a_segment(0, NO_SEGMENT, b"forged", b"x"), *left[1:]]
    assert not proof_of(edited, signed(log, dropped=gone)).ok


@given(st.integers(0, 10_000), st.integers(1, 255), st.sampled_from([(0,), (0, 0, 0), (30, 0, 70)]))
def test_any_flipped_byte_is_seen(place: int, flip: int, skips: tuple[int, ...]) -> None:
    """In headers, payloads and what opens a segment."""
    log = a_log(*skips)
    claim = signed(log)
    at, n = place % sum(len(data) for _, data in log), 0
    while at >= len(log[n][1]):
        at, n = at - len(log[n][1]), n + 1
    data = bytearray(log[n][1])
    data[at] ^= flip
    log[n] = (log[n][0], bytes(data))
    assert not proof_of(log, claim).ok


@given(st.integers(0, 400))
def test_a_log_that_was_cut_off_is_seen(kept: int) -> None:
    """At a record's end or within one, and when nothing is left."""
    log = a_log(0, 0, 0)
    claim = signed(log)
    left = [(base, data[: max(0, kept - base)]) for base, data in log if base < kept]
    whole = sum(len(data) for _, data in left) == claim.end
    assert proof_of(left, claim).ok == whole


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_segment_that_is_gone_is_seen(lost: int) -> None:
    """The first, one in the middle, and the last."""
    log = a_log(0, 0, 0)
    proof = proof_of(log[:lost] + log[lost + 1 :], signed(log))
    assert not proof.ok
    assert "are gone" in " ".join(proof.wrong) or "cut short" in " ".join(proof.wrong)


def test_segments_of_others_are_seen() -> None:
    """Of another attempt, from another place, and records without a segment; and a log that is longer than was signed."""
    log = a_log(0, 0)
    claim = signed(log)
    other = a_segment(0, NO_SEGMENT, b"one0", b"two\n", attempt="ex_2.1")
    assert "another attempt" in " ".join(proof_of([other, log[1]], claim).wrong)
    moved = (log[1][0], a_segment(5, digest(log[0]), b"one1", b"two\n")[1])
    assert "belongs at 5" in " ".join(proof_of([log[0], moved], claim).wrong)
    headless = (0, encode_record(RecordKind.STDOUT, b"x", 1))
    assert "no segment" in " ".join(proof_of([headless], claim).wrong)
    longer = [*log[:-1], (log[1][0], log[1][1] + encode_record(RecordKind.STDOUT, b"more", 1))]
    assert "something was added" in " ".join(proof_of(longer, claim).wrong)


def test_nothing_is_proven_without_a_last_word() -> None:
    """A log of an attempt that runs, or that was lost."""
    assert not proof_of(a_log(0), None).ok


def test_of_a_redacted_copy_the_streams_are_proven() -> None:
    """Its links cannot be: they are of what was written; a changed stream is still seen."""
    log = a_log(0, 0)
    masked = [(base, data.replace(b"one", b"***")) for base, data in log]
    claim = replace(signed(masked), chain=digest(log[-1]).hex(), masked=True)
    assert proof_of(masked, claim).ok
    assert "could not say" in proof_of(masked, replace(claim, streams={})).wrong[0]
    assert not proof_of(masked, replace(claim, masked=False)).ok
    assert not proof_of([(base, data.replace(b"two", b"tvo")) for base, data in masked], claim).ok


def test_a_last_word_is_read_from_settlements_and_exit_objects() -> None:
    """With what was dropped and uploaded; what says nothing of a log is none."""
    zeros = "00" * 32
    told = {
        "streams": {"stdout": {"bytes": 3, "sha256": zeros}},
        "log": {
            "end": 9, "segments": 1, "chain": zeros,
            "dropped": {"start": 1, "end": 2, "segments": 1, "before": zeros, "last": "11" * 32},
            "uploaded": {"redactor": "mask-1", "streams": {"stdout": {"bytes": 3, "sha256": "11" * 32}}},
        },
    }  # fmt: skip
    raw, stored = claim_of(told), claim_of(told, stored=True)
    assert raw is not None and stored is not None
    assert (raw.end, raw.streams, raw.masked, raw.marks) == (9, {"stdout": (3, zeros)}, False, {bytes(32)})
    assert (stored.streams, stored.masked) == ({"stdout": (3, "11" * 32)}, True)
    for nothing in (None, {}, {"log": None}, {"log": {}}, {"log": {"end": 1}, "streams": {}}, {**told, "streams": 5}):
        assert claim_of(nothing) is None
