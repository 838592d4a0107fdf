"""A machine whose directories, processes and journal survive the daemon, and the daemon that is on it; test_engine.py has the rules."""

from dataclasses import dataclass
from typing import Any, Final

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize

from protocol.errors import Reason
from protocol.execution import AttemptState
from protocol.ids import Attempt, Digest
from protocol.messages import ItemKind
from protocol.receipt import Outcome
from protocol.replay import Mark
from runner.core.effects import (
    AbandonAttempt,
    AdmitViewer,
    AdoptAttempt,
    CollectAttempt,
    CreateWorktree,
    Effect,
    EndHungShim,
    KeepIdentity,
    Persist,
    PrepareAttempt,
    PushLease,
    ReleaseAttempt,
    RemoveWorktree,
    ScanOrphans,
    SendBeat,
    StopAttempt,
    SweepAttempt,
    SweepRemains,
)
from runner.core.inputs import AttemptExited, AttemptLost, Input, OrphansFound, RemainsSwept, ShimSilent
from runner.core.journaling import PutCommand, Write
from runner.core.plans import Admission, ExitRecord, LeaseAction, Observed, Orphan, Phase, Swept
from tests.support.engine import (
    JournalModel,
    World,
    a_policy,
    an_unreleased_exit,
    opened_receipt,
    opened_settlement,
)

PTYS: Final = "ex_2"
"""The execution whose attempts are PTYs."""
BEATS_MAX: Final = 3
"""Beats whose answers may still come."""


@dataclass
class Directory:
    """What the files of an attempt show, whether its child runs, and what its shim was told."""

    phase: Phase = Phase.NONE
    lock_held: bool = False
    exit: ExitRecord | None = None
    same_boot: bool = True
    living: bool = False
    hung: bool = False
    """Its shim holds the lock and does nothing: it neither hears nor tells."""
    lease: tuple[int, int, LeaseAction] | None = None
    unheard: tuple[int, int, LeaseAction] | None = None
    """Told while it hung: it waits in its socket."""

    @property
    def guarded(self) -> bool:
        """A shim of this boot is there."""
        return self.lock_held and self.same_boot


@dataclass
class WatchedJournal(JournalModel):
    """Tells which commands became durable while the machine was closed."""

    machine: "Machine | None" = None

    def apply(self, write: Write) -> None:
        """See the model."""
        super().apply(write)
        if isinstance(write, PutCommand) and self.machine is not None and self.machine.admission is not Admission.OPEN:
            self.machine.shut_out.add(write.row.digest)


class Machine(RuleBasedStateMachine):
    """One daemon after the other, the directories they leave, and everything that was ever signed."""

    @initialize(concurrent_max=st.sampled_from([1, 2, 8]))
    def begin(self, concurrent_max: int) -> None:
        """A machine with nothing on it."""
        self.policies = (a_policy(concurrent_max=concurrent_max), a_policy(kinds=frozenset(), concurrent_max=0))
        self.world = World(policy=self.policies[0], journal=WatchedJournal(machine=self))
        self.ctl: list[bytes] = []
        """Signed for this incarnation, in order."""
        self.stale: list[bytes] = []
        self.directories: dict[Attempt, Directory] = {}
        self.connected: set[Attempt] = set()
        self.preparing: list[PrepareAttempt] = []
        self.trees: list[CreateWorktree | RemoveWorktree] = []
        self.viewers: list[AdmitViewer] = []
        """On their way in."""
        self.ends: list[Input] = []
        """On their way to the daemon: ends, silences, sweeps of remains, looks at all processes."""
        self.sweeps: list[Attempt] = []
        self.starts: dict[Attempt, int] = {}
        self.stopped_unborn: set[Attempt] = set()
        """Stopped, durably, before their process began."""
        self.highest: dict[int, int] = {}
        self.tokens = {"ex_1": 0, "ex_2": 0}
        """Of the newest attempt that was signed, by execution."""
        self.fuse: int | None = None
        self.deaths = 0
        self.meant: dict[Digest, Attempt] = {}
        """What each start is to start."""
        self.lease_tokens = {"ex_1": 0, "ex_2": 0}
        self.granted: dict[tuple[str, int], int] = {}
        """Until when (wall) the plane has granted an execution under a token: at signing, and by each renewal."""
        self.known_leases: set[tuple[str, int]] = set()
        """Those the runner knew in this boot or an earlier one: a reboot ends them."""
        self.given_up: set[tuple[str, int]] = set()
        """Released by a signed word before anything ran under them."""
        self.beats: list[tuple[int, int, tuple[tuple[str, int], ...]]] = []
        """Sent in this session: BOOTTIME, wall time, and the leases that were asked for."""
        self.told_to_end: set[Attempt] = set()
        self.admission = self.kept = Admission.OPEN
        self.shut_out: set[Digest] = set()
        """Starts that arrived while the machine was closed."""

    # --- turns --------------------------------------------------------------------------------------------------

    def turn(self, *inputs: Input) -> bool:
        """One turn of the pump; False when the daemon died before its commit."""
        effects = [effect for happened in inputs for effect in self.world.engine.step(happened, self.world.now)]
        return self.carry_out(effects)

    def carry_out(self, effects: list[Effect]) -> bool:
        """Commit, then do; a burning fuse ends the daemon after so many effects, or (-1) before the commit."""
        fuse, self.fuse = self.fuse, None
        if fuse == -1 and not any(isinstance(effect, KeepIdentity) for effect in effects):
            self.die()
            return False
        for effect in effects:
            if isinstance(effect, Persist):
                for write in effect.writes:
                    self.world.journal.apply(write)
        deeds = [effect for effect in effects if not isinstance(effect, Persist)]
        kept = len(deeds) if fuse is None or any(isinstance(deed, KeepIdentity) for deed in deeds) else fuse
        for effect in deeds[:kept]:
            self.perform(effect)
        if fuse is not None:
            self.die()
        return True

    def perform(self, effect: Effect) -> None:
        """What the machine does, or begins to do."""
        match effect:
            case PrepareAttempt():
                assert effect.digest not in self.shut_out, "a closed machine takes no new work"
                self.preparing.append(effect)
            case ReleaseAttempt(attempt):
                self.release(attempt)
            case AbandonAttempt(attempt):
                found = self.directories.pop(attempt, None)
                assert found is None or not found.living, "what runs is never abandoned"
            case AdoptAttempt(attempt):
                self.adopt(attempt)
            case StopAttempt(attempt):
                self.told_to_end.add(attempt)
            case PushLease(attempt, token, deadline_ms, action):
                self.push(attempt, token, deadline_ms, action)
            case SweepAttempt(attempt):
                found = self.directories.get(attempt)
                assert found is None or (found.same_boot and not found.lock_held), "what is guarded is never swept"
                self.sweeps.append(attempt)
            case SweepRemains(attempt):
                row = self.world.journal.attempts[attempt]
                assert row.state is AttemptState.SETTLED, "only what is settled is swept unasked"
                self.ends.append(RemainsSwept(attempt, self.swept(attempt)))
            case EndHungShim(attempt):
                self.end_hung(attempt)
            case CollectAttempt(attempt):
                found = self.directories.get(attempt)
                if found is not None and not found.living and not found.hung:
                    found.lock_held = False
            case ScanOrphans():
                alive = [(attempt, its) for attempt, its in self.directories.items() if its.living]
                orphans = [Orphan(name=attempt.name, processes=1, shim_alive=its.lock_held) for attempt, its in alive]
                self.ends.append(OrphansFound(tuple(orphans)))
            case SendBeat(leases=leases):
                asked = tuple((held.res.removeprefix("exec:"), held.token) for held in leases)
                self.beats = [*self.beats, (self.world.now.boot_ms, self.world.now.wall_ms, asked)][-BEATS_MAX:]
            case CreateWorktree() | RemoveWorktree():
                self.trees.append(effect)
            case AdmitViewer(attempt):
                row = self.world.journal.attempts[attempt]
                assert attempt.execution_id == PTYS, "only a PTY has viewers"
                assert row.state not in (AttemptState.INTENT, AttemptState.SETTLED), "only what lives is looked at"
                self.viewers.append(effect)
            case _:
                pass

    def release(self, attempt: Attempt) -> None:
        """The barrier opens: from here on the attempt runs."""
        found = self.directories.get(attempt)
        if found is None or found.phase is not Phase.READY or not found.lock_held:
            return
        assert attempt in self.world.journal.prepared, "a process runs only behind PREPARED"
        assert attempt not in self.stopped_unborn, "nothing runs after it was stopped"
        self.starts[attempt] = self.starts.get(attempt, 0) + 1
        assert self.starts[attempt] == 1, "an attempt starts once"
        self.judge_lease(attempt, found)
        found.phase, found.living = Phase.RUNNING, True
        others = [other for other, its in self.directories.items() if its.living and other != attempt]
        assert all(other.execution_id != attempt.execution_id for other in others), "one process per execution"
        known = [other for other in self.world.journal.attempts if other.execution_id == attempt.execution_id]
        assert max(known, key=lambda other: other.start_token) == attempt, "none begins behind a later one"

    def judge_lease(self, attempt: Attempt, found: Directory) -> None:
        """By the plane's own record of what it granted."""
        lease = self.world.journal.attempts[attempt].lease
        if lease is None or lease.on_loss == "continue":
            return
        grant = (attempt.execution_id, lease.token)
        assert self.granted[grant] > self.world.now.wall_ms, "nothing begins under a lease that is over"
        assert grant not in self.given_up, "nothing begins under a lease that was given up"
        assert found.lease is not None and found.lease[0] == lease.token, "its shim knows its lease before it begins"

    def push(self, attempt: Attempt, token: int, deadline_ms: int, action: LeaseAction) -> None:
        """A shim is told a lease: never a lower token, never longer than the plane has granted it."""
        left_ms = deadline_ms - self.world.now.boot_ms
        until = self.granted[attempt.execution_id, token]
        assert left_ms <= 0 or self.world.now.wall_ms + left_ms <= until, "no lease outlives its grant"
        found = self.directories.get(attempt)
        if found is None or not found.guarded or attempt not in self.connected:
            return
        assert found.lease is None or token >= found.lease[0], "a shim is never told a lower token"
        if found.hung:
            found.unheard = (token, deadline_ms, action)
        else:
            found.lease = (token, deadline_ms, action)

    def adopt(self, attempt: Attempt) -> None:
        """Connect, and hear its end; who does not answer is silent."""
        found = self.directories.get(attempt)
        if found is not None and found.guarded and found.hung:
            self.connected.discard(attempt)
            self.ends.append(ShimSilent(attempt))
            return
        self.connected.add(attempt)
        self.tell_end(attempt)

    def tell_end(self, attempt: Attempt) -> None:
        """A shim we are connected to tells its end; one that is gone without a word is swept, and lost."""
        found = self.directories.get(attempt)
        if attempt not in self.connected or found is None or found.hung:
            return
        if found.exit is not None:
            self.ends.append(AttemptExited(attempt, found.exit))
        elif not found.lock_held:
            self.ends.append(AttemptLost(attempt, Reason.SHIM_LOST, self.swept(attempt)))

    def end_hung(self, attempt: Attempt) -> None:
        """Only what was told to end, or is over: KILL its shim, then sweep."""
        row, found = self.world.journal.attempts[attempt], self.directories.get(attempt)
        lost = row.lease is not None and row.lease.state == "lost" and row.lease.on_loss == "stop"
        wanted = attempt in self.told_to_end or lost or row.state is AttemptState.SETTLED
        assert wanted, "a shim is ended only where its end was signed, or its lease is lost"
        assert found is None or found.same_boot, "another boot's processes are never signalled"
        if found is None or found.exit is not None:
            self.tell_end(attempt)
            return
        found.lock_held = found.hung = False
        self.ends.append(AttemptLost(attempt, Reason.SHIM_HUNG, self.swept(attempt)))

    def swept(self, attempt: Attempt) -> Swept:
        """Everything that carries its cookie is ended."""
        found = self.directories.get(attempt)
        count = 1 if found is not None and found.living else 0
        if found is not None:
            assert found.same_boot or not count, "another boot's processes are never signalled"
            found.living = False
        return Swept(found=count, signalled=count, remaining=0)

    # --- the daemon dies ----------------------------------------------------------------------------------------

    def die(self, *, reboot: bool = False, left: int = 0) -> None:
        """What was only in its memory is gone; shims behind their barriers go; another daemon takes over."""
        self.deaths += 1
        self.admission = self.kept
        for number, wanted in enumerate(self.preparing):
            self.leave_half_prepared(wanted, (left + number) % 4)
        self.preparing, self.trees, self.ends, self.sweeps, self.beats, self.viewers = [], [], [], [], [], []
        self.connected.clear()
        for found in self.directories.values():
            found.unheard = None
            if found.lock_held and found.phase in (Phase.NONE, Phase.READY):
                found.lock_held = False
                found.exit = an_unreleased_exit() if left % 2 else None
        if reboot:
            self.reboot()
        self.world.engine = self.world._new_engine()
        observed = [
            Observed(
                attempt=attempt,
                same_boot=its.same_boot,
                phase=its.phase,
                lock_held=its.lock_held,
                exit=its.exit,
                shim_answers=not its.hung,
                child_alive=its.living,
            )
            for attempt, its in self.directories.items()
        ]
        self.carry_out(self.world.engine.recover(observed, self.world.now))

    def reboot(self) -> None:
        """Nothing is alive, BOOTTIME starts anew, and of the leases the runner knew nothing holds any more."""
        for found in self.directories.values():
            found.same_boot, found.living, found.lock_held, found.hung = False, False, False, False
        for row in self.world.journal.attempts.values():
            if row.lease is not None:
                self.granted[row.attempt.execution_id, row.lease.token] = 0
        self.world.boot_id += "+"
        self.world.now = type(self.world.now)(self.world.now.wall_ms + 30_000, 1_000)

    def leave_half_prepared(self, wanted: PrepareAttempt, how: int) -> None:
        """Nothing yet, a bare directory, or a shim behind its barrier."""
        attempt = wanted.plan.attempt
        if how == 0 or (attempt in self.directories and not wanted.again):
            return
        phase = Phase.NONE if how == 1 else Phase.READY
        self.directories[attempt] = Directory(phase=phase, lock_held=phase is Phase.READY)

    # --- what is known --------------------------------------------------------------------------------------

    @property
    def consumed(self) -> int:
        """How much of the ordered stream is durable."""
        return self.world.journal.marks.get(self.world.inc, Mark()).hw

    @property
    def living(self) -> list[Attempt]:
        """Attempts whose process runs."""
        return [attempt for attempt, found in self.directories.items() if found.living]

    @property
    def heard(self) -> list[Attempt]:
        """Those whose shim would tell of an end."""
        return [
            attempt
            for attempt in self.living
            if self.directories[attempt].guarded and not self.directories[attempt].hung
        ]

    def statements(self) -> tuple[dict[Digest, Outcome], set[Attempt]]:
        """Everything that was ever signed, as a plane would read it."""
        outcomes: dict[Digest, Outcome] = {}
        settled: set[Attempt] = set()
        for item in self.world.journal.items.values():
            if item.kind is ItemKind.RECEIPT:
                receipt = _receipt(item)
                assert receipt[0] not in outcomes, "one receipt"
                outcomes[receipt[0]] = receipt[1]
            elif item.kind is ItemKind.SETTLEMENT:
                attempt, digest = _settlement(item)
                assert attempt not in settled, "one settlement"
                assert outcomes[digest] is Outcome.ACCEPTED, "settled means accepted"
                settled.add(attempt)
        return outcomes, settled


_RECEIPTS: dict[str, tuple[Digest, Outcome]] = {}
_SETTLEMENTS: dict[str, tuple[Attempt, Digest]] = {}


def _receipt(item: Any) -> tuple[Digest, Outcome]:
    """Verified once per body: the invariants look at all of them after every rule."""
    if item.body not in _RECEIPTS:
        said = opened_receipt(item)
        _RECEIPTS[item.body] = (Digest(said.cmd_digest), said.outcome)
    return _RECEIPTS[item.body]


def _settlement(item: Any) -> tuple[Attempt, Digest]:
    """As `_receipt`."""
    if item.body not in _SETTLEMENTS:
        said = opened_settlement(item)
        _SETTLEMENTS[item.body] = (said.attempt, Digest(said.cmd_digest))
    return _SETTLEMENTS[item.body]
