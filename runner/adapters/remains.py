"""Attempts seen from outside: what their directories say, which of their processes live, and ending what no shim guards.

Theory of operation. A shim is trusted while it holds its lock. What is alive without one is found by the sweeper's tiers; processes
that were recorded as survivors are remembered by pid and start time, because the environment of some of them cannot be read.
Everything here blocks, and runs in threads of the caller.

Rule 1: a process is signalled by its identity in this boot, or by what it carries, never by a pid alone.
Rule 2: files are asked after the lock was seen to be free: what they say then is final.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from protocol.errors import Reason
from protocol.ids import Attempt
from runner.adapters import cgroups, sweeper
from runner.adapters.attemptdir import LOCK_POLL_S, UNRELEASED_WAIT_S, Place, exit_of, still_held
from runner.adapters.attemptfiles import AttemptFiles, attempt_directories, is_alive, read_attempt
from runner.adapters.exitrecord import parse_exit
from runner.core.inputs import AttemptExited, AttemptLost, RemainsSwept
from runner.core.plans import ExitRecord, Observed, Orphan, Phase, ProcessIdentity, ProcessLeft, Swept
from runner.shim import process, system
from runner.shim.process import Process

KILLED_LOCK_WAIT_S: Final = 1.0
"""The kernel gives the lock of a killed shim back while it ends it: at once, unless that waits for a disk."""
EVIDENCE_MAX: Final = sweeper.EVIDENCE_MAX
WATCHED: Final = "watched"
"""The tier of a process that is known by what was recorded of it."""
GUARDED: Final = "guarded"
UNGUARDED: Final = "unguarded"
"""It lives in the journal and has no shim: a daemon ends it by itself."""
SETTLED: Final = "settled"
UNKNOWN: Final = "unknown"
_WAITING: Final = (Phase.NONE.value, Phase.READY.value)
_STOPPED: Final = "Tt"
SHOWN_MAX: Final = 100
"""Processes of one attempt that are shown: a screen or two, and an answer that fits its line."""
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stray:
    """Living processes of one attempt or tool of this runner."""

    name: str
    guarded: bool
    """A shim holds the lock."""
    processes: tuple[Process, ...]

    def told(self, state: str) -> dict[str, Any]:
        """For its owner; `state` is what the journal says of the attempt."""
        now_ms = system.boottime_ms()
        processes = [
            {
                "pid": each.pid,
                "name": process.shown(each.name),
                "age_ms": max(now_ms - each.start * 1000 // _TICKS_PER_S, 0),
                "tier": each.tier,
            }
            for each in self.processes[:SHOWN_MAX]
        ]
        return {"attempt": self.name, "state": state, "processes": processes, "count": len(self.processes)}


@dataclass(slots=True)
class Remains:
    """The attempts of one state directory. `outlive` names the processes that the owner lets live on now."""

    place: Place
    outlive: Callable[[], Sequence[str]] = tuple
    _watched: dict[str, tuple[ProcessLeft, ...]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _base: Path | None = field(init=False)
    """Where to look for cgroups."""

    def __post_init__(self) -> None:
        self._base = self.place.cgroups

    # --- a daemon that starts -----------------------------------------------------------------------------------

    def observe(self) -> list[Observed]:
        """Every attempt directory as it is now; waits for shims that are about to exit unreleased, for all of them together."""
        directories = [each for each in attempt_directories(self.place.state_dir) if _attempt(each.name)]
        seen = {directory.name: read_attempt(directory) for directory in directories}
        ends = time.monotonic() + UNRELEASED_WAIT_S
        for directory in directories:
            if seen[directory.name].alive and seen[directory.name].phase in _WAITING:
                # Its daemon is dead, so it is on its way out; what it leaves is what counts.
                still_held(directory, max(ends - time.monotonic(), LOCK_POLL_S))
                seen[directory.name] = read_attempt(directory)
        living = {stray.name for stray in self.strays()} if directories else set()
        return [self._observed(files, living) for files in seen.values()]

    def _observed(self, files: AttemptFiles, living: set[str]) -> Observed:
        record = None if files.exit is None else parse_exit(files.name, files.exit)
        if record is not None and self._watch(files.name, record):
            living.add(files.name)
        return Observed(
            attempt=Attempt.parse(files.name),
            same_boot=files.boot_id == self.place.boot_id,
            phase=Phase(files.phase) if files.phase in Phase.__members__.values() else Phase.NONE,
            lock_held=files.alive,
            exit=record,
            spec=files.spec,
            shim_answers=not self._is_stopped(files),
            child_alive=files.name in living,
        )

    def _is_stopped(self, files: AttemptFiles) -> bool:
        """Whether its shim is held by a signal or a debugger: then it answers nobody."""
        if files.shim is None or files.boot_id != self.place.boot_id:
            return False
        pid, start = files.shim
        fields = system.stat_fields(pid)
        return len(fields) > 19 and int(fields[19]) == start and fields[0] in _STOPPED

    # --- looking ------------------------------------------------------------------------------------------------

    def scan(self) -> tuple[Orphan, ...]:
        """One look at all processes of this machine: those of ours, by attempt."""
        return tuple(
            Orphan(name=stray.name, processes=len(stray.processes), shim_alive=stray.guarded) for stray in self.strays()
        )

    def strays(self) -> list[Stray]:
        """Everybody who lives and belongs to an attempt or tool of this runner, and may not live on without it."""
        found = {each.attempt: each.processes for each in sweeper.scan(self.place.runner, base=self._base)}
        for name in list(self._watched):
            known = {each.pid for each in found.get(name, ())}
            found[name] = found.get(name, ()) + tuple(each for each in self._alive(name) if each.pid not in known)
        strays = []
        # A cookie is whatever a process says it is; what is no name of ours is no path, either.
        for name in filter(_attempt, sorted(found)):
            guarded = is_alive(self.place.root / name)
            processes = found[name] if guarded else self._unguarded(name, found[name])
            if processes:
                strays.append(Stray(name=name, guarded=guarded, processes=processes))
        return strays

    def _unguarded(self, name: str, found: tuple[Process, ...]) -> tuple[Process, ...]:
        """Of processes that were listed: who is still there now that the lock was seen to be free, and may not be."""
        kin = {each.pid: each for each in found if _lives(each)}
        kept = self._spared(name).of(kin)
        return tuple(each for pid, each in kin.items() if pid not in kept)

    def _spared(self, name: str) -> sweeper.Spared:
        """Who may live on, as its spec says; when that is gone, as the owner says now.

        A PTY that was to leave its background leaves it at its own end; without a word of its shim it has not come to that.
        """
        files = read_attempt(self.place.root / name)
        child = files.child_pid if files.boot_id == self.place.boot_id else None
        names = files.outlive if files.spec else tuple(self.outlive())
        return sweeper.Spared(names, child, all=files.leaves and files.exit is not None)

    # --- ending -------------------------------------------------------------------------------------------------

    def sweep(self, name: str) -> Swept:
        """End what is left of an attempt or a tool whose shim is gone."""
        swept = sweeper.end_remains(self.place.cookie(name), leaf=self._leaf(name), spared=self._spared(name))
        return self._sweep_watched(name, swept)

    def _leaf(self, name: str) -> Path | None:
        """The cgroup of its payload: made under other settings, it is where its spec says, if that is the name of its own."""
        told = read_attempt(self.place.root / name).cgroup
        if told is not None and Path(told).name == cgroups.leaf(Path("/"), name).name:
            return Path(told)
        return self.place.leaf(name)

    def end_by_files(self, name: str) -> AttemptExited | AttemptLost | None:
        """The end of an attempt whose shim we lost, and of what is left of it; None while somebody holds its lock."""
        if still_held(self.place.root / name, UNRELEASED_WAIT_S):
            return None
        return self._ended(Attempt.parse(name), Reason.SHIM_LOST)

    def end_hung(self, name: str, shim: ProcessIdentity | None) -> AttemptExited | AttemptLost | RemainsSwept:
        """KILL a shim that does nothing and sweep what it guarded; RemainsSwept when the lock stays held all the same."""
        directory, attempt = self.place.root / name, Attempt.parse(name)
        files = read_attempt(directory)
        if shim is None and files.shim is not None:
            shim = ProcessIdentity(boot_id=files.boot_id, pid=files.shim[0], start=files.shim[1])
        if shim is not None and shim.boot_id == self.place.boot_id:
            sweeper.kill_shim(shim.pid, shim.start)
        if still_held(directory, KILLED_LOCK_WAIT_S):
            # It may still write its record: nothing is settled, and what was to be ended is ended.
            return RemainsSwept(attempt, self.sweep(name))
        return self._ended(attempt, Reason.SHIM_HUNG)

    def _ended(self, attempt: Attempt, reason: Reason) -> AttemptExited | AttemptLost:
        record = exit_of(self.place.root / attempt.name)
        if record is None:
            return AttemptLost(attempt, reason, self.sweep(attempt.name))
        # Should its shim have left anybody beside the record, the next look finds them.
        self.watch(attempt.name, record)
        return AttemptExited(attempt, record)

    # --- survivors ----------------------------------------------------------------------------------------------

    def recall(self) -> None:
        """For who starts no shims: learn from what they left whom they could not end, and where their cgroups were."""
        for directory in filter(lambda each: _attempt(each.name), attempt_directories(self.place.state_dir)):
            record, leaf = exit_of(directory), self._leaf(directory.name)
            if record is not None:
                self._watch(directory.name, record)
            if leaf is not None:
                self._base = leaf.parent

    def watch(self, name: str, record: ExitRecord) -> None:
        """Remember whom the shim could not end."""
        if record.remains and record.boot_id == self.place.boot_id:
            with self._lock:
                self._watched[name] = record.remains

    def _watch(self, name: str, record: ExitRecord) -> bool:
        """As `watch`, for a record of any age; whether one of them still lives."""
        self.watch(name, record)
        return bool(self._alive(name))

    def _alive(self, name: str) -> list[Process]:
        """The watched processes of an attempt that are still there; when none is, they are forgotten."""
        looked = ((each, process.look(each.pid, WATCHED)) for each in self._watched.get(name, ()))
        alive = [found for left, found in looked if found is not None and found.start == left.start]
        if not alive:
            with self._lock:
                self._watched.pop(name, None)
        return alive

    def _sweep_watched(self, name: str, swept: Swept) -> Swept:
        """Add to the evidence of a sweep those that it could not find."""
        told = {int(line.split(" ", 1)[0]) for line in swept.remains}
        extra = [each for each in self._alive(name) if each.pid not in told]
        if not extra:
            return swept
        reached = sum(process.send(each, system.signals.SIGKILL) for each in extra)
        standing = [(each, how) for each in extra if (how := process.standing(each)) is not None]
        lines = tuple(f"{each.pid} {process.shown(each.name)} start={each.start} {WATCHED}" for each in extra)
        remains = tuple(
            f"{each.pid} {process.shown(each.name)} {state} wchan={wchan or '-'} {why}"
            for each, (state, wchan, why) in standing
        )
        return replace(
            swept,
            found=swept.found + len(extra),
            signalled=swept.signalled + reached,
            remaining=swept.remaining + len(standing),
            seen=(swept.seen + lines)[:EVIDENCE_MAX],
            remains=(swept.remains + remains)[:EVIDENCE_MAX],
        )


def _attempt(name: str) -> Attempt | None:
    with contextlib.suppress(ValueError):
        return Attempt.parse(name)
    return None


def _lives(each: Process) -> bool:
    found = process.look(each.pid, each.tier)
    return found is not None and found.start == each.start


def told_sweep(name: str, swept: Swept | None) -> dict[str, Any]:
    """The evidence of a sweep for the owner; None: it goes on."""
    if swept is None:
        return {"attempt": name, "done": False}
    return {
        "attempt": name,
        "done": True,
        "found": swept.found,
        "signalled": swept.signalled,
        "remaining": swept.remaining,
        "seen": list(swept.seen),
        "remains": list(swept.remains),
    }
