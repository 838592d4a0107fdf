"""Who is let in to a PTY, in its own directory: `viewers/<viewer>` names a key and a mode, durably, and never changes. Blocking."""

import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from protocol.commands import ViewerMode
from protocol.errors import EnvelopeError, Reason
from protocol.keys import PublicKey
from protocol.limits import VIEWERS_MAX
from runner.adapters.attemptdir import make_durable_directory, sync_directory, write_new
from runner.adapters.attemptfiles import read_object
from runner.errors import Refused

VIEWERS_DIR: Final = "viewers"
VIEWER_BYTES_MAX: Final = 1024
"""A key, a mode and their names."""
_ONE_AT_A_TIME: Final = threading.Lock()
"""Of two that come under one name the second must see the first; and so many as may are counted."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """A viewer that was let in."""

    key: PublicKey
    mode: ViewerMode


def admit_viewer(directory: Path, viewer: str, key: str, mode: ViewerMode) -> None:
    """Let a viewer of the PTY in `directory` in. The same again changes nothing.

    Raises:
        Refused: DUPLICATE_VIEWER under another key or mode; CAPACITY when there are too many; WEAK_KEY; NOT_RUNNING without a directory.
        OSError: the disk. Then it is not let in.
    """
    try:
        PublicKey.from_b64url(key)
    except EnvelopeError as exc:
        raise Refused(exc.reason, exc.detail) from exc
    if not directory.is_dir():
        raise Refused(Reason.NOT_RUNNING, "it is over, and its files are gone")
    with _ONE_AT_A_TIME:
        _admit(directory, viewer, {"v": 1, "key": key, "mode": mode.value})


def _admit(directory: Path, viewer: str, wanted: dict[str, object]) -> None:
    folder = directory / VIEWERS_DIR
    found = _read(folder / viewer)
    if found is not None and found != wanted:
        raise Refused(Reason.DUPLICATE_VIEWER, "a viewer of this name has another key or mode")
    if found is None:
        make_durable_directory(folder)
        if len(admitted_names(directory)) >= VIEWERS_MAX:
            raise Refused(Reason.CAPACITY, f"{VIEWERS_MAX} viewers were let in to it already")
        draft = folder / f".{viewer}"
        try:
            write_new(draft, json.dumps(wanted).encode("ascii"), exclusive=False)
            os.replace(draft, folder / viewer)
        except OSError:
            draft.unlink(missing_ok=True)
            raise
    # Also of one that was there: who wrote it may have died before its entry was durable.
    sync_directory(folder)


def admitted_viewer(directory: Path, viewer: str) -> Admitted | None:
    """A viewer that was let in to the PTY in `directory`; None for any other."""
    found = _read(directory / VIEWERS_DIR / viewer)
    if found is None:
        return None
    try:
        return Admitted(PublicKey.from_b64url(str(found.get("key"))), ViewerMode(str(found.get("mode"))))
    except (EnvelopeError, ValueError):
        # Whose file it is, is the child's user, too: what is no viewer's file lets nobody in.
        return None


def admitted_names(directory: Path) -> list[str]:
    """Viewers that were let in to the PTY in `directory`, by name; none where there is no such directory."""
    try:
        return sorted(name for name in os.listdir(directory / VIEWERS_DIR) if not name.startswith("."))
    except OSError:
        return []


def _read(path: Path) -> dict[str, object] | None:
    return read_object(path, VIEWER_BYTES_MAX)
