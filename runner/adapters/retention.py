"""Attempt directories that have served their time: found, set aside by a rename, and deleted after that.

Theory of operation. The files say what an attempt takes, whether it lives and how much of its log is durable at the control plane; the
journal says what is settled; `runner/core/retention.py` says what goes. A directory is renamed first, to a name that no attempt can
have: so it is gone at once and as a whole, and a daemon that dies while it is deleted finds half of a directory of nobody.

Rule: a directory that the journal does not know as settled is nobody's to delete, whatever its files say.
"""

import contextlib
import os
import shutil
import stat
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.to_thread

from runner.adapters.attemptfiles import ATTEMPTS_DIR, attempt_directories, is_alive, read_attempt, written_end
from runner.adapters.exitrecord import parse_exit
from runner.adapters.uplink import ACK_NAME, read_ack
from runner.core.retention import Drop, Spooled, to_drop, to_limit
from runner.ports import Clock

EVERY_S: Final = 600.0
"""Old is a matter of days, and ten minutes of output are well within what the bound leaves free on any disk."""
LOOK_S: Final = 60.0
"""Between two looks at whether the disk lacks room: it fills within minutes where it fills at all."""
NAMED_MAX: Final = 200
"""Directories that one answer names: it must fit a line of the control socket."""
_ASIDE: Final = ".gone-"
_BLOCK_BYTES: Final = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """How long and how much is kept."""

    keep_ms: int
    host_bytes: int


class Retention:
    """Sets aside and deletes what need not be kept.

    `settled` asks the journal which of these attempts are, and since when; `living` names what the engine has not settled; `wanted`
    says how many bytes the disk lacks; `limit` tells the shim of a living attempt that its log has to be smaller.
    """

    def __init__(
        self,
        *,
        state_dir: Path,
        kept: Kept,
        clock: Clock,
        settled: Callable[[Sequence[str]], Awaitable[Mapping[str, int]]],
        living: Callable[[], Collection[str]],
        wanted: Callable[[], int],
        limit: Callable[[str, int], None],
        note: Callable[[str, dict[str, str | int | None]], None],
    ) -> None:
        self._state_dir = state_dir
        self._kept = kept
        self._clock = clock
        self._settled = settled
        self._living = living
        self._wanted = wanted
        self._limit = limit
        self._note = note
        self._turn = anyio.Lock()
        self._thread = anyio.CapacityLimiter(1)
        self._aside = anyio.Event()

    async def keep(self) -> None:
        """Look after it for ever."""
        while True:
            try:
                await self.prune(by="daemon")
                await self._delete_aside()
            except OSError as exc:
                self._note("spool.failed", {"detail": exc.strerror})
            # What lives grows by the second, what is old is so for days.
            with anyio.move_on_after(LOOK_S if self._living() else EVERY_S):
                await self._until_wanted()

    async def prune(self, *, by: str, dry_run: bool = False) -> dict[str, Any]:
        """Set aside what goes, or only say what would; what was set aside is deleted soon after. Raises OSError, JournalBroken."""
        async with self._turn:
            found = await self._judged()
            wanted = self._wanted()
            drops = to_drop(
                found,
                now_ms=self._clock.now().wall_ms,
                keep_ms=self._kept.keep_ms,
                bytes_max=self._kept.host_bytes,
                wanted_bytes=wanted,
            )
            if not dry_run:
                drops = await anyio.to_thread.run_sync(set_aside, self._state_dir, drops, limiter=self._thread)
                if drops:
                    size = sum(drop.one.size_bytes for drop in drops)
                    self._note("spool.pruned", {"count": len(drops), "bytes": size, "by": by})
                    self._aside.set()
                self._limit_living(found, drops)
        return self._told(found, drops, wanted, dry_run=dry_run)

    def _limit_living(self, found: list[Spooled], drops: list[Drop]) -> None:
        gone = {drop.one.name for drop in drops}
        limits = to_limit((one for one in found if one.name not in gone), self._kept.host_bytes)
        for name, size in limits.items():
            self._limit(name, size)
        if limits:
            self._note("spool.limited", {"count": len(limits), "bytes": min(limits.values())})

    async def _judged(self) -> list[Spooled]:
        """Every attempt directory, as files and journal say."""
        found = await anyio.to_thread.run_sync(survey, self._state_dir, limiter=self._thread)
        settled = await self._settled([one.name for one in found])
        # Asked last: what was settled a moment ago is no longer among the living, and what lives is never settled.
        living = set(self._living())
        return [
            replace(one, settled=one.name not in living, since_ms=max(one.since_ms, settled[one.name]))
            if one.name in settled
            else one
            for one in found
        ]

    def _told(self, found: list[Spooled], drops: list[Drop], wanted: int, *, dry_run: bool) -> dict[str, Any]:
        now_ms = self._clock.now().wall_ms
        gone = {drop.one.name for drop in drops}
        left = [one for one in found if one.name not in gone]
        size = sum(one.size_bytes for one in left)
        return {
            "dry_run": dry_run,
            "attempts": [
                {
                    "attempt": drop.one.name,
                    "bytes": drop.one.size_bytes,
                    "age_ms": max(now_ms - drop.one.since_ms, 0),
                    "why": drop.why.value,
                }
                for drop in drops[:NAMED_MAX]
            ],
            "count": len(drops),
            "bytes": sum(drop.one.size_bytes for drop in drops),
            "left": {
                "count": len(left),
                "bytes": size,
                "alive": sum(one.alive for one in left),
                "unsettled": sum(not one.settled for one in left),
                "unacked": sum(not one.acked for one in left),
            },
            "keep_ms": self._kept.keep_ms,
            "host_bytes": self._kept.host_bytes,
            "over_bytes": max(size - self._kept.host_bytes, 0),
            "disk_lacks_bytes": wanted,
        }

    async def _until_wanted(self) -> None:
        """Until the disk lacks room; what is set aside meanwhile is deleted."""
        while True:
            with anyio.move_on_after(LOOK_S):
                await self._aside.wait()
            await self._delete_aside()
            if self._wanted() > 0:
                return

    async def _delete_aside(self) -> None:
        self._aside = anyio.Event()
        fault = await anyio.to_thread.run_sync(delete_aside, self._state_dir, limiter=self._thread)
        if fault is not None:
            self._note("spool.failed", {"detail": fault})


# --- in a thread --------------------------------------------------------------------------------------------------------


def survey(state_dir: Path) -> list[Spooled]:
    """Every attempt directory as its files tell; none of them is settled by that. Raises OSError."""
    return [_spooled(directory) for directory in attempt_directories(state_dir) if _is_ours(directory)]


def _spooled(directory: Path) -> Spooled:
    files = read_attempt(directory)
    record = None if files.exit is None else parse_exit(directory.name, files.exit)
    end = written_end(directory) if record is None else record.log_end
    acked = read_ack(directory)
    since_ms = 0
    with contextlib.suppress(OSError):
        since_ms = int((directory / ACK_NAME).stat().st_mtime * 1000)
    return Spooled(
        name=directory.name,
        size_bytes=_size(directory),
        settled=False,
        acked=acked is not None and acked >= (end or 0),
        alive=files.alive,
        since_ms=since_ms,
    )


def _is_ours(directory: Path) -> bool:
    """A directory of this user, and no link to one."""
    try:
        found = directory.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def _size(directory: Path) -> int:
    """What it takes of the disk: holes of a log take nothing."""
    total = 0
    for place, directories, names in os.walk(directory):
        for name in (*directories, *names):
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_blocks * _BLOCK_BYTES
    return total


def set_aside(state_dir: Path, drops: Sequence[Drop]) -> list[Drop]:
    """Rename what goes; what cannot be renamed, or has come to life, stays. Returns what went."""
    root = state_dir / ATTEMPTS_DIR
    return [drop for drop in drops if _set_aside(root, drop.one.name)]


def _set_aside(root: Path, name: str) -> bool:
    directory = root / name
    try:
        if not _is_ours(directory) or is_alive(directory):
            return False
        directory.rename(root / f"{_ASIDE}{name}")
    except OSError:
        return False  # the next look finds it again
    return True


def delete_aside(state_dir: Path) -> str | None:
    """Delete what was set aside, by whichever daemon; returns what kept one of them from it."""
    fault = None
    with contextlib.suppress(FileNotFoundError), os.scandir(state_dir / ATTEMPTS_DIR) as entries:
        for entry in [entry for entry in entries if entry.name.startswith(_ASIDE)]:
            try:
                shutil.rmtree(entry.path)
            except OSError as exc:
                fault = f"{entry.path} cannot be deleted: {exc.strerror}"
    return fault
