"""What is left of an attempt whose shim is gone, or hangs: found in tiers, ended through pidfds, until two scans find nobody.

First tier: the payload's cgroup, where there is one. Second and third: who carries the attempt's cookie in its environment, and
what those started. The shim, which would have been the parent of all others, is gone: a process that cleaned its environment and
left its parents is seen in a cgroup only, and what cannot be seen is not claimed. There is no grace: nobody is left to grant it.
"""

import contextlib
import os
import select
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from runner.adapters import cgroups
from runner.core.plans import Swept
from runner.shim import process
from runner.shim.cgroup import Leaf
from runner.shim.process import Process
from runner.shim.tree import CGROUP, COOKIE, DESCENDANTS

COOKIE_NAME: Final = "LOCAL_RUNNER_COOKIE"
SCANS_MAX: Final = 100
"""A tree that breeds faster than this many rounds is reported as remaining."""
ROUND_S: Final = 0.05
"""Between two rounds: killed processes need a moment to be gone."""
LISTINGS_MAX: Final = 20
"""Processes born during a scan are looked at, too, and those born meanwhile; a fork bomb ends this."""
EVIDENCE_MAX: Final = 32
"""Lines of evidence of each kind; the counts are of all."""
SHIM_WAIT_S: Final = 5.0
"""A killed shim is gone at once unless it waits for a disk; its tree is swept all the same."""


@dataclass(frozen=True, slots=True)
class Spared:
    """Who may outlive an attempt: processes that go by one of `names`, and what they started, but never the `child` itself.

    `all`: whoever is left, but for the child.
    """

    names: Sequence[str] = ()
    child: int | None = None
    all: bool = False

    def of(self, kin: dict[int, Process]) -> dict[int, Process]:
        """Those of `kin` who may."""
        if self.all:
            return {pid: each for pid, each in kin.items() if pid != self.child}
        return process.spared(kin, [os.fsencode(name) for name in self.names], never=self.child or 0)


NOBODY: Final = Spared()


@dataclass(frozen=True, slots=True)
class Found:
    """Living processes that belong to one attempt of this runner, by their cookie or by the cgroup they are in."""

    attempt: str
    processes: tuple[Process, ...]


def scan(runner_id: str, *, base: Path | None = None) -> list[Found]:
    """Every living process of ours on this machine, by attempt, whether it may live on or not. Blocking.

    Processes of other users and of the kernel tell nothing, unless they are in a leaf below `base`.
    """
    mark = f"{COOKIE_NAME}={runner_id}:".encode()
    kin: dict[str, dict[int, Process]] = {}
    for pid, cookie in _carriers(mark):
        _note(kin.setdefault(cookie[len(mark) :].decode("utf-8", "replace"), {}), pid, COOKIE)
    for name, path in cgroups.leaves(base).items() if base is not None else ():
        for pid in Leaf(os.fsencode(path)).members():
            _note(kin.setdefault(name, {}), pid, CGROUP)
    return [Found(name, tuple(each for _pid, each in sorted(kin[name].items()))) for name in sorted(kin) if kin[name]]


def end_remains(cookie: str, *, leaf: Path | None = None, spared: Spared = NOBODY) -> Swept:
    """Kill what is left of the attempt of `cookie`, but for who is `spared`; returns the evidence. Blocking."""
    sweep = _Sweep(f"{COOKIE_NAME}={cookie}".encode(), leaf, spared)
    empty = 0
    for _round in range(SCANS_MAX):
        empty = 0 if sweep.kill() else empty + 1
        if empty == 2:
            break
        time.sleep(ROUND_S)
    return sweep.part()


def kill_shim(pid: int, start: int) -> bool:
    """KILL a shim that hangs, if it is still the process that was recorded, and wait until it is gone. Blocking.

    Returns whether it is gone; what it guarded is for `end_remains`.
    """
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        living = process.look(pid, "")
        if living is None or living.start != start:
            return True
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        gone = select.poll()
        gone.register(fd, select.POLLIN)
        return bool(gone.poll(SHIM_WAIT_S * 1000))
    except PermissionError:
        return False
    finally:
        os.close(fd)


class _Sweep:
    """One sweep: whom it saw, whom it signalled, who stays."""

    def __init__(self, mark: bytes, leaf: Path | None, spared: Spared) -> None:
        self._mark = mark
        self._path = leaf
        self._leaf = None if leaf is None else Leaf(os.fsencode(leaf))
        self._spared = spared
        self._seen: dict[tuple[int, int], Process] = {}
        self._signalled: dict[tuple[int, int], Process] = {}
        self._kept: dict[int, Process] = {}

    def kill(self) -> int:
        """One round: KILL everybody who is found; returns how many there were."""
        now = self._look()
        whole = self._leaf is not None and not self._kept_inside() and self._leaf.kill()
        for each in now:
            who = (each.pid, each.start)
            self._seen[who] = each
            if (whole and each.tier == CGROUP) or process.send(each, signal.SIGKILL):
                self._signalled[who] = each
        return max(len(now), self._hidden())

    def part(self) -> Swept:
        """The evidence; the leaf goes unless somebody stays."""
        standing = [(each, how) for each in self._look() if (how := process.standing(each)) is not None]
        hidden = self._hidden()
        if self._leaf is not None:
            for each in self._kept_inside():
                self._leaf.evict(each.pid)
            self._leaf.remove()
        counts: dict[str, int] = {}
        for each in self._signalled.values():
            counts[each.tier] = counts.get(each.tier, 0) + 1
        return Swept(
            found=len(self._seen),
            signalled=len(self._signalled),
            remaining=max(len(standing), hidden),
            tiers=tuple((tier, int(signal.SIGKILL), count) for tier, count in sorted(counts.items())),
            seen=tuple(_line(each) for each in list(self._seen.values())[:EVIDENCE_MAX]),
            remains=tuple(
                f"{each.pid} {process.shown(each.name)} {state} wchan={wchan or '-'} {why}"
                for each, (state, wchan, why) in standing[:EVIDENCE_MAX]
            ),
            outlived=tuple(_line(each) for each in list(self._kept.values())[:EVIDENCE_MAX]),
        )

    def _look(self) -> list[Process]:
        """Everybody who is left and may not be: the leaf, who carries the cookie, and what those started."""
        kin: dict[int, Process] = {}
        for pid in self._leaf.members() if self._leaf is not None else ():
            _note(kin, pid, CGROUP)
        for pid, cookie in _carriers(self._mark):
            if cookie == self._mark:
                _note(kin, pid, COOKIE)
        waiting = list(kin)
        while waiting:
            for pid in process.children(waiting.pop()):
                if pid not in kin and pid != os.getpid() and _note(kin, pid, DESCENDANTS):
                    waiting.append(pid)
        self._kept = self._spared.of(kin)
        return [each for pid, each in kin.items() if pid not in self._kept]

    def _kept_inside(self) -> list[Process]:
        return [each for each in self._kept.values() if each.tier == CGROUP]

    def _hidden(self) -> int:
        """1 when somebody is in the leaf, whether we can see who or not; those who may be there do not count."""
        return int(self._path is not None and not self._kept_inside() and cgroups.populated(self._path))


def _carriers(mark: bytes) -> list[tuple[int, bytes]]:
    """Living processes of this user whose environment has a variable that begins with `mark`, and that variable.

    A chain of processes each of which starts the next and ends could slip through one listing: whoever was born since the
    last one is looked at, until nobody was.
    """
    uid, me = os.geteuid(), os.getpid()
    asked: set[int] = set()
    found = []
    for _listing in range(LISTINGS_MAX):
        born = [pid for pid in process.pids() if pid not in asked]
        if not born:
            break
        for pid in born:
            asked.add(pid)
            if pid != me and process.belongs_to(pid, uid):
                found += [(pid, cookie) for cookie in process.marked(pid, mark)]
    return found


def _note(kin: dict[int, Process], pid: int, tier: str) -> bool:
    """Put a process into `kin` unless it is there or dead; whether it was put."""
    living = None if pid in kin else process.look(pid, tier)
    if living is not None:
        kin[pid] = living
    return living is not None


def _line(each: Process) -> str:
    return f"{each.pid} {process.shown(each.name)} start={each.start} {each.tier}"
