"""The processes of one attempt: finding them, signalling them, and telling of those that stay.

First tier: whoever is in the payload's cgroup, where there is one. Second tier: descendants of this shim, complete because
it is their subreaper. Third tier: processes of this user that carry the attempt's cookie in their environment, wherever
they hang, and what those started.

Rule 1. A tier more finds more: all of them are asked at every look, each process counts for the first that has it.
Rule 2. Who may outlive the attempt, and what it started, is neither signalled nor counted; never the child itself.
Rule 3. The whole cgroup is killed or frozen only while nobody in it may live on.
Rule 4. While the shim has children that no look finds, the tree is not empty: it forks faster than it is looked at.
"""

from __future__ import annotations

import posix as os
import time

from runner.shim import process, system
from runner.shim.process import Process as Process
from runner.shim.process import send as send
from runner.shim.system import signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Final

    from runner.shim.cgroup import Leaf

CGROUP: Final = "cgroup"
DESCENDANTS: Final = "descendants"
COOKIE: Final = "cookie"
# New processes between two scans mean the tree is forking; it is followed this many times before the next look.
PASSES_TERM: Final = 2
PASSES_KILL: Final = 10
PASSES_FIND: Final = 5
PASSES_EVICT: Final = 5
END_RETRY_S: Final = 0.02
# Pids that were taken and given back without a fork being counted, when a fork failed half-way.
PIDS_SPARE: Final = 2048


class Tree:
    """The tree of the attempt that carries `cookie` (a whole `NAME=value`)."""

    def __init__(self, cookie: bytes, leaf: Leaf | None = None, outlive: Iterable[bytes] = ()) -> None:
        self.leaf = leaf
        self.outlived: dict[int, Process] = {}  # as the last look found them
        self.unseen = False  # somebody lives whom the last look did not find
        self.parted = False  # whoever lives on, may
        self._cookie = cookie
        self._outlive = list(outlive)
        self._me = os.getpid()
        self._uid = os.geteuid()
        self._forks = _forks()
        self._eldest = 0

    @property
    def tiers(self) -> list[str]:
        """The tiers that are asked."""
        return [CGROUP, DESCENDANTS, COOKIE] if self._inside() else [DESCENDANTS, COOKIE]

    def enter(self) -> None:
        """Step into the leaf, where there is one: the next child is born inside."""
        if self.leaf is not None:
            self.leaf.enter()

    def leave(self) -> None:
        """Step back out of the leaf."""
        if self.leaf is not None:
            self.leaf.leave()

    def begin(self, pid: int) -> None:
        """The child is `pid`: nobody who was born before it carries the cookie."""
        self._eldest = pid

    def find(self) -> list[Process]:
        """Every living process of the tree that may not outlive it; zombies and the shim itself are none."""
        for _ in range(PASSES_FIND):
            kin = self._look()
            self.unseen = not kin and not self.parted and not self._childless()
            if not self.unseen:
                break
        if self.parted:
            self.outlived = {pid: each for pid, each in kin.items() if pid != self._eldest}
            return []
        self.outlived = process.spared(kin, self._outlive, self._eldest)
        return [each for each in kin.values() if each.pid not in self.outlived]

    def hang_up(self) -> tuple[list[Process], int]:
        """As `signal`, HUP to the session of the child alone: what has left it does not belong to its terminal."""
        kin = self.find()
        reached = [each for each in kin if process.session(each.pid) == self._eldest and send(each, signals.SIGHUP)]
        return reached, len(kin) + self.unseen

    def count(self) -> int:
        """How many live, of those that may not; somebody unseen is one."""
        return len(self.find()) + self.unseen

    def signal(self, number: int, *, passes: int) -> tuple[list[Process], int]:
        """Send `number` and CONT once to each process of the tree; returns those it reached and how many were found.

        A process of another user that must not be signalled is counted as found.
        """
        reached: list[Process] = []
        tried: set[tuple[int, int]] = set()
        count = 0
        for _ in range(passes):
            processes = self.find()
            count = len(processes) + self.unseen
            whole = self._whole(number)
            fresh = [each for each in processes if (each.pid, each.start) not in tried]
            if not fresh:
                break
            for each in fresh:
                tried.add((each.pid, each.start))
                if (whole and each.tier == CGROUP) or send(each, number):
                    reached.append(each)
        if number in (signals.SIGTERM, signals.SIGCONT) and self.leaf is not None and self._inside():
            # Behind the signals: they are taken in the order of their weight, not of their arrival.
            self.leaf.thaw()
        return reached, count

    def remains(self) -> list[tuple[Process, str, str, str]]:
        """Who lives on, each with its state, the kernel function it sleeps in, and why."""
        standing = [(each, process.standing(each)) for each in self.find()]
        return [(each, *how) for each, how in standing if how is not None]

    def part(self) -> None:
        """Leave the tree for good: who may live on moves to where the shim lives, and the leaf goes unless somebody stays."""
        if self.leaf is None or not self.leaf.active:
            return
        for _ in range(PASSES_EVICT if self.outlived else 0):
            self.find()
            inside = [pid for pid, each in self.outlived.items() if each.tier == CGROUP]
            for pid in inside:
                self.leaf.evict(pid)
            if not inside:
                break
        self.leaf.remove()

    def _inside(self) -> bool:
        return self.leaf is not None and self.leaf.active

    def _whole(self, number: int) -> bool:
        """Do to the leaf as a whole what `number` does to a process, where that is possible; whether it was done."""
        if self.leaf is None or not self.leaf.active:
            return False
        if any(each.tier == CGROUP for each in self.outlived.values()):
            return False
        if number == signals.SIGKILL:
            return self.leaf.kill()
        return number == signals.SIGSTOP and self.leaf.freeze()

    def _look(self) -> dict[int, Process]:
        """Everybody of the tree who lives, by pid: the first two tiers, then the third and what it started."""
        members = set(self.leaf.members()) if self.leaf is not None and self.leaf.active else set()
        members.discard(self._me)
        kin: dict[int, Process] = {}
        seen = {self._me}
        self._descend([self._me], DESCENDANTS, members, seen, kin)
        self._descend(members - seen, CGROUP, members, seen, kin)
        carriers = (pid for pid in self._strangers() if pid not in seen and self._carries_cookie(pid))
        self._descend(list(carriers), COOKIE, members, seen, kin)
        return kin

    def _descend(
        self, roots: Iterable[int], tier: str, members: set[int], seen: set[int], kin: dict[int, Process]
    ) -> None:
        waiting = list(roots)
        while waiting:
            pid = waiting.pop()
            if pid != self._me:
                found = process.look(pid, CGROUP if pid in members else tier)
                if found is not None:
                    kin[pid] = found
            seen.add(pid)
            waiting.extend(each for each in process.children(pid) if each not in seen)

    def _childless(self) -> bool:
        """Whether the shim has no living child, which proves that it has no descendants; the dead are reaped on the way.

        The child itself is left to the loop, which wants its status and looks again behind it.
        """
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return True
            if ended is None:
                return False
            if ended.si_pid == self._eldest:
                return True
            os.waitpid(ended.si_pid, os.WNOHANG)

    def _strangers(self) -> list[int]:
        """Whoever may carry the cookie: all who were born after the child.

        Reading the environment of every process would cost each end of an attempt milliseconds. Pids are given out in
        rising order, so the younger ones have higher numbers, as long as there were too few forks to come round.
        """
        pids = list(process.pids())
        newest, tasks = _last_pid()
        born = _forks() - self._forks
        come_round = self._eldest + born + tasks + PIDS_SPARE >= _pid_max()
        if come_round or not 0 < self._eldest <= newest or born <= 0:
            return pids
        return [pid for pid in pids if pid > self._eldest]

    def _carries_cookie(self, pid: int) -> bool:
        return process.belongs_to(pid, self._uid) and process.carries(pid, self._cookie)


def end(tree: Tree, wait_ms: int) -> int:
    """Kill the tree without a loop around it, for at most `wait_ms`; returns how many live on."""
    end_ms = system.boottime_ms() + wait_ms
    empty = 0
    while True:
        _reached, count = tree.signal(signals.SIGKILL, passes=PASSES_KILL)
        try:
            while os.wait4(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
        empty = 0 if count else empty + 1
        if empty == 2 or system.boottime_ms() >= end_ms:
            return count
        if count:
            time.sleep(END_RETRY_S)


def _forks() -> int:
    """Processes and threads this machine has started since it booted, 0 where the kernel does not tell."""
    try:
        told = system.read_whole("/proc/stat").rpartition(b"\nprocesses ")[2]
        return int(told.split(None, 1)[0])
    except (OSError, ValueError, IndexError):
        return 0


def _last_pid() -> tuple[int, int]:
    """The pid that was given out last, and how many processes and threads there are; zeros where the kernel does not tell."""
    try:
        fields = system.read_text("/proc/loadavg").split()
        return int(fields[4]), int(fields[3].partition("/")[2])
    except (OSError, ValueError, IndexError):
        return 0, 0


def _pid_max() -> int:
    try:
        return int(system.read_text("/proc/sys/kernel/pid_max"))
    except (OSError, ValueError):
        return 0
