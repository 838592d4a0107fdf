"""The engine against a machine: processes, directories and a journal that survive the daemon, in any order of events.

The daemon may die in every turn: before its commit, or after it with only some of its effects done. A new one is built from the
journal's image and from what the machine's directories show. What must hold is stated from the machine's own record.

Hand mutants that were tried, each in the code as it is, and how each one fails:

1. `Attempts.prepared` releases before it journals PREPARED (Persist left out): "a process runs only behind PREPARED".
2. `Attempts.exited` looks up the newest attempt of the execution instead of the named one: two processes of one execution, or a
   settlement that is missing at the end.
3. `Attempts.prepared` does not look at tombstones: "nothing runs after it was stopped".
4. `takeback._hold` claims nothing: two processes of one execution after a crash.
5. `recovery._begun` takes a free lock for never released (no look at the phase): "an attempt starts once".
6. `Engine._resume` skips commands without an effect yet (recovers attempts only): a consumed command without a receipt at the end.
7. `Ledger.bury` keeps its tombstone in memory only (no PutTombstone in `_bury`): "nothing runs after it was stopped", by a crash.
8. `takeback._caught_up` does nothing: the daemon stumbles at its start, or a settlement without a receipt.
9. `Attempts.admit` ends no predecessor: its successor is still waiting when the machine has come to rest.
10. `Engine._session_up` keeps the old mark in a new incarnation: commands of the new one are never consumed.
"""

from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from protocol.errors import Reason
from protocol.execution import AttemptState
from protocol.ids import Attempt, Digest
from protocol.messages import Answer, ItemKind
from protocol.receipt import Outcome
from protocol.replay import Mark
from protocol.session import ItemsAnswered
from runner.core.effects import (
    AbandonAttempt,
    AdoptAttempt,
    CollectAttempt,
    CreateWorktree,
    Effect,
    KeepIdentity,
    Persist,
    PrepareAttempt,
    ReleaseAttempt,
    RemoveWorktree,
    SweepAttempt,
)
from runner.core.inputs import (
    AttemptExited,
    AttemptLost,
    AttemptNotPrepared,
    AttemptPrepared,
    EnvelopeReceived,
    Input,
    OwnerStop,
    PolicyChanged,
    SessionDown,
    Tick,
    WorktreeCreated,
    WorktreeFailed,
    WorktreeRemoved,
)
from runner.core.plans import ExitRecord, Observed, Phase, Swept, WorktreeGone
from tests.support.builders import an_attempt
from tests.support.engine import (
    SHIM,
    World,
    a_made,
    a_policy,
    an_exit,
    an_unreleased_exit,
    opened_receipt,
    opened_settlement,
)

EXECUTIONS = st.sampled_from(["ex_1", "ex_2"])
TOKENS = st.integers(1, 4)
WORKTREES = st.sampled_from(["wt_1", "wt_2"])
GONE = WorktreeGone(head=None, branch=None, was_dirty=False)
REST_TURNS_MAX = 400
"""Turns after which a machine that has not come to rest never will."""


@dataclass
class Directory:
    """What the files of an attempt show, and whether its child runs."""

    phase: Phase = Phase.NONE
    lock_held: bool = False
    exit: ExitRecord | None = None
    same_boot: bool = True
    living: bool = False


class EngineMachine(RuleBasedStateMachine):
    """One daemon after the other on one machine, commanded by one plane."""

    @initialize(concurrent_max=st.sampled_from([1, 2, 8]))
    def begin(self, concurrent_max: int) -> None:
        """A machine with nothing on it."""
        self.policies = (a_policy(concurrent_max=concurrent_max), a_policy(kinds=frozenset(), concurrent_max=0))
        self.world = World(policy=self.policies[0])
        self.ctl: list[bytes] = []
        """Signed for this incarnation, in order."""
        self.stale: list[bytes] = []
        self.directories: dict[Attempt, Directory] = {}
        self.connected: set[Attempt] = set()
        self.preparing: list[PrepareAttempt] = []
        self.trees: list[CreateWorktree | RemoveWorktree] = []
        self.ends: list[AttemptExited | AttemptLost] = []
        """On their way to the daemon."""
        self.sweeps: list[Attempt] = []
        self.starts: dict[Attempt, int] = {}
        self.stopped_unborn: set[Attempt] = set()
        """Stopped, durably, before their process began."""
        self.highest: dict[int, int] = {}
        self.fuse: int | None = None

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
                self.preparing.append(effect)
            case ReleaseAttempt(attempt):
                self.release(attempt)
            case AbandonAttempt(attempt):
                found = self.directories.pop(attempt, None)
                assert found is None or not found.living, "what runs is never abandoned"
            case AdoptAttempt(attempt):
                self.connected.add(attempt)
                self.tell_end(attempt)
            case SweepAttempt(attempt):
                self.sweeps.append(attempt)
            case CollectAttempt(attempt):
                found = self.directories.get(attempt)
                if found is not None and not found.living:
                    found.lock_held = False
            case CreateWorktree() | RemoveWorktree():
                self.trees.append(effect)
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
        found.phase, found.living = Phase.RUNNING, True
        others = [other for other, its in self.directories.items() if its.living and other != attempt]
        assert all(other.execution_id != attempt.execution_id for other in others), "one process per execution"

    def tell_end(self, attempt: Attempt) -> None:
        """A shim we are connected to tells its end, or is gone without a word."""
        found = self.directories.get(attempt)
        if attempt not in self.connected or found is None:
            return
        if found.exit is not None:
            self.ends.append(AttemptExited(attempt, found.exit))
        elif not found.lock_held:
            self.ends.append(AttemptLost(attempt, Reason.SHIM_LOST, Swept(found=0, signalled=0, remaining=0)))

    # --- the daemon dies ----------------------------------------------------------------------------------------

    def die(self, *, reboot: bool = False, left: int = 0) -> None:
        """What was only in its memory is gone; shims behind their barriers go; another daemon takes over."""
        for number, wanted in enumerate(self.preparing):
            self.leave_half_prepared(wanted, (left + number) % 4)
        self.preparing, self.trees, self.ends, self.sweeps = [], [], [], []
        self.connected.clear()
        for found in self.directories.values():
            if found.lock_held and found.phase in (Phase.NONE, Phase.READY):
                found.lock_held = False
                found.exit = an_unreleased_exit() if left % 2 else None
            if reboot:
                found.same_boot, found.living, found.lock_held = False, False, False
        self.world.engine = self.world._new_engine()
        observed = [
            Observed(attempt=attempt, same_boot=its.same_boot, phase=its.phase, lock_held=its.lock_held, exit=its.exit)
            for attempt, its in self.directories.items()
        ]
        self.carry_out(self.world.engine.recover(observed, self.world.now))

    def leave_half_prepared(self, wanted: PrepareAttempt, how: int) -> None:
        """Nothing yet, a bare directory, or a shim behind its barrier."""
        attempt = wanted.plan.attempt
        if how == 0 or (attempt in self.directories and not wanted.again):
            return
        phase = Phase.NONE if how == 1 else Phase.READY
        self.directories[attempt] = Directory(phase=phase, lock_held=phase is Phase.READY)

    @rule(left=st.integers(0, 3))
    def the_daemon_is_killed(self, left: int) -> None:
        """Between two turns."""
        self.die(left=left)

    @rule(left=st.integers(0, 3))
    def the_machine_reboots(self, left: int) -> None:
        """Nothing is alive afterwards."""
        self.die(reboot=True, left=left)

    @rule(after=st.integers(-1, 5))
    def the_daemon_will_die_in_its_next_turn(self, after: int) -> None:
        """Before its commit (-1) or after so many effects."""
        self.fuse = after

    # --- the plane ----------------------------------------------------------------------------------------------

    @rule(execution_id=EXECUTIONS, token=TOKENS, worktree=st.none() | WORKTREES)
    def the_plane_signs_a_start(self, execution_id: str, token: int, worktree: str | None) -> None:
        """In a plain directory or a worktree."""
        make = self.world.start if worktree is None else lambda *args: self.world.start_in(worktree, *args)
        self.ctl.append(make(execution_id, token))

    @rule(worktree=WORKTREES, create=st.booleans())
    def the_plane_signs_a_worktree_command(self, worktree: str, create: bool) -> None:
        """One of each kind."""
        self.ctl.append(self.world.create(worktree) if create else self.world.remove(worktree))

    @rule(kind=st.sampled_from(["execution.teleport", "execution.stop"]))
    def the_plane_signs_what_is_refused(self, kind: str) -> None:
        """It consumes its number all the same."""
        self.ctl.append(self.world.start(kind=kind))

    @precondition(lambda self: self.consumed < len(self.ctl))
    @rule(count=st.integers(1, 3))
    def commands_arrive(self, count: int) -> None:
        """The next ones, in one turn."""
        at = self.consumed
        self.turn(*(EnvelopeReceived(env) for env in self.ctl[at : at + count]))

    @precondition(lambda self: self.ctl or self.stale)
    @rule(at=st.integers(0, 50))
    def a_command_arrives_out_of_order(self, at: int) -> None:
        """Doubled, too early, or of an incarnation that is over."""
        envelopes = self.ctl + self.stale
        self.turn(EnvelopeReceived(envelopes[at % len(envelopes)]))

    @rule(execution_id=EXECUTIONS, token=TOKENS)
    def a_stop_arrives(self, execution_id: str, token: int) -> None:
        """Early, in time or late."""
        attempt = an_attempt(execution_id, token)
        unborn = attempt not in self.starts
        if self.turn(EnvelopeReceived(self.world.stop(execution_id, token))) and unborn:
            self.stopped_unborn.add(attempt)

    @rule(execution_id=EXECUTIONS)
    def the_owner_stops(self, execution_id: str) -> None:
        """Everything of an execution."""
        unborn = {
            attempt
            for attempt, row in self.world.journal.attempts.items()
            if attempt.execution_id == execution_id and row.state is not AttemptState.SETTLED
        } - self.starts.keys()
        if self.turn(OwnerStop(execution_id, None, "uid 1000")):
            self.stopped_unborn |= unborn

    @rule(up=st.booleans())
    def the_session_changes(self, up: bool) -> None:
        """A welcome without news, or the connection is lost."""
        if up:
            self.fuse = None
            self.carry_out(self.welcome(reborn=False))
        else:
            self.turn(SessionDown())

    def welcome(self, *, reborn: bool) -> list[Effect]:
        """The effects of a handshake; they write nothing, so `World` may take them already."""
        return list(self.world.session(reborn=reborn))

    @rule()
    def the_plane_begins_a_new_incarnation(self) -> None:
        """Streams restart; what lives goes on."""
        self.fuse = None
        self.stale = self.ctl[-3:]
        self.ctl = []
        self.carry_out(self.welcome(reborn=True))

    @rule(locked=st.booleans())
    def the_owner_changes_the_policy(self, locked: bool) -> None:
        """To one that admits nothing, or back."""
        self.world.policy = self.policies[locked]
        self.turn(PolicyChanged(self.world.policy))

    @rule()
    def items_are_answered(self) -> None:
        """The plane has stored everything."""
        answers = tuple(Answer(out_seq=number, stored=True) for number in self.world.journal.items)
        self.turn(ItemsAnswered(answers), Tick())

    # --- the machine --------------------------------------------------------------------------------------------

    @precondition(lambda self: self.preparing)
    @rule(at=st.integers(0, 9), fails=st.booleans())
    def a_shim_is_prepared(self, at: int, fails: bool) -> None:
        """Or cannot be had."""
        wanted = self.preparing.pop(at % len(self.preparing))
        attempt = wanted.plan.attempt
        if wanted.again:
            left = self.directories.pop(attempt, None)
            assert left is None or not left.living, "what runs is never cleared"
        if attempt in self.directories or fails:
            self.turn(AttemptNotPrepared(attempt, Reason.SPAWN_FAILED, "", refused=fails))
            return
        self.directories[attempt] = Directory(phase=Phase.READY, lock_held=True)
        self.connected.add(attempt)
        self.turn(AttemptPrepared(attempt, SHIM))

    @precondition(lambda self: self.living)
    @rule(at=st.integers(0, 9), killed=st.booleans())
    def a_process_ends(self, at: int, killed: bool) -> None:
        """With a record in its file, or its shim is killed with it."""
        attempt = self.living[at % len(self.living)]
        found = self.directories[attempt]
        found.living, found.lock_held = False, not killed
        found.exit = None if killed else an_exit()
        self.tell_end(attempt)

    @precondition(lambda self: self.ends)
    @rule(at=st.integers(0, 9), again=st.booleans())
    def an_end_is_heard(self, at: int, again: bool) -> None:
        """In any order, and now and then twice."""
        end = self.ends[at % len(self.ends)] if again else self.ends.pop(at % len(self.ends))
        self.turn(end)

    @precondition(lambda self: self.sweeps)
    @rule()
    def a_sweep_is_through(self) -> None:
        """Nothing is left of it."""
        attempt = self.sweeps.pop(0)
        self.turn(AttemptLost(attempt, Reason.SHIM_LOST, Swept(found=1, signalled=1, remaining=0)))

    @precondition(lambda self: self.trees)
    @rule(at=st.integers(0, 9), fails=st.booleans())
    def a_worktree_command_is_through(self, at: int, fails: bool) -> None:
        """Done, or refused at the edge."""
        effect = self.trees.pop(at % len(self.trees))
        if fails:
            self.turn(WorktreeFailed(effect.digest, Reason.GIT_FAILED, "", refused=False))
        elif isinstance(effect, CreateWorktree):
            self.turn(WorktreeCreated(effect.digest, a_made(effect.plan.worktree_id)))
        else:
            self.turn(WorktreeRemoved(effect.digest, GONE))

    # --- what always holds --------------------------------------------------------------------------------------

    @property
    def consumed(self) -> int:
        """How much of the ordered stream is durable."""
        return self.world.journal.marks.get(self.world.inc, Mark()).hw

    @property
    def living(self) -> list[Attempt]:
        """Attempts whose process runs."""
        return [attempt for attempt, found in self.directories.items() if found.living]

    @invariant()
    def at_most_one_process_of_an_execution_lives(self) -> None:
        """Whatever was superseded or lost."""
        if hasattr(self, "directories"):
            names = [attempt.execution_id for attempt in self.living]
            assert len(set(names)) == len(names)

    @invariant()
    def the_mark_never_falls(self) -> None:
        """Within an incarnation, in memory and on disk."""
        if hasattr(self, "world"):
            inc = self.world.engine.me.inc
            hw = self.world.engine.ledger.ctl.hw
            assert hw == self.world.journal.marks.get(inc, Mark()).hw >= self.highest.get(inc, 0)
            self.highest[inc] = hw

    @invariant()
    def nothing_is_said_twice(self) -> None:
        """One receipt per command, one settlement per attempt, and each settlement behind an accepted receipt."""
        if hasattr(self, "world"):
            self.statements()

    def statements(self) -> tuple[dict[Digest, Outcome], set[Attempt]]:
        """Everything that was ever signed, as a plane would read it."""
        outcomes: dict[Digest, Outcome] = {}
        settled: set[Attempt] = set()
        for item in self.world.journal.items.values():
            if item.kind is ItemKind.RECEIPT:
                receipt = _receipt(item)
                assert receipt[0] not in outcomes, "one receipt"
                outcomes[receipt[0]] = receipt[1]
            else:
                attempt, digest = _settlement(item)
                assert attempt not in settled, "one settlement"
                assert outcomes[digest] is Outcome.ACCEPTED, "settled means accepted"
                settled.add(attempt)
        return outcomes, settled

    # --- rest ---------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Let everything come to its end, and count."""
        if not hasattr(self, "world"):
            return
        self.fuse = None
        for _ in range(REST_TURNS_MAX):
            if not self.one_more_thing():
                break
        assert not self.one_more_thing(), "it comes to rest"
        journal = self.world.journal
        outcomes, settled = self.statements()
        assert self.consumed == len(self.ctl), "everything that was signed is consumed"
        assert outcomes.keys() == journal.commands.keys(), "every consumed command has its receipt"
        accepted = {attempt for attempt, row in journal.attempts.items() if outcomes[row.digest] is Outcome.ACCEPTED}
        assert accepted == settled, "every accepted attempt has its settlement"
        assert self.starts.keys() <= accepted, "what ran was accepted"
        assert self.world.engine.attempts.living == 0 and len(self.world.engine.claims) == 0

    def one_more_thing(self) -> bool:
        """Something that still has to happen; False at rest."""
        if self.consumed < len(self.ctl):
            before = self.consumed
            self.turn(EnvelopeReceived(self.ctl[before]))
            assert self.consumed == before + 1, "the next command is always consumed"
        elif self.preparing:
            self.a_shim_is_prepared(0, False)
        elif self.trees:
            self.a_worktree_command_is_through(0, False)
        elif self.ends:
            self.an_end_is_heard(0, False)
        elif self.sweeps:
            self.a_sweep_is_through()
        elif self.living:
            self.a_process_ends(0, False)
        else:
            return False
        return True


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


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
