"""Performs what the engine decided, on the modelled machine: the port `pump.Hands` of one daemon.

What takes time is a task of the daemon, dies with it, and leaves behind what it had done so far.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, assert_never

import anyio

from protocol.errors import Reason
from protocol.ids import Attempt
from runner.core.effects import (
    AbandonAttempt,
    AdmitViewer,
    AdoptAttempt,
    CollectAttempt,
    CreateWorktree,
    Effect,
    EndHungShim,
    KeepIdentity,
    Note,
    Offer,
    Persist,
    PrepareAttempt,
    PushLease,
    Redial,
    ReleaseAttempt,
    RemoveWorktree,
    ReportAgain,
    Say,
    ScanOrphans,
    SendBeat,
    SignalAttempt,
    StopAttempt,
    SweepAttempt,
    SweepRemains,
)
from runner.core.inputs import (
    AttemptExited,
    AttemptLost,
    AttemptNotPrepared,
    AttemptPrepared,
    OrphansFound,
    RemainsSwept,
    ShimSilent,
    WorktreeCreated,
    WorktreeFailed,
    WorktreeRemoved,
)
from runner.core.plans import AttemptPlan, ExitRecord, WorktreeGone, WorktreeMade
from tests.sim.host import Directory, Tree
from tests.sim.shims import ACTIONS, COLLECTED, LEASE, RELEASE, STOP, WIRE_US, Shim
from tests.sim.story import short
from tests.sim.timeline import MS_US

if TYPE_CHECKING:
    from tests.sim.daemon import Daemon

ANSWER_S = 10.0
"""A shim that was forked and says nothing for so long does not answer; one that is adopted, after ADOPT_S."""
ADOPT_S = 5.0
LOCK_WAIT_S = 2.0
LOCK_POLL_US = 50 * MS_US
CUTS_MAX = 3
HEAD = "ab" * 20


class Hold:
    """A daemon's connection to a shim."""

    def __init__(self, hands: "Hands", attempt: Attempt) -> None:
        self.hands = hands
        self.attempt = attempt
        self.shim: Shim | None = None
        self.answered: anyio.Event = anyio.Event()
        self.abandoned = False
        self.heard = False

    def close(self) -> None:
        """Let go of it."""
        if self.shim is not None:
            self.shim.lose(self)

    # --- what the shim says (in its own time; heard in ours) ------------------------------------------------------

    def welcomed(self, shim: Shim) -> None:
        """It is there."""
        self._later(self.hands.shim_welcomed, self, shim)

    def told(self, record: ExitRecord) -> None:
        """EXIT."""
        self._later(self.hands.shim_exited, self, record)

    def gone(self) -> None:
        """The connection is closed at its end."""
        self._later(self.hands.shim_gone, self)

    displaced = gone

    def _later(self, do: Any, *args: Any) -> None:
        daemon = self.hands.daemon
        daemon.host.timeline.after(daemon.owner, WIRE_US, daemon.guarded, do, *args)


@dataclass
class Words:
    """What is to be said to a shim, also by the next connection: the deadline that was said last, and stops."""

    lease: tuple[Any, ...] | None = None
    stops: list[tuple[Any, ...]] = field(default_factory=list)


class Hands:
    """See the port."""

    def __init__(self, daemon: "Daemon") -> None:
        self.daemon = daemon
        self.host = daemon.host
        self.holds: dict[Attempt, Hold] = {}
        self._words: dict[Attempt, Words] = {}
        self._cuts: dict[Attempt, int] = {}
        self._adopting: set[Attempt] = set()
        self._scanning = False

    def perform(self, effect: Effect) -> None:
        """Do it, or begin to."""
        if isinstance(effect, Note):
            self.host.witness.reached[effect.event] += 1
            return
        self.daemon.site(type(effect).__name__)
        self.host.witness.effect(self.host, self.daemon, effect)
        self._perform(effect)

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Persist() | Note() | SignalAttempt() | AdmitViewer():
                raise AssertionError("not for hands, and no user of these worlds sends signals or looks at a PTY")
            case Say(message):
                self.daemon.link.say(message)
            case SendBeat():
                self.daemon.link.beat(effect)
            case Offer(items):
                self.daemon.link.offer(items)
            case ReportAgain(out_seqs):
                self.daemon.link.report_again(out_seqs)
            case PrepareAttempt(plan, _digest, again):
                self._begin(self._prepare(plan, again))
            case ReleaseAttempt(attempt):
                self._hear(attempt, RELEASE)
            case AbandonAttempt(attempt):
                self._begin(self._abandon(attempt))
            case StopAttempt(attempt, grace_ms, by):
                self._stop(attempt, grace_ms, by)
            case PushLease():
                words = (effect.token, effect.deadline_ms, ACTIONS[effect.action], effect.grace_ms)
                self._words.setdefault(effect.attempt, Words()).lease = words
                self._hear(effect.attempt, LEASE, *words)
            case CollectAttempt(attempt):
                self._words.pop(attempt, None)
                self._hear(attempt, COLLECTED)
            case AdoptAttempt(attempt):
                self._begin(self._adopt(attempt))
            case SweepAttempt() | SweepRemains() | EndHungShim() | ScanOrphans():
                self._sweeping(effect)
            case Redial():
                self.daemon.link.redial()
            case CreateWorktree():
                self._begin(self._create(effect))
            case RemoveWorktree():
                self._begin(self._remove(effect))
            case KeepIdentity(keyset, certificate):
                self.host.keyset = keyset
                if certificate is not None:
                    self.host.certificate = certificate.value
            case _:
                assert_never(effect)

    def _sweeping(self, effect: SweepAttempt | SweepRemains | EndHungShim | ScanOrphans) -> None:
        match effect:
            case SweepAttempt(attempt):
                self._begin(self._lose(attempt))
            case SweepRemains(attempt):
                self._begin(self._sweep_remains(attempt))
            case EndHungShim(attempt):
                self._begin(self._end_hung(attempt))
            case ScanOrphans():
                if not self._scanning:
                    self._scanning = True
                    self._begin(self._scan())

    def _begin(self, work: Any) -> None:
        self.daemon.begin(work)

    def _hear(self, attempt: Attempt, *words: Any) -> None:
        hold = self.holds.get(attempt)
        if hold is not None and hold.shim is not None:
            hold.shim.hear(hold, *words)

    def _stop(self, attempt: Attempt, grace_ms: int | None, by: str) -> None:
        self._words.setdefault(attempt, Words()).stops.append((grace_ms, by))
        if attempt in self.holds:
            self._hear(attempt, STOP, grace_ms, by)
        else:
            self._begin(self._adopt(attempt))

    async def _pause(self, most_ms: int) -> None:
        await self.host.timeline.sleep(self.host.rng.randrange(200, most_ms * MS_US))

    # --- attempts -----------------------------------------------------------------------------------------------

    async def _prepare(self, plan: AttemptPlan, again: bool) -> None:
        host, attempt = self.host, plan.attempt
        await self._pause(3000 if host.rng.random() < 0.05 else 10)
        if plan.worktree_id is not None and plan.worktree_id not in host.trees:
            self._not_prepared(attempt, Reason.WORKTREE_UNKNOWN, refused=True)
            return
        if again:
            await self._clear(attempt)
        if host.full or host.broken:
            self._not_prepared(attempt, Reason.DISK_FULL if host.full else Reason.INFRA, refused=False)
            return
        if attempt in host.directories:
            self._not_prepared(attempt, Reason.DUPLICATE_ATTEMPT, refused=True)
            return
        directory = host.directories[attempt] = Directory(plan, host.boot_id, host.timeline.now_us)
        self.daemon.site("made a directory")
        await host.timeline.sleep(host.disk_us())
        directory.spec = True
        if plan.token > 1:
            host.fences[attempt.execution_id] = max(host.fences.get(attempt.execution_id, 0), plan.token)
        if host.rng.random() < host.witness.odds.fork_fails:
            await self._clear(attempt)
            self._not_prepared(attempt, Reason.INFRA, refused=False)
            return
        hold = self.holds[attempt] = Hold(self, attempt)
        shim = Shim(host, directory, hold)
        self.daemon.site("forked a shim")
        if host.rng.random() < host.witness.odds.born_hung:
            shim.hang()
            host.story.say(host.name, "%s: its shim hangs from birth", short(attempt))
        shim.greet_controller()
        with anyio.move_on_after(ANSWER_S):
            await hold.answered.wait()
            self.daemon.put(AttemptPrepared(attempt, shim.identity))
            return
        hold.abandoned = True
        shim.lose(hold)
        await self._clear(attempt)
        self._not_prepared(attempt, Reason.INFRA, refused=False)

    def _not_prepared(self, attempt: Attempt, reason: Reason, *, refused: bool) -> None:
        self.host.story.say(self.host.name, "%s: not prepared: %s", short(attempt), reason)
        self.daemon.put(AttemptNotPrepared(attempt, reason, "", refused=refused))

    async def _clear(self, attempt: Attempt) -> None:
        directory = self.host.directories.get(attempt)
        if directory is None:
            return
        with anyio.move_on_after(LOCK_WAIT_S):
            while directory.shim is not None:
                await self.host.timeline.sleep(LOCK_POLL_US)
        self.host.witness.cleared(self.host, attempt, directory)
        self.host.directories.pop(attempt, None)

    async def _abandon(self, attempt: Attempt) -> None:
        self._words.pop(attempt, None)
        self._drop(attempt)
        await self._clear(attempt)

    def _drop(self, attempt: Attempt) -> None:
        hold = self.holds.pop(attempt, None)
        if hold is not None:
            hold.abandoned = True
            hold.close()

    async def _adopt(self, attempt: Attempt) -> None:
        if attempt in self.holds or attempt in self._adopting:
            return
        self._adopting.add(attempt)
        await self._pause(5)
        self._adopting.discard(attempt)
        directory = self.host.directories.get(attempt)
        shim = None if directory is None else directory.shim
        if shim is None:
            await self._end_by_files(attempt)
            return
        hold = self.holds[attempt] = Hold(self, attempt)
        shim.greet(hold)
        with anyio.move_on_after(ADOPT_S):
            await hold.answered.wait()
            return
        self._drop(attempt)
        if directory is not None and directory.shim is not None:
            self.daemon.put(ShimSilent(attempt))
        else:
            await self._end_by_files(attempt)

    def shim_welcomed(self, hold: Hold, shim: Shim) -> None:
        """It says hello: whatever was to be said to it is said."""
        hold.shim = shim
        hold.answered.set()
        words = self._words.get(hold.attempt, Words())
        if words.lease is not None:
            shim.hear(hold, LEASE, *words.lease)
        for stop in words.stops:
            shim.hear(hold, STOP, *stop)

    def shim_exited(self, hold: Hold, record: ExitRecord) -> None:
        """It told its end."""
        if hold.abandoned or hold.heard or self.holds.get(hold.attempt) is not hold:
            return
        hold.heard = True
        self.daemon.site("heard of an end")
        self.daemon.put(AttemptExited(hold.attempt, record))

    def shim_gone(self, hold: Hold) -> None:
        """Its end of the connection is closed: before an end was told, the files say what happened."""
        if self.holds.get(hold.attempt) is not hold:
            return
        del self.holds[hold.attempt]
        if not (hold.abandoned or hold.heard or not hold.answered.is_set()):
            self._begin(self._end_by_files(hold.attempt))

    async def _end_by_files(self, attempt: Attempt) -> None:
        """A connection broke before the end: what the files say, or another connection, unless that never lasts."""
        end = await self._by_files(attempt, Reason.SHIM_LOST)
        if end is not None:
            self.daemon.put(end)
            return
        self._cuts[attempt] = self._cuts.get(attempt, 0) + 1
        if self._cuts[attempt] > CUTS_MAX:
            self.daemon.put(ShimSilent(attempt))
        else:
            await self._adopt(attempt)

    async def _by_files(self, attempt: Attempt, reason: Reason) -> AttemptExited | AttemptLost | None:
        """The end of an attempt without a shim, and of what is left of it; None while somebody holds its lock."""
        await self._pause(20)
        directory = self.host.directories.get(attempt)
        with anyio.move_on_after(LOCK_WAIT_S):
            while directory is not None and directory.shim is not None:
                await self.host.timeline.sleep(LOCK_POLL_US)
        if directory is not None and directory.shim is not None:
            return None
        if directory is not None and directory.exit is not None:
            return AttemptExited(attempt, directory.exit)
        self.host.witness.swept(self.host, attempt)
        swept = self.host.sweep(attempt)
        await self._pause(200)
        return AttemptLost(attempt, reason, swept)

    # --- what is left -------------------------------------------------------------------------------------------

    async def _lose(self, attempt: Attempt) -> None:
        end = await self._by_files(attempt, Reason.SHIM_LOST)
        self.daemon.put(ShimSilent(attempt) if end is None else end)

    async def _sweep_remains(self, attempt: Attempt) -> None:
        self.host.witness.swept(self.host, attempt)
        swept = self.host.sweep(attempt)
        await self._pause(200)
        self.daemon.put(RemainsSwept(attempt, swept))

    async def _end_hung(self, attempt: Attempt) -> None:
        directory = self.host.directories.get(attempt)
        if directory is not None and directory.shim is not None:
            self.host.witness.hung_ended(self.host, directory.shim)
            directory.shim.end()
        self._drop(attempt)
        end = await self._by_files(attempt, Reason.SHIM_HUNG)
        self.daemon.put(ShimSilent(attempt) if end is None else end)

    async def _scan(self) -> None:
        await self._pause(20)
        self._scanning = False
        self.daemon.put(OrphansFound(self.host.orphans()))

    # --- worktrees ----------------------------------------------------------------------------------------------

    async def _create(self, effect: CreateWorktree) -> None:
        host, plan = self.host, effect.plan
        await self._pause(300)
        there = host.trees.get(plan.worktree_id)
        if there is not None and there.cmd_id != plan.cmd_id:
            reason = Reason.WORKTREE_FOREIGN if there.foreign else Reason.WORKTREE_EXISTS
            self.daemon.put(WorktreeFailed(effect.digest, reason, "", refused=True))
            return
        if host.full or host.broken:
            reason = Reason.DISK_FULL if host.full else Reason.INFRA
            host.trees.pop(plan.worktree_id, None)
            self.daemon.put(WorktreeFailed(effect.digest, reason, "", refused=False))
            return
        if there is None:
            host.witness.tree_made(host, plan.worktree_id, plan.cmd_id)
            there = host.trees[plan.worktree_id] = Tree(plan.cmd_id, plan.token)
            self.daemon.site("made half a worktree")
        await self._pause(300)
        there.half = False
        self.daemon.site("made a worktree")
        made = WorktreeMade(path=f"/state/wt/{plan.worktree_id}", head=HEAD, branch=plan.branch)
        self.daemon.put(WorktreeCreated(effect.digest, made))

    async def _remove(self, effect: RemoveWorktree) -> None:
        host, plan = self.host, effect.plan
        await self._pause(300)
        there = host.trees.get(plan.worktree_id)
        if plan.cmd_id in host.trash:
            self._removed(effect, was_dirty=False)
            return
        if there is None or there.foreign:
            reason = Reason.WORKTREE_UNKNOWN if there is None else Reason.WORKTREE_FOREIGN
            self.daemon.put(WorktreeFailed(effect.digest, reason, "", refused=True))
            return
        if there.dirty and not plan.force:
            self.daemon.put(WorktreeFailed(effect.digest, Reason.WORKTREE_DIRTY, "", refused=True))
            return
        host.witness.tree_removed(host, plan.worktree_id, plan.cmd_id)
        del host.trees[plan.worktree_id]
        host.trash.add(plan.cmd_id)
        self.daemon.site("removed a worktree")
        await self._pause(100)
        self._removed(effect, was_dirty=there.dirty)

    def _removed(self, effect: RemoveWorktree, *, was_dirty: bool) -> None:
        gone = WorktreeGone(head=HEAD, branch=None, was_dirty=was_dirty)
        self.daemon.put(WorktreeRemoved(effect.digest, gone))
