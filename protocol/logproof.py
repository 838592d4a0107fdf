"""Whether a stored log is the one that was signed: its streams and segments added up again, and compared with the last word on it.

Theory of operation. The last segment's digest is signed, and every segment names the digest of the one before: a row of segments
in which each names its neighbour is proven from its end, across a hole too when the segment behind it names the one in front (nothing
was ever stored between them). Where the middle was dropped for the newest, the digest in front of it is signed as well. Streams
are compared where nothing is missing.

Rule 1: what is not proven is said to be so; it is never counted as good. Rule 2: bytes that were never kept are missing, not wrong.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from protocol.errors import RemoteError
from protocol.records import NO_SEGMENT, Record, RecordKind, decode_segment_header

if TYPE_CHECKING:
    from hashlib import _Hash

FINDINGS_MAX: Final = 100
"""Faults listed of one log; more say nothing new."""
STREAM_OF: Final[Mapping[int, str]] = MappingProxyType(
    {RecordKind.STDOUT: "stdout", RecordKind.STDERR: "stderr", RecordKind.PTY: "pty", RecordKind.EVENT: "events"}
)
"""Names of streams in settlements, by the kind of their records."""
EMPTY: Final = (0, hashlib.sha256().hexdigest())
"""A stream that nothing was written to, whether it is named or not."""


@dataclass(slots=True)
class Run:
    """Segments of which each names the one before."""

    start: int
    previous: bytes
    """What its first segment says of the one before it."""
    end: int = 0
    digest: bytes = NO_SEGMENT
    """Of its last segment."""
    marked: int | None = None
    """Where that segment ends whose digest was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """What a stored log adds up to."""

    streams: Mapping[str, tuple[int, str]]
    """Bytes and SHA-256 by stream."""
    end: int
    segments: int
    runs: tuple[Run, ...]
    holes: tuple[tuple[int, int], ...]
    faults: tuple[str, ...]

    @property
    def chain(self) -> str:
        """SHA-256 of the last segment, or zeros where there is none."""
        return (self.runs[-1].digest if self.runs else NO_SEGMENT).hex()


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """The last word on a log: of a settlement, or of an exit object."""

    end: int
    segments: int
    chain: str
    streams: Mapping[str, tuple[int, str]]
    dropped: tuple[int, int, str, str] | None = None
    """Start and end of the middle that was given up, the digest of the segment in front of it, and of the last one that is gone."""
    masked: bool = False
    """The streams are those of a redacted copy; the chain is of the log as it was written, and cannot be compared."""

    @property
    def marks(self) -> frozenset[bytes]:
        """Digests that are signed beside the last one."""
        return frozenset() if self.dropped is None else frozenset({bytes.fromhex(self.dropped[2])})


@dataclass(slots=True, kw_only=True)
class Proof:
    """What of a log is proven, what is known to be missing, and what is wrong: sentences for a person."""

    proven: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """Also what is there and not proven."""

    @property
    def ok(self) -> bool:
        """Whether all that is there is proven, and all that should be there is there or was never kept."""
        return not self.wrong


class Reckoning:
    """Adds up one log, record by record in order, holes included. `marks` are digests of segments to look for."""

    def __init__(self, attempt: str, marks: frozenset[bytes] = frozenset()) -> None:
        self._attempt = attempt
        self._marks = marks
        self._streams: dict[str, tuple[int, _Hash]] = {name: (0, hashlib.sha256()) for name in ("stdout", "stderr")}
        self._segment: _Hash | None = None
        self._segments = 0
        self._runs: list[Run] = []
        self._holes: list[tuple[int, int]] = []
        self._faults: list[str] = []
        self._end = 0

    def take(self, record: Record, raw: bytes | memoryview) -> None:
        """Count one record; `raw` is all of it."""
        if record.kind == RecordKind.SEGMENT:
            self._begin(record)
        if self._segment is None:
            self.fault(f"what is stored at {record.offset} belongs to no segment")
            self._segment = hashlib.sha256()
            self._runs.append(Run(record.offset, b""))
        self._segment.update(raw)
        self._end = record.end
        name = STREAM_OF.get(record.kind)
        if name is not None:
            size, digest = self._streams.get(name) or (0, hashlib.sha256())
            digest.update(record.payload)
            self._streams[name] = (size + len(record.payload), digest)

    def hole(self, start: int, end: int) -> None:
        """`[start, end)` is not there."""
        self._seal()
        if self._holes and self._holes[-1][1] == start:
            start = self._holes.pop()[0]
        self._holes.append((start, end))
        self._end = max(self._end, end)

    def fault(self, words: str) -> None:
        """Something that no sound log has."""
        if len(self._faults) < FINDINGS_MAX:
            self._faults.append(words)

    def sums(self) -> Sums:
        """Everything so far; the last call."""
        self._seal()
        return Sums(
            streams={name: (size, digest.hexdigest()) for name, (size, digest) in self._streams.items()},
            end=self._end,
            segments=self._segments,
            runs=tuple(self._runs),
            holes=tuple(self._holes),
            faults=tuple(self._faults),
        )

    def _begin(self, record: Record) -> None:
        after_hole = self._segment is None
        self._seal()
        self._segment = hashlib.sha256()
        self._segments += 1
        try:
            header = decode_segment_header(record.payload)
        except RemoteError as exc:
            self.fault(f"the segment at {record.offset} has a header that is none: {exc.detail}")
            self._runs.append(Run(record.offset, b""))
            return
        if header.base != record.offset:
            self.fault(f"the segment at {record.offset} belongs at {header.base}")
        if header.attempt != self._attempt:
            self.fault(f"the segment at {record.offset} is of another attempt")
        if self._runs and header.previous == self._runs[-1].digest:
            return
        if self._runs and not after_hole:
            self.fault(f"the segment before {record.offset} is not the one that was written there")
        self._runs.append(Run(record.offset, header.previous))

    def _seal(self) -> None:
        if self._segment is None:
            return
        run = self._runs[-1]
        run.end, run.digest = self._end, self._segment.digest()
        if run.digest in self._marks:
            run.marked = run.end
        self._segment = None


def claim_of(fate: Mapping[str, Any] | None, *, stored: bool = False) -> Claim | None:
    """What a settlement or an exit object says of the log; None where it says nothing that can be read.

    `stored` asks for what was uploaded, which differs where it was redacted.
    """
    log = (fate or {}).get("log")
    try:
        assert fate is not None and isinstance(log, Mapping)
        uploaded = log.get("uploaded") if stored else None
        told = fate["streams"] if uploaded is None else uploaded["streams"]
        gone = log.get("dropped")
        return Claim(
            end=int(log["end"]),
            segments=int(log["segments"]),
            chain=str(log["chain"]),
            streams={str(name): (int(each["bytes"]), str(each["sha256"])) for name, each in told.items()},
            dropped=None
            if gone is None
            else (int(gone["start"]), int(gone["end"]), bytes.fromhex(gone["before"]).hex(), str(gone["last"])),
            masked=uploaded is not None,
        )
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError):
        return None


def prove(sums: Sums, claim: Claim | None) -> Proof:
    """Compare what is stored with the last word on it."""
    proof = Proof()
    if claim is None:
        proof.wrong += [*sums.faults, "nobody has signed how long this log is: there is nothing to compare it with"]
        return proof
    if sums.end != claim.end:
        words = "it was cut short" if sums.end < claim.end else "something was added"
        proof.wrong.append(f"the log ends at {sums.end} and should end at {claim.end}: {words}")
    if claim.masked:
        # Links name the digests of what was written; of the copy only places and streams can be compared.
        proof.wrong += [fault for fault in sums.faults if "is not the one that was written" not in fault]
        proof.missing.append("the chain: of a redacted copy only the streams are signed, its segments are not")
    else:
        proof.wrong += sums.faults
        _prove_segments(sums, claim, proof)
    if claim.masked and not claim.streams:
        # Not wrong, but nothing that was signed tells it from a copy that was edited.
        proof.wrong.append("the streams are not proven: the runner could not say what the redacted copy adds up to")
    else:
        _prove_streams(sums, claim, proof)
    return proof


def _prove_segments(sums: Sums, claim: Claim, proof: Proof) -> None:
    if not sums.runs:
        if claim.segments:
            proof.wrong.append(f"none of {claim.segments} segments is there")
        return
    signed = sums.runs[-1].digest.hex() == claim.chain
    if not signed:
        proof.wrong.append("the last segment is not the one that was signed")
    for index, run in enumerate(sums.runs):
        # Whether the run leads up to something that was signed, and how far.
        last = index == len(sums.runs) - 1
        proven_to = run.end if last and signed else run.marked
        if proven_to is not None:
            proof.proven.append(f"bytes {run.start} to {proven_to}: every segment is named by one that was signed")
        if proven_to != run.end and not (last and not signed and run.marked is None):
            proof.wrong.append(
                f"bytes {proven_to or run.start} to {run.end} are not proven: nothing that was signed names them"
            )
    if not sums.holes and sums.segments != claim.segments:
        proof.wrong.append(f"there are {sums.segments} segments, and {claim.segments} were written")
    for start, end in sums.holes:
        _judge_hole(start, end, sums, claim, proof)


def _judge_hole(start: int, end: int, sums: Sums, claim: Claim, proof: Proof) -> None:
    behind = next((run for run in sums.runs if run.start >= end), None)
    within = any(run.start < start and run.end > start for run in sums.runs)
    words = f"bytes {start} to {end}"
    if within or (start == 0 and behind is not None and behind.start == end and behind.previous == NO_SEGMENT):
        proof.missing.append(f"{words}: never kept, there was no room for them")
    elif claim.dropped is not None and behind is not None and behind.previous.hex() == claim.dropped[3]:
        proof.missing.append(f"{words}: dropped to make room for the newest, as was signed")
    elif claim.streams.keys() == {"pty"}:
        proof.missing.append(f"{words}: only the newest of a terminal is kept")
    else:
        proof.wrong.append(f"{words} are gone: they were stored once")


def _prove_streams(sums: Sums, claim: Claim, proof: Proof) -> None:
    for name in sorted({*claim.streams, *(name for name, (size, _) in sums.streams.items() if size)}):
        (size, digest), (wanted, signed) = (side.get(name, EMPTY) for side in (sums.streams, claim.streams))
        if digest == signed and size == wanted:
            proof.proven.append(f"{name}: {size} bytes, SHA-256 {digest}")
        elif sums.holes and size < wanted:
            proof.missing.append(
                f"{name}: {wanted - size} of {wanted} bytes; its digest cannot be recomputed without them"
            )
        elif size == 0 and wanted == 0:
            continue
        else:
            proof.wrong.append(f"{name} is not what was signed: {size} bytes here, {wanted} were written")
