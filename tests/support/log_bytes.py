"""The bytes of a log, as a shim writes them."""

from protocol.envelope import digest_of
from protocol.receipt import StreamDigest
from protocol.records import NO_SEGMENT, RecordKind, SegmentHeader, encode_record, encode_segment_header


class LogBytes:
    """A log as a shim writes it: segments, records, digests."""

    def __init__(self, attempt: str) -> None:
        self.attempt = attempt
        self.data = b""
        self.segments = 0
        self._bounds: list[int] = []
        self._segment_at = 0
        self._payloads: dict[str, bytes] = {"stdout": b"", "stderr": b""}
        self.roll()

    def roll(self) -> None:
        """Begin the next segment."""
        previous = bytes.fromhex(self.chain()) if self.segments else NO_SEGMENT
        self._segment_at = len(self.data)
        self.segments += 1
        header = encode_segment_header(SegmentHeader(len(self.data), previous, self.attempt))
        self._add(RecordKind.SEGMENT, header)

    def write(self, payload: bytes, kind: RecordKind = RecordKind.STDOUT) -> "LogBytes":
        """One record of output."""
        self._add(kind, payload)
        self._payloads[kind.name.lower()] = self._payloads.get(kind.name.lower(), b"") + payload
        return self

    def slices(self, offset: int) -> list[bytes]:
        """Whole records from `offset` on."""
        bounds = [bound for bound in self._bounds if bound > offset]
        starts = [offset, *bounds]
        return [self.data[start:end] for start, end in zip(starts, bounds, strict=False)]

    def streams(self) -> dict[str, StreamDigest]:
        """Digests of the streams."""
        return {
            name: StreamDigest(bytes=len(data), sha256=digest_of(data).removeprefix("sha256:"))
            for name, data in self._payloads.items()
        }

    def chain(self) -> str:
        """Digest of the last segment."""
        return digest_of(self.data[self._segment_at :]).removeprefix("sha256:")

    def _add(self, kind: RecordKind, payload: bytes) -> None:
        self.data += encode_record(kind, payload, 1_000_000_000)
        self._bounds.append(len(self.data))
