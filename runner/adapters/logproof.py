"""The log of an attempt proven from its files: every segment read once, also behind damage, and compared with its last word."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

from protocol.errors import RemoteError
from protocol.limits import DATA_SLICE_BYTES_MAX, MIB
from protocol.logproof import Claim, Reckoning, Sums
from protocol.records import Record, records
from runner.adapters.attemptfiles import segment_bases, segment_name
from runner.errors import ConfigError, RunnerError

BLOCK_BYTES: Final = MIB
"""One read."""
BUSY_S: Final = 5.0
"""The daemon's own commit is over in milliseconds, folding its log back in a second."""

assert BLOCK_BYTES > 2 * DATA_SLICE_BYTES_MAX, "a whole record fits, wherever it begins"


def sums_of(log_dir: Path, attempt: str, claim: Claim | None) -> Sums:
    """Add up the segments of a log. Raises OSError."""
    reckoning = Reckoning(attempt, frozenset() if claim is None else claim.marks)
    bases = segment_bases(log_dir)
    at = 0
    for base, limit in zip_longest(bases, bases[1:]):
        if base > at:
            reckoning.hole(at, base)
        elif base < at:
            reckoning.fault(f"the segment at {base} begins within the one before it")
        at = base
        for record, raw in _segment(log_dir / segment_name(base), base, reckoning):
            reckoning.take(record, raw)
            at = record.end
        if limit is not None and at > limit:
            reckoning.fault(f"the segment at {base} is longer than its place")
    return reckoning.sums()


def _segment(path: Path, base: int, reckoning: Reckoning) -> Iterator[tuple[Record, memoryview]]:
    at = base
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        while block := memoryview(os.pread(fd, BLOCK_BYTES, at - base)):
            begun = at
            try:
                for record in records(block, begun):
                    yield record, block[record.offset - begun : record.end - begun]
                    at = record.end
            except RemoteError as exc:
                reckoning.fault(f"what is stored at {at} is no record: {exc.detail}")
                return
            if at == begun:
                return  # an incomplete record at the end is not part of the log
    finally:
        os.close(fd)


def signed_word(state_dir: Path, attempt: str) -> dict[str, Any] | None:
    """The settlement of an attempt, signed by this machine's own key; None where the journal does not have it (any more)."""
    # What only printing needs not is not imported for it.
    from protocol.receipt import open_settlement
    from runner.adapters.journal_words import payload_of
    from runner.adapters.keystore import Keystore
    from runner.adapters.succession import IDENTITY, JOURNAL

    body = _reported(state_dir / JOURNAL, attempt)
    if not body:
        return None
    try:
        key = Keystore(state_dir / IDENTITY).load().key.public
        settled = open_settlement(body.encode(), {key.key_id: key}).value
    except (RemoteError, RunnerError, ConfigError):
        return None
    return payload_of(body) if settled.attempt.name == attempt else None


def _reported(journal: Path, attempt: str) -> str | None:
    """The envelope of its settlement, as it waits to be told or was told."""
    query = "SELECT body FROM attempt JOIN outbox ON out_seq = settled_seq WHERE name = ?"
    try:
        with closing(sqlite3.connect(f"{journal.as_uri()}?mode=ro", uri=True, timeout=BUSY_S)) as db:
            found = db.execute(query, (attempt,)).fetchone()
    except sqlite3.Error:
        return None  # no daemon has run here yet, or the journal is damaged: the doctor tells
    return None if found is None else str(found[0])
