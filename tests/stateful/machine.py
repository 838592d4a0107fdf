"""A machine whose directories, processes and journal survive the daemon, and the daemon that is on it; test_engine.py has the rules."""

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize

from protocol.errors import Reason
from protocol.ids import Attempt, Digest
from protocol.messages import ItemKind
from protocol.receipt import Outcome
from protocol.replay import Mark
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
    Input,
)
from runner.core.plans import ExitRecord, Observed, Phase, Swept
from tests.support.engine import (
    World,
    a_policy,
    an_unreleased_exit,
    opened_receipt,
    opened_settlement,
)


@dataclass
class Directory:
    """What the files of an attempt show, and whether its child runs."""

    phase: Phase = Phase.NONE
    lock_held: bool = False
    exit: ExitRecord | None = None
    same_boot: bool = True
    living: bool = False


class Machine(RuleBasedStateMachine):
    """One daemon after the other, the directories they leave, and everything that was ever signed."""

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
        self.tokens = {"ex_1": 0, "ex_2": 0}
        """Of the newest attempt that was signed, by execution."""
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

    # --- what is known --------------------------------------------------------------------------------------

    @property
    def consumed(self) -> int:
        """How much of the ordered stream is durable."""
        return self.world.journal.marks.get(self.world.inc, Mark()).hw

    @property
    def living(self) -> list[Attempt]:
        """Attempts whose process runs."""
        return [attempt for attempt, found in self.directories.items() if found.living]

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
