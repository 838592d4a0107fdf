"""What is written about managed worktrees: the ownership marker in each, and the record of each removal.

Both are written whole (temporary file, fsync, rename, fsync of the directory) and read back with suspicion: anything that is not
exactly a marker of ours makes the directory foreign, and foreign directories are never touched.
"""

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, TypeVar

from protocol import strict_json
from protocol.errors import Reason
from protocol.ids import is_id
from runner.errors import Broken

MARKER: Final = ".runner-owner.json"
FORMAT: Final = 1
FILE_BYTES_MAX: Final = 64 * 1024
"""A marker: a dozen fields, of which paths may have 4 KiB each, doubled by escapes."""
FILE_MODE: Final = 0o600
RECORDS_KEPT: Final = 1000
"""Removals that still know their result: many times what can be unanswered at once."""
_RECORD_SUFFIX: Final = ".json"
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


class State(StrEnum):
    """How far a managed directory is: only a ready one was ever handed out."""

    CREATING = "creating"
    READY = "ready"


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Whose a managed directory is, and what it was made as."""

    cmd_id: str
    worktree_id: str
    runner: str
    inc: int
    repo: str
    git_dir: str
    """Common git directory of `repo`, real path: where the worktree is registered."""
    checkout: str
    """Name of the checkout inside the managed directory."""
    base: str
    branch: str | None
    head: str
    """The commit that `base` named; where `branch` was made."""
    state: State
    created_ms: int
    token: int = 0
    """The highest fencing token that a command for it had; who has a lower one was superseded. 0: none had any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """A removal that was decided; it is done when the directory that `made_by` made is away."""

    cmd_id: str
    worktree_id: str
    made_by: str
    git_dir: str
    checkout_path: str
    head: str | None
    branch: str | None
    was_dirty: bool


class Foreign:
    """There is something of that name, and it is not ours."""


def look(managed: Path) -> Owner | Foreign | None:
    """What is at the path of a managed directory; None when nothing is."""
    try:
        directory = os.open(managed, _DIRECTORY)
    except FileNotFoundError:
        return None
    except OSError:
        return Foreign()
    try:
        found = _read(directory, MARKER)
    except OSError:
        return Foreign()
    finally:
        os.close(directory)
    owner = _owner(found)
    return owner if owner is not None and owner.worktree_id == managed.name else Foreign()


def write_owner(managed: Path, owner: Owner) -> None:
    """Write the marker, durably. Raises OSError."""
    _write(managed, MARKER, {"v": FORMAT, **asdict(owner), "state": owner.state.value})


def read_removal(directory: Path, cmd_id: str) -> Removal | None:
    """The record of a removal by that command; None when there is none that can be read."""
    try:
        fd = os.open(directory, _DIRECTORY)
    except OSError:
        return None
    try:
        found = _read(fd, cmd_id + _RECORD_SUFFIX)
    except OSError:
        return None
    finally:
        os.close(fd)
    return _shaped(Removal, found)


def write_removal(directory: Path, removal: Removal) -> None:
    """Write the record, durably. Raises OSError."""
    _write(directory, removal.cmd_id + _RECORD_SUFFIX, {"v": FORMAT, **asdict(removal)})


def prune_removals(directory: Path) -> None:
    """Forget the oldest records: their receipts were answered long ago. Raises OSError."""
    with os.scandir(directory) as entries:
        aged = sorted((entry.stat(follow_symlinks=False).st_mtime_ns, entry.name) for entry in entries)
    for _, name in aged[:-RECORDS_KEPT]:
        os.unlink(directory / name)


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Say errors of the disk in our own words: Broken(DISK_FULL | INFRA)."""
    try:
        yield
    except OSError as exc:
        reason = Reason.DISK_FULL if exc.errno in _FULL else Reason.INFRA
        raise Broken(reason, f"{exc.strerror}: {exc.filename}" if exc.filename else str(exc.strerror)) from exc


def _owner(found: Mapping[str, Any] | None) -> Owner | None:
    if found is None:
        return None
    try:
        # Markers were written without a token before there were any.
        owner = _shaped(Owner, {"token": 0, **found, "state": State(str(found.get("state")))})
    except ValueError:
        return None
    if owner is None or not is_id(owner.worktree_id) or not is_id(owner.cmd_id):
        return None
    absolute = owner.git_dir.startswith("/") and owner.repo.startswith("/")
    return owner if absolute and "/" not in owner.checkout and owner.checkout not in ("", ".", "..", MARKER) else None


_Shape = TypeVar("_Shape", Owner, Removal)


def _shaped(shape: type[_Shape], found: Mapping[str, Any] | None) -> _Shape | None:
    """`found` as a `shape`, when it has exactly its fields with values of their types."""
    names = {field.name for field in fields(shape)}
    if found is None or found.get("v") != FORMAT or set(found) != names | {"v"}:
        return None
    values = {name: found[name] for name in names}
    typed = all(isinstance(values[field.name], _TYPES[str(field.type)]) for field in fields(shape))
    return shape(**values) if typed else None


_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    str(str): (str,),
    str(int): (int,),
    str(bool): (bool,),
    str(State): (State,),
    str(str | None): (str, type(None)),
}


def _read(directory: int, name: str) -> dict[str, Any] | None:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return None
    with open(fd, "rb") as file:
        document = file.read(FILE_BYTES_MAX + 1)
    try:
        return strict_json.loads_object(document, FILE_BYTES_MAX)
    except strict_json.JsonRefused:
        return None


def _write(directory: Path, name: str, document: Mapping[str, Any]) -> None:
    fd = os.open(directory, _DIRECTORY)
    try:
        temporary = f"{name}.tmp"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=fd)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(temporary, flags, FILE_MODE, dir_fd=fd), "wb") as file:
            file.write(json.dumps(document, separators=(",", ":")).encode("ascii"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, name, src_dir_fd=fd, dst_dir_fd=fd)
        os.fsync(fd)
    finally:
        os.close(fd)
