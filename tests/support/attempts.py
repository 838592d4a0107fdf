"""Attempt directories as shims leave them, made by hand: files, segments, and a lock that somebody holds."""

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from protocol.records import NO_SEGMENT, RecordKind, SegmentHeader, encode_record, encode_segment_header, records


class AttemptDir:
    """One attempt directory that a test writes to."""

    def __init__(self, state_dir: Path, name: str = "ex_1.1", *, argv: tuple[str, ...] = ("make", "test")) -> None:
        self.name = name
        self.path = state_dir / "x" / name
        (self.path / "log").mkdir(parents=True)
        (self.path / "lock").touch()
        self.end = 0
        self._segment = bytearray()
        self._base = 0
        spec = {"argv": list(argv), "cwd": "/srv", "cookie": f"rn_1:{name}"}
        self.put("spec.json", spec)
        self.put("meta.json", {"phase": "running", "child": {"pid": 4242, "start": 7}, "started_ns": 10**18})

    def put(self, file: str, fields: dict[str, Any]) -> None:
        """One of its JSON files, as a whole."""
        prepared = self.path / f".{file}"
        prepared.write_text(json.dumps({"v": 1, **fields}))
        prepared.replace(self.path / file)

    def roll(self, *, skip: int = 0, unix_ns: int = 1) -> None:
        """Begin the next segment; `skip` leaves a hole before it."""
        previous = hashlib.sha256(self._segment).digest() if self._segment else NO_SEGMENT
        self.end += skip
        self._base, self._segment = self.end, bytearray()
        self.add(RecordKind.SEGMENT, encode_segment_header(SegmentHeader(self._base, previous, self.name)), unix_ns)

    def add(self, kind: int, payload: bytes, unix_ns: int = 1) -> None:
        """One record."""
        self.append(encode_record(kind, payload, unix_ns))

    def append(self, data: bytes) -> None:
        """Bytes, a whole record or a part of one."""
        with (self.path / "log" / f"{self._base:016x}.seg").open("ab") as segment:
            segment.write(data)
        self._segment += data
        self.end += len(data)

    def write(self, payload: bytes, kind: RecordKind = RecordKind.STDOUT) -> None:
        """Output of the child."""
        if not self._segment:
            self.roll()
        self.add(kind, payload)

    def finish(self, verdict: str = "exited", code: int | None = 0, **over: Any) -> None:
        """The exit record."""
        ended = {"verdict": verdict, "code": code, "signal": None, "cause": {"kind": "none"}, "ended_ns": 2 * 10**18}
        self.put("exit.json", {**ended, "log": {"end": self.end, "segments": 1, "chain": ""}, **over})

    def seal(self, **over: Any) -> None:
        """The exit record, with the digests of what was written."""
        segments = sorted((self.path / "log").iterdir())
        output: dict[str, bytes] = {"stdout": b"", "stderr": b""}
        for path in segments:
            for record in records(path.read_bytes(), int(path.stem, 16)):
                if record.kind in (RecordKind.STDOUT, RecordKind.STDERR):
                    output[RecordKind(record.kind).name.lower()] += record.payload
        streams = {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in output.items()
        }
        chain = hashlib.sha256(segments[-1].read_bytes()).hexdigest()
        self.finish(streams=streams, log={"end": self.end, "segments": len(segments), "chain": chain}, **over)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Its shim lives."""
        with (self.path / "lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
