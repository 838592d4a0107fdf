"""One identity follows another: what belonged to the former one is set aside as a whole, and never meets the new one.

Theory of operation. A runner enrols into `<state>/identity.new/`. Its `plane.json`, written last, is the commit: from then on the
succession is carried through by whoever holds the state directory's lock, `runner enroll` or the next daemon, however often it is
cut short. Journal and attempts go first and the identity after them, so that the former one's name is known until the end.

Rule 1: nothing is deleted; the owner does that. Rule 2: a journal travels with its write-ahead log, or not at all.
"""

import contextlib
import errno
import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Final

from protocol.errors import Reason
from runner.adapters.attemptfiles import ATTEMPTS_DIR, attempt_directories, is_alive
from runner.adapters.keystore import Keystore
from runner.adapters.system import make_private
from runner.adapters.uplink import read_ack
from runner.errors import Broken, ConfigError, NotEnrolled

IDENTITY: Final = "identity"
NEXT_IDENTITY: Final = "identity.new"
FORMER: Final = "former"
JOURNAL: Final = "journal.db"
UNREADABLE: Final = "unreadable"
"""What a former identity is called whose files do not say who it was."""
_MOVED: Final = (JOURNAL, f"{JOURNAL}-wal", f"{JOURNAL}-shm", ATTEMPTS_DIR, IDENTITY)
_BUSY_S: Final = 5.0
"""A reader, such as a backup, may have the journal open for so long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Owed:
    """What the former identity has not brought to its end."""

    living: tuple[str, ...] = ()
    """Attempts whose shim lives."""
    unsettled: int = 0
    unreported: int = 0
    unstored_logs: int = 0
    unreadable: str = ""
    """Why the journal cannot be read, where it cannot."""

    @property
    def words(self) -> str:
        """What its control plane has not been told, or nothing."""
        counted = (
            (self.unsettled, "attempt", "without a settlement"),
            (self.unreported, "report", "unanswered"),
            (self.unstored_logs, "log", "not stored there"),
        )
        said = [f"{number} {noun}{'s' if number > 1 else ''} {how}" for number, noun, how in counted if number]
        return ", ".join([*said, self.unreadable] if self.unreadable else said)


def owed(state_dir: Path) -> Owed:
    """Look at what is there, while no daemon runs."""
    directories = attempt_directories(state_dir, tools=True)
    living = tuple(directory.name for directory in directories if is_alive(directory))
    unstored = sum(read_ack(directory) is None for directory in attempt_directories(state_dir))
    journal = state_dir / JOURNAL
    if not journal.exists():
        return Owed(living=living, unstored_logs=unstored)
    try:
        with closing(sqlite3.connect(journal, timeout=_BUSY_S)) as db:
            (unsettled,) = db.execute("SELECT count(*) FROM attempt WHERE state != 'settled'").fetchone()
            (unreported,) = db.execute("SELECT count(*) FROM outbox WHERE answered_ms IS NULL").fetchone()
    except sqlite3.Error as exc:
        return Owed(living=living, unstored_logs=unstored, unreadable=f"its journal cannot be read ({exc})")
    return Owed(living=living, unsettled=unsettled, unreported=unreported, unstored_logs=unstored)


def carry_through(state_dir: Path) -> Path | None:
    """Put a complete new identity in the place of the former one; returns where that one's things are now, if there were any.

    The caller holds the lock of the state directory. Does nothing where no enrolment waits. Raises Broken.
    """
    waiting = state_dir / NEXT_IDENTITY
    if not Keystore(waiting).enrolled:
        return None
    _fold_journal(state_dir / JOURNAL)
    try:
        there = [name for name in _MOVED if (state_dir / name).exists()]
        former = _set_aside(state_dir, there) if there else None
        waiting.rename(state_dir / IDENTITY)
        _sync(state_dir)
    except OSError as exc:
        reason = Reason.DISK_FULL if exc.errno in (errno.ENOSPC, errno.EDQUOT) else Reason.INFRA
        raise Broken(reason, f"{state_dir}: the former identity cannot be set aside: {exc.strerror}") from exc
    return former


def _fold_journal(journal: Path) -> None:
    """Bring the write-ahead log into the file; one that cannot be read is moved with its log as it is."""
    if journal.exists():
        with contextlib.suppress(sqlite3.Error), closing(sqlite3.connect(journal, timeout=_BUSY_S)) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _set_aside(state_dir: Path, there: Sequence[str]) -> Path:
    """Move what is there; a second call goes on with what the first one left, in the same place."""
    name = _name_of(state_dir / IDENTITY)
    places = (state_dir / FORMER / (f"{name}.{number}" if number > 1 else name) for number in count(1))
    place = next(place for place in places if not any((place / one).exists() for one in there))
    make_private(place)
    for one in there:
        (state_dir / one).rename(place / one)
    for directory in (place, place.parent, state_dir):
        _sync(directory)
    return place


def _name_of(identity: Path) -> str:
    try:
        return Keystore(identity).load().certificate.value.runner
    except (NotEnrolled, ConfigError, Broken):
        return UNREADABLE


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
