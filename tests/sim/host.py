"""A runner's machine: clocks, disk, processes, attempt directories and worktrees; what survives a daemon, and what survives a power cut.

Theory of operation. Everything of the machine belongs to owners of the timeline, so that suspend, power and signals are one act each.
`Directory` is what `docs/shim.md` §1 says of an attempt's files: the spec is durable, `meta.json` is not (within one boot it tells the
truth, after a power cut any earlier phase or nothing), `exit.json` is once the shim says so.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

from protocol.envelope import Verified
from protocol.identity import Certificate
from protocol.ids import Attempt
from protocol.keyset import Keyset
from runner.core.inputs import Now
from runner.core.plans import AttemptPlan, ExitRecord, Headroom, Orphan, Phase, Swept
from tests.sim.disk import JournalDisk
from tests.sim.story import Story
from tests.sim.timeline import MS_US, SECOND_US, Handle, Owner, Timeline

if TYPE_CHECKING:
    from tests.sim.link import Network
    from tests.sim.shims import Shim
    from tests.sim.witness import Witness

TERM, KILL = 15, 9
GIB = 1 << 30
META_ORDER = (Phase.NONE, Phase.READY, Phase.RELEASED, Phase.RUNNING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What a child does, if nobody hinders it."""

    run_ms: int
    code: int = 0
    stubborn: bool = False
    """It ignores a TERM."""
    polite: bool = False
    """It answers a TERM by exiting with 0."""
    fails: str | None = None
    """It cannot be started, for this reason."""
    escapees: tuple[tuple[int, bool], ...] = ()
    """Processes it leaves: for how long (ms) they live, and whether they carry the cookie."""


class Proc:
    """A process of an attempt: the child, or what escaped from it."""

    def __init__(
        self,
        host: "Host",
        attempt: Attempt,
        run_ms: int,
        *,
        cookie: bool = True,
        stubborn: bool = False,
        polite: bool = False,
        code: int = 0,
        ended: Callable[["Proc"], None] = lambda _proc: None,
    ) -> None:
        self.host = host
        self.attempt = attempt
        self.pid = host.next_pid()
        self.cookie = cookie
        self.stubborn = stubborn
        self.polite = polite
        self.alive = True
        self.frozen = False
        self.status: tuple[int | None, int | None] = (None, None)
        """Code and signal."""
        self._code = code
        self._ended = ended
        self._termed = False
        self._left_us = run_ms * MS_US
        self._due: Handle | None = None
        host.procs[self.pid] = self
        self._go()

    def _go(self) -> None:
        self._due = self.host.timeline.after(self.host.payload, self._left_us, self._end, self._code, None)

    def _end(self, code: int | None, signal: int | None) -> None:
        if not self.alive:
            return
        self.alive = False
        self.status = (code, signal)
        if self._due is not None:
            self._due.cancel()
        self.host.procs.pop(self.pid, None)
        self.host.witness.changed(self.host, self.attempt)
        self._ended(self)

    def signal(self, number: int) -> None:
        """TERM or KILL."""
        if not self.alive:
            return
        if number == KILL:
            self._end(None, KILL)
        elif self.frozen:
            self._termed = True
        elif not self.stubborn:
            delay_us = self.host.rng.randrange(300) * MS_US
            code, by = (0, None) if self.polite else (None, TERM)
            self.host.timeline.after(self.host.payload, delay_us, self._end, code, by)

    def freeze(self) -> None:
        """SIGSTOP, or the cgroup's freezer."""
        if self.alive and not self.frozen and self._due is not None:
            self.frozen = True
            self._left_us = max(self._due.when_us - self.host.timeline.now_us, 0)
            self._due.cancel()
            self.host.witness.changed(self.host, self.attempt)

    def thaw(self) -> None:
        """SIGCONT."""
        if self.alive and self.frozen:
            self.frozen = False
            self._go()
            self.host.witness.changed(self.host, self.attempt)
            if self._termed:
                self._termed = False
                self.signal(TERM)


@dataclass
class Directory:
    """The files of an attempt."""

    plan: AttemptPlan
    boot_id: str
    made_us: int
    phase: Phase = Phase.NONE
    spec: bool = False
    exit: ExitRecord | None = None
    shim: "Shim | None" = None
    """Who holds the lock."""


@dataclass
class Tree:
    """A managed worktree on the disk."""

    cmd_id: str
    token: int
    half: bool = True
    dirty: bool = False
    foreign: bool = False


@dataclass
class Host:
    """One machine."""

    name: str
    timeline: Timeline
    rng: Random
    story: Story
    witness: "Witness"
    network: "Network"
    certificate: Certificate
    keyset: Verified[Keyset]
    programs: dict[str, Program]
    """By the second argument of the command."""
    journal: JournalDisk = field(default_factory=JournalDisk)
    wall_offset_ms: int = 0
    boots: int = 1
    boot_us: int = -3600 * SECOND_US
    slept_us: int = 0
    """How much of this boot the machine has slept."""
    awake: bool = True
    full: bool = False
    """No room for anything but what was reserved."""
    broken: bool = False
    """The disk answers with errors."""
    lossy: bool = False
    """Its network loses and reorders frames."""
    cgroup: bool = False
    """Payloads are in cgroups of their own: nothing escapes."""
    disk_ms: int = 2
    """A commit or fsync takes up to this long."""
    procs: dict[int, Proc] = field(default_factory=dict)
    directories: dict[Attempt, Directory] = field(default_factory=dict)
    fences: dict[str, int] = field(default_factory=dict)
    trees: dict[str, Tree] = field(default_factory=dict)
    trash: set[str] = field(default_factory=set)
    """Removals (by cmd_id) that were done."""
    owners: set[Owner] = field(default_factory=set)
    payload: Owner = field(init=False)
    _pids: int = 1000
    _slept_from_us: int = 0
    _held: set[Owner] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.payload = self.owner("payload")

    # --- clocks -------------------------------------------------------------------------------------------------

    @property
    def boot_id(self) -> str:
        """This boot."""
        return f"{self.name}-boot-{self.boots}"

    @property
    def boot_ms(self) -> int:
        """CLOCK_BOOTTIME."""
        return (self.timeline.now_us - self.boot_us) // MS_US

    @property
    def slept_ms(self) -> int:
        """CLOCK_BOOTTIME - CLOCK_MONOTONIC."""
        return self.slept_us // MS_US

    def now(self) -> Now:
        """Both clocks that the engine is told."""
        return Now(self.timeline.now_us // MS_US + self.wall_offset_ms, self.boot_ms)

    def disk_us(self) -> int:
        """How long this fsync takes."""
        return self.rng.randrange(100, self.disk_ms * MS_US)

    # --- processes ----------------------------------------------------------------------------------------------

    def next_pid(self) -> int:
        """A number for a process; they come round after a while, as on any machine."""
        self._pids = self._pids + 1 if self._pids < 1200 else 1000
        return self._pids if self._pids not in self.procs else self.next_pid()

    def owner(self, name: str) -> Owner:
        """A process of ours on this machine."""
        owner = Owner(f"{self.name} {name}")
        self.owners.add(owner)
        return owner

    def living(self, attempt: Attempt) -> list[Proc]:
        """The living processes of an attempt."""
        return [proc for proc in self.procs.values() if proc.attempt == attempt]

    def seen(self, attempt: Attempt) -> list[Proc]:
        """Those that can be found without the shim."""
        return [proc for proc in self.living(attempt) if proc.cookie or self.cgroup]

    def sweep(self, attempt: Attempt) -> Swept:
        """End what can be found."""
        found = self.seen(attempt)
        for proc in found:
            proc.signal(KILL)
        return Swept(found=len(found), signalled=len(found), remaining=len(self.seen(attempt)))

    def orphans(self) -> tuple[Orphan, ...]:
        """One look at all processes that carry a cookie."""
        attempts = dict.fromkeys(proc.attempt for proc in self.procs.values() if proc.cookie or self.cgroup)
        found = []
        for attempt in attempts:
            directory = self.directories.get(attempt)
            guarded = directory is not None and directory.shim is not None
            found.append(Orphan(name=attempt.name, processes=len(self.seen(attempt)), shim_alive=guarded))
        return tuple(found)

    # --- disk ---------------------------------------------------------------------------------------------------

    def headroom(self) -> Headroom:
        """What the daemon measures."""
        return Headroom(disk_free=GIB if self.full else 100 * GIB, disk_total=200 * GIB)

    # --- sleep and power ----------------------------------------------------------------------------------------

    def suspend(self) -> None:
        """Close the lid: nothing runs."""
        if not self.awake:
            return
        self.awake = False
        self._slept_from_us = self.timeline.now_us
        self._held = {owner for owner in self.owners if owner.alive and owner.state == 0}
        for owner in self._held:
            self.timeline.hold(owner)
        self.network.lost_touch()
        self.story.say(self.name, "sleeps")

    def resume(self) -> int:
        """Open it; returns for how long it slept (ms)."""
        if self.awake:
            return 0
        self.awake = True
        slept_us = self.timeline.now_us - self._slept_from_us
        self.slept_us += slept_us
        self.timeline.wake({owner for owner in self._held if owner.alive}, slept_us)
        self.witness.woke(self)
        self.story.say(self.name, "wakes after %.1f s", slept_us / SECOND_US)
        for directory in self.directories.values():
            if directory.shim is not None:
                # Its poll counts a clock that stood still; with a deadline it looks every two seconds.
                directory.shim.look_soon()
        return slept_us // MS_US

    def lose_power(self) -> None:
        """Everything that runs is gone, and what was not synced, by chance."""
        self.awake = True
        for owner in self.owners:
            owner.die()
        self.owners.clear()
        self._held.clear()
        attempts = dict.fromkeys(proc.attempt for proc in self.procs.values())
        for proc in list(self.procs.values()):
            proc.alive = False
        self.procs.clear()
        for attempt in attempts:
            self.witness.changed(self, attempt)
        for attempt, directory in list(self.directories.items()):
            directory.shim = None
            self._tear(attempt, directory)
        self.boots += 1
        self.boot_us = self.timeline.now_us
        self.slept_us = 0
        self.payload = self.owner("payload")
        self.network.lost_touch()

    def _tear(self, attempt: Attempt, directory: Directory) -> None:
        """`meta.json` is replaced and never synced; a directory whose making was not synced may be gone whole."""
        reached = META_ORDER.index(directory.phase)
        directory.phase = META_ORDER[self.rng.randint(0, reached)]
        if not directory.spec and directory.exit is None and self.rng.random() < 0.5:
            del self.directories[attempt]
