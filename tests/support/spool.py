"""A log on disk as a shim leaves it: segments of records, with holes between them, and a tail that may be torn."""

from dataclasses import dataclass, field
from pathlib import Path

from protocol.records import NO_SEGMENT, RecordKind, SegmentHeader, encode_record, encode_segment_header

UNIX_NS = 1_000_000_000
SEGMENT_HEAD = len(
    encode_record(RecordKind.SEGMENT, encode_segment_header(SegmentHeader(0, NO_SEGMENT, "ex_1.1")), UNIX_NS)
)


@dataclass
class Spool:
    """Written by a test; `kept` is the truth: every whole record that was ever kept, by offset."""

    directory: Path
    end: int = 0
    kept: dict[int, bytes] = field(default_factory=dict)
    bases: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)

    def path(self, base: int) -> Path:
        """The file of a segment."""
        return self.directory / f"{base:016x}.seg"

    def roll(self, hole: int = 0) -> None:
        """Begin a segment, `hole` bytes behind the last one."""
        self.end += hole
        self.bases.append(self.end)
        header = SegmentHeader(self.end, NO_SEGMENT, "ex_1.1")
        self._keep(encode_record(RecordKind.SEGMENT, encode_segment_header(header), UNIX_NS))

    def write(self, payload: bytes, kind: int = RecordKind.STDOUT) -> None:
        """One record of output."""
        if not self.bases:
            self.roll()
        self._keep(encode_record(kind, payload, UNIX_NS))

    def tear(self, count: int) -> None:
        """The first bytes of a record whose rest never comes."""
        self._append(encode_record(RecordKind.STDOUT, b"never whole", UNIX_NS)[:count])

    def drop(self, at: int) -> None:
        """A segment is deleted; never the one that is written."""
        base = self.bases[at % len(self.bases)]
        if base != self.bases[-1]:
            self.path(base).unlink(missing_ok=True)

    def on_disk(self, offset: int) -> bool:
        """Whether the record that began here is still in a file."""
        base = max(base for base in self.bases if base <= offset)
        return self.path(base).exists()

    def boundaries(self) -> list[int]:
        """Every offset between two records."""
        return sorted({0, *self.kept, *(at + len(data) for at, data in self.kept.items())})

    def _keep(self, record: bytes) -> None:
        self._append(record)
        self.kept[self.end] = record
        self.end += len(record)

    def _append(self, data: bytes) -> None:
        with self.path(self.bases[-1]).open("ab") as file:
            file.write(data)
