"""The trash: what was renamed into it is deleted, and nothing else on this machine is.

Rule 1: every step works relative to an open directory and follows no link; a link is removed, what it points at is not looked at.
Rule 2: a directory on another device is left alone and reported: somebody mounted it, so it is not ours.
Rule 3: depth and width cost neither memory nor descriptors: directories are moved up to the top of their entry before they are emptied.
"""

import errno
import os
import stat
from collections.abc import Generator
from itertools import islice
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread

from protocol.errors import Reason
from runner.errors import Broken

STEP_ENTRIES: Final = 1000
"""Files deleted by one call of a worker thread: some tens of milliseconds, then others and a cancellation get their turn."""
NAMES_MAX: Final = 1000
"""Tries for a free name: entries of one command are its directory and what repeated undoing of it left."""
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OWNER_ALL: Final = 0o700


class Trash:
    """One trash directory, on the same file system as what is thrown into it."""

    def __init__(self, directory: Path) -> None:
        self._dir = directory

    def throw(self, parent: Path, name: str, cmd_id: str) -> None:
        """Rename `parent/name` into the trash: the moment from which it is gone. Raises OSError."""
        with _opened(parent) as source, _opened(self._dir) as target:
            entry = self._free_name(target, cmd_id)
            os.rename(name, entry, src_dir_fd=source, dst_dir_fd=target)
            os.fsync(target)
            os.fsync(source)

    def entries(self) -> list[str]:
        """What waits to be deleted."""
        return sorted(os.listdir(self._dir))

    async def delete(self, entry: str, threads: anyio.CapacityLimiter) -> None:
        """Delete one entry to the end, in steps. Raises Broken naming what could not be deleted."""
        assert "/" not in entry and entry not in (".", "..")
        steps = _deletion(self._dir, entry)
        try:
            while await anyio.to_thread.run_sync(_advance, steps, STEP_ENTRIES, limiter=threads):
                pass
        except OSError as exc:
            raise Broken(Reason.INFRA, f"trash/{entry} cannot be deleted: {exc.strerror}") from exc
        finally:
            steps.close()

    @staticmethod
    def _free_name(trash_fd: int, cmd_id: str) -> str:
        for number in range(NAMES_MAX):
            name = f"{cmd_id}.{number}" if number else cmd_id
            try:
                os.stat(name, dir_fd=trash_fd, follow_symlinks=False)
            except FileNotFoundError:
                return name
        raise OSError(errno.EEXIST, "too many trash entries of one command")


class _opened:
    """A directory that is open for the length of a `with`, never through a link."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> int:
        self._fd = os.open(self._path, _DIRECTORY)
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _advance(steps: Generator[None, None, None], count: int) -> bool:
    """Do up to `count` steps; whether there may be more."""
    return sum(1 for _ in islice(steps, count)) == count


def _deletion(trash: Path, entry: str) -> Generator[None, None, None]:
    """Delete `entry` of the directory `trash`; yields after each removal."""
    with _opened(trash) as trash_fd:
        device = os.fstat(trash_fd).st_dev
        if not _is_directory(trash_fd, entry):
            os.unlink(entry, dir_fd=trash_fd)
            return
        top = _enter(trash_fd, entry, device)
        try:
            # Directories from below are moved up into it, so it is listed until there is nothing left.
            while _holds_something(top):
                yield from _emptied(top, top, device)
        finally:
            os.close(top)
        os.rmdir(entry, dir_fd=trash_fd)


def _emptied(directory: int, top: int, device: int) -> Generator[None, None, None]:
    """Unlink the files of an open directory; empty its directories if it is the top, else move them up to the top."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.name, dir_fd=directory)
            elif directory != top:
                _move_up(directory, entry.name, entry.inode(), top, device)
            else:
                child = _enter(top, entry.name, device)
                try:
                    yield from _emptied(child, top, device)
                finally:
                    os.close(child)
                os.rmdir(entry.name, dir_fd=top)
            yield


def _move_up(directory: int, name: str, inode: int, top: int, device: int) -> None:
    """Give a directory a place at the top. Its inode number makes the name free, unless somebody foresaw it."""
    os.close(_enter(directory, name, device))  # a directory that may not be written cannot be moved either
    for number in range(NAMES_MAX):
        try:
            os.rename(name, f".up-{inode}.{number}", src_dir_fd=directory, dst_dir_fd=top)
        except OSError as exc:
            if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        else:
            return
    raise OSError(errno.EEXIST, "no free name to move a directory up to")


def _enter(parent: int, name: str, device: int) -> int:
    """Open a directory of ours to empty it, making it writable for us first where it is not."""
    handle = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        found = os.fstat(handle)
        if found.st_dev != device:
            raise OSError(errno.EXDEV, "another file system is mounted inside")
        if stat.S_IMODE(found.st_mode) & _OWNER_ALL != _OWNER_ALL:
            # Through the handle: a chmod by name would follow a link that was put there meanwhile.
            os.chmod(f"/proc/self/fd/{handle}", _OWNER_ALL)
        return os.open(".", _DIRECTORY, dir_fd=handle)
    finally:
        os.close(handle)


def _is_directory(parent: int, name: str) -> bool:
    return stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)


def _holds_something(directory: int) -> bool:
    with os.scandir(directory) as entries:
        return next(entries, None) is not None
