"""A log read from disk as it may leave this machine: as `SpoolReader` reads it, with the secrets of its command masked.

Reading begins anew at any offset, with a look back to the segment that holds whatever can reach there (runner/core/redaction.py), so the
same offsets have the same bytes whoever reads when. Holding back looks like a log that has not grown yet.
"""

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Final

from protocol.errors import Reason, RemoteError
from protocol.limits import DATA_SLICE_BYTES_MAX, KIB
from protocol.logproof import STREAM_OF
from protocol.records import records
from runner.adapters.attemptfiles import segment_bases
from runner.adapters.spool import Hole, Slice, SpoolReader
from runner.core.needles import Needles
from runner.core.plans import UploadedCopy
from runner.core.redaction import REACH_BYTES, Masker, Missing, Run

READ_BYTES: Final = 256 * KIB
"""One look into the log: large enough that looking for needles is all it costs, a millisecond of the event loop at most."""

assert READ_BYTES > DATA_SLICE_BYTES_MAX, "a whole record fits"


class RedactedReader:
    """One attempt's log, masked. `ended`: nothing will be written any more, so nothing is held back. Close it, as a SpoolReader."""

    def __init__(self, log_dir: Path, needles: Needles, *, ended: bool = False) -> None:
        self.ended = ended
        self._dir = log_dir
        self._needles = needles
        self._raw = SpoolReader(log_dir)
        self._masker: Masker | None = None
        self._at = -1
        """Where the next read is expected."""

    @property
    def masked(self) -> bool:
        """Whether any byte was masked since reading began."""
        return self._masker is not None and self._masker.masked

    @property
    def looked(self) -> int:
        """Up to where the log was looked at; what lies between here and the last slice is held back."""
        return 0 if self._masker is None else self._masker.end

    def first(self) -> int:
        """Oldest offset that is kept; 0 when there is nothing yet."""
        return self._raw.first()

    def read(self, offset: int, size_max: int) -> Slice | Hole | None:
        """Whole records from `offset` on, at most `size_max` bytes; None when there is nothing that may be sent (yet).

        Raises:
            RemoteError: BAD_FRAME when what is on disk is no log, or no record begins at `offset`.
            OSError: the disk failed.
        """
        masker = self._masker
        if masker is None or offset != self._at:
            masker = self._begin(offset)
        while True:
            try:
                found = masker.take(offset, size_max)
            except LookupError:
                self.close()
                raise RemoteError(Reason.BAD_FRAME, "no record begins there") from None
            if found is not None:
                return self._passed(found)
            if not self._look(masker):
                return None

    def close(self) -> None:
        """Give the open segment back, and what was looked at."""
        self._raw.close()
        self._masker = None
        self._at = -1

    def _begin(self, offset: int) -> Masker:
        """Behind everything that can have to do with what lies at `offset`."""
        self.close()
        bases = segment_bases(self._dir)
        first = min(bases, default=0)
        start = max((base for base in bases if base <= offset - REACH_BYTES), default=min(first, offset))
        self._masker = Masker(self._needles, start, cut=0 < start == first)
        self._at = offset
        return self._masker

    def _look(self, masker: Masker) -> bool:
        """Feed what comes next; False when there is nothing."""
        found = self._raw.read(masker.end, READ_BYTES)
        if isinstance(found, Slice):
            masker.feed(found.data)
        elif isinstance(found, Hole):
            masker.hole(found.end)
        elif self.ended and not masker.finished:
            masker.finish()
        else:
            return False
        return True

    def _passed(self, found: Run | Missing) -> Slice | Hole:
        if isinstance(found, Run):
            self._at = found.offset + len(found.data)
            return Slice(found.offset, found.data)
        self._at = found.end
        return Hole(found.start, found.end)


def uploaded(log_dir: Path, needles: Needles, names: Collection[str] = ("stdout", "stderr")) -> UploadedCopy | None:
    """What the uploaded copy of an ended log adds up to; None when it is the same as the log. Blocking: for a worker thread.

    `names`: streams that are told of also where nothing was written to them.
    Where the beginning of the log was deleted, nobody can say any more: no stream is named. Raises OSError, RemoteError.
    """
    reader = RedactedReader(log_dir, needles, ended=True)
    sums = {name: (0, hashlib.sha256()) for name in names}
    try:
        offset = reader.first()
        if offset > 0:
            return UploadedCopy(redactor=needles.redactor, streams={})
        while (found := reader.read(offset, READ_BYTES)) is not None:
            if isinstance(found, Hole):
                offset = found.end
                continue
            offset = found.end
            for record in records(found.data, found.offset):
                name = STREAM_OF.get(record.kind)
                if name is not None:
                    size, digest = sums.get(name) or (0, hashlib.sha256())
                    digest.update(record.payload)
                    sums[name] = (size + len(record.payload), digest)
        if not reader.masked:
            return None
    finally:
        reader.close()
    streams = {name: (size, digest.hexdigest()) for name, (size, digest) in sums.items()}
    return UploadedCopy(redactor=needles.redactor, streams=streams)
