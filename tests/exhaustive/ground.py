"""One state of what is explored: an engine, its journal, what was signed for it, what is under way, and the machine below.

`perform` is the machine's part of every effect, with what must hold of it stated from the machine's own record: which command
arrived, what was let go, what runs. I1 to I9 are those of the security page; each is named where it is checked.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Final

from protocol.envelope import Verified
from protocol.execution import AttemptState
from protocol.ids import Attempt, Digest
from protocol.keyset import Keyset, Revocation, RevokedFor
from protocol.replay import Mark
from runner.core.effects import (
    AbandonAttempt,
    AdoptAttempt,
    CollectAttempt,
    Effect,
    EndHungShim,
    KeepIdentity,
    Persist,
    PrepareAttempt,
    PushLease,
    ReleaseAttempt,
    ScanOrphans,
    SendBeat,
    StopAttempt,
    SweepAttempt,
    SweepRemains,
)
from runner.core.engine import Engine, EngineIdentity
from runner.core.inputs import Input, Now
from runner.core.journaling import PutReceipt
from runner.core.plans import ExitRecord, LeaseAction, Observed, Phase
from tests.exhaustive.states import clone, cloned, journal_state, state_of
from tests.support.builders import NOW_MS, a_certificate, a_key, a_keyset, a_verified_keyset
from tests.support.engine import JournalModel, a_policy, an_exit, an_unreleased_exit

TTL_MS: Final = 60_000
STEP_MS: Final = TTL_MS // 2
"""One move of the clock: a lease is renewed after one, and lost after two without."""
POLICY: Final = a_policy()
RUNNER_KEY: Final = a_key("runner")
CERTIFICATE: Final = a_certificate()
COMPROMISED: Final = Revocation(kid=a_key("command").key_id, at=NOW_MS - 1, reason=RevokedFor.COMPROMISED)
KEYSET: Final = a_verified_keyset()
REVOKED: Final = a_verified_keyset(keyset=a_keyset(version=2, revoked=[COMPROMISED]))
DEEDS: Final = (
    AbandonAttempt
    | AdoptAttempt
    | CollectAttempt
    | EndHungShim
    | KeepIdentity
    | PrepareAttempt
    | PushLease
    | ReleaseAttempt
    | StopAttempt
    | SweepAttempt
    | SweepRemains
)
"""Effects that leave something behind when the daemon dies after them."""

Move = tuple[str, "Ground"]


class Violated(AssertionError):
    """An invariant does not hold."""


BROKEN: Final = (AssertionError, KeyError)
"""Violated, the journal's RuleBroken, the engine's own assertions, and what it looked for in vain."""


def must(held: bool, rule: str) -> None:
    """Raises Violated."""
    if not held:
        raise Violated(rule)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """How much may happen; within it, everything that can."""

    steps: int
    """Moves of the clock."""
    reboots: int = 0
    kills: bool = True
    """Whether shims are killed."""
    revoke: bool = False
    """Whether the command key is found to be compromised."""


@dataclass(frozen=True, slots=True)
class Signed:
    """A command that was signed beforehand; `starts` and `stops` are what the plane meant by it."""

    name: str
    env: bytes
    cmd_id: str
    digest: Digest
    starts: Attempt | None = None
    stops: Attempt | None = None


@dataclass(frozen=True, slots=True)
class Story:
    """What was signed: `ctl` in order, and `safety`."""

    ctl: tuple[Signed, ...]
    safety: tuple[Signed, ...]

    @property
    def all(self) -> tuple[Signed, ...]:
        """Both streams."""
        return self.ctl + self.safety


@dataclass(frozen=True, slots=True)
class Directory:
    """An attempt on the machine: its files, its shim and its child."""

    phase: Phase = Phase.READY
    shim: bool = True
    """It holds its lock."""
    child: bool = False
    exit: str = ""
    """Which record it left; empty: none."""
    stop_by: str = ""
    lease: tuple[int, int, LeaseAction] = (0, 0, LeaseAction.CONTINUE)
    """Token, deadline and action that the shim was told."""
    same_boot: bool = True
    connected: bool = True


@dataclass(slots=True)
class Ground:
    """One state. Copies share what they do not change."""

    story: Story
    bound: Bound
    engine: Engine | None
    """None: no daemon lives."""
    journal: JournalModel
    now: Now
    up: bool = False
    beat: tuple[int, tuple[tuple[str, int], ...]] | None = None
    """The unanswered beat: when it was sent, and which leases it asked for."""
    dirs: dict[Attempt, Directory] = field(default_factory=dict)
    preparing: dict[Attempt, bool] = field(default_factory=dict)
    """Shims that are wanted, and whether what is left of an earlier one is to be cleared."""
    answers: frozenset[tuple[str, Attempt | None]] = frozenset()
    """What the machine has to tell: ends, sweeps, a look at all processes."""
    steps: int = 0
    reboots: int = 0
    starts: frozenset[Attempt] = frozenset()
    """What ever ran."""
    unborn: frozenset[Attempt] = frozenset()
    """What was stopped, durably, before it ran."""
    keyset: Verified[Keyset] = KEYSET
    """As the keystore has it."""
    engine_named: int | None = None
    journal_named: int | None = None

    # --- names and copies -------------------------------------------------------------------------------------------

    def state(self) -> int:
        """The name of this state: equal ones have equal futures."""
        if self.engine is None:
            self.engine_named = 0
        elif self.engine_named is None:
            self.engine_named = hash((state_of(self.engine), self.engine.keyset.value.version))
        if self.journal_named is None:
            self.journal_named = hash(journal_state(self.journal))
        return hash(
            (
                (self.engine_named, self.journal_named),
                (self.now, self.up, self.beat, self.answers, self.steps, self.reboots),
                (self.starts, self.unborn, self.keyset.value.version),
                frozenset(self.dirs.items()),
                tuple(self.preparing.items()),
            )
        )

    def fork(self) -> "Ground":
        """Another one, to be changed; engine and journal are shared until a turn changes them."""
        made = object.__new__(Ground)
        for name in Ground.__slots__:
            setattr(made, name, getattr(self, name))
        made.dirs, made.preparing = self.dirs.copy(), self.preparing.copy()
        return made

    @property
    def boot_id(self) -> str:
        """Of this boot."""
        return f"boot-{self.reboots}"

    def new_engine(self) -> Engine:
        """A daemon on this journal."""
        identity = EngineIdentity(key=RUNNER_KEY, certificate=CERTIFICATE, keyset=self.keyset, boot_id=self.boot_id)
        return Engine(identity, POLICY, {}, self.journal.image())

    # --- turns ----------------------------------------------------------------------------------------------------------

    def turn(self, happened: Input) -> Iterator[Move]:
        """One input to the daemon: the whole turn; or its commit, some of its deeds, and then its death."""
        assert self.engine is not None, "a daemon lives"
        after = self.fork()
        after.engine, after.engine_named = clone(self.engine), None
        yield from after.carried_out(after.engine.step(happened, after.now))

    def carried_out(self, effects: list[Effect]) -> Iterator[Move]:
        """Commit, then do; consumes this one."""
        self.commit([effect for effect in effects if isinstance(effect, Persist)])
        for effect in effects:
            if isinstance(effect, DEEDS):
                yield from named(f", dies before {type(effect).__name__}", self.fork().deaths())
            self.perform(effect)
        assert self.engine is not None, "it lived"
        mark = self.journal.marks.get(1, Mark())
        must(self.engine.ledger.ctl == mark, "I5: the mark in memory is the durable one")
        yield "", self

    def commit(self, persists: list[Persist]) -> None:
        """Everything of a turn at once. The journal's own rules raise."""
        writes = [write for persist in persists for write in persist.writes]
        if not writes:
            return
        before, self.journal, self.journal_named = self.journal, cloned(self.journal), None
        head = max(before.items, default=0)
        for write in writes:
            self.journal.apply(write)
            if isinstance(write, PutReceipt):
                stopped = {each.stops for each in self.story.safety if each.digest == write.digest}
                self.unborn |= {target for target in stopped if target is not None} - self.starts
        must(self.journal.leaves[: len(before.leaves)] == before.leaves, "I9: leaves are appended")
        must(self.journal.items.items() >= before.items.items(), "I9: what was said stays")
        must(all(number > head for number in self.journal.items.keys() - before.items.keys()), "I9: numbers rise")
        hw = before.marks.get(1, Mark()).hw
        must(self.journal.marks.get(1, Mark()).hw >= hw, "I5: the mark never falls")

    def perform(self, effect: Effect) -> None:
        """What the machine does, or begins to do."""
        match effect:
            case PrepareAttempt(plan, _, again):
                self.prepare(plan.attempt, again=again)
            case ReleaseAttempt(attempt):
                self.release(attempt)
            case AbandonAttempt(attempt):
                found = self.dirs.pop(attempt, None)
                must(found is None or not found.child, "I8: what runs is never removed")
            case StopAttempt(attempt, _, by):
                self.stop(attempt, by)
            case PushLease(attempt, token, deadline_ms, action):
                self.push(attempt, token, deadline_ms, action)
            case CollectAttempt(attempt):
                self.change(attempt, lambda found: replace(found, shim=found.shim and not found.exit))
            case AdoptAttempt(attempt):
                self.change(attempt, lambda found: replace(found, connected=True))
                self.tell_end(attempt)
            case SweepAttempt(attempt):
                self.answers |= {("swept", attempt)}
            case EndHungShim(attempt):
                self.answers |= {("hung", attempt)}
            case SweepRemains(attempt):
                row = self.journal.attempts.get(attempt)
                must(row is not None and row.state is AttemptState.SETTLED, "I8: only what is settled is swept")
                self.answers |= {("remains", attempt)}
            case ScanOrphans():
                # Where no shim is ever killed there is nothing to find.
                self.answers |= {("scan", None)} if self.bound.kills else set()
            case SendBeat(leases=leases):
                asked = tuple((lease.res, lease.token) for lease in leases)
                self.beat = (self.now.boot_ms, asked) if self.up and asked else None
            case KeepIdentity(keyset):
                self.keyset = keyset
            case _:
                pass

    # --- the machine ----------------------------------------------------------------------------------------------------

    def change(self, attempt: Attempt, how: Callable[[Directory], Directory]) -> None:
        """Another state of its directory, if there is one."""
        if attempt in self.dirs:
            self.dirs[attempt] = how(self.dirs[attempt])

    def prepare(self, attempt: Attempt, *, again: bool) -> None:
        """A shim is wanted."""
        assert self.engine is not None, "a daemon asks"
        must(attempt in self.journal.attempts, "INTENT before effect")
        must(self.signed(attempt), "I1: nothing is done that was not signed and did not arrive")
        must(self.engine.keyset.value.version == 1, "I6: nothing begins whose key is known to be compromised")
        self.preparing[attempt] = again

    def signed(self, attempt: Attempt) -> bool:
        """Whether the journal has a start of it whose digest is of bytes that the plane has signed: nobody else can make one."""
        return any(each.starts == attempt and each.digest in self.journal.commands for each in self.story.ctl)

    def release(self, attempt: Attempt) -> None:
        """The barrier opens: from here on it runs."""
        found = self.dirs.get(attempt)
        if found is None or found.phase is not Phase.READY or not found.shim or found.exit or not found.connected:
            return
        assert self.engine is not None, "a daemon asks"
        row = self.journal.attempts[attempt]
        must(attempt in self.journal.prepared, "PREPARED before release")
        must(self.signed(attempt), "I1: nothing runs that was not signed and did not arrive")
        must(attempt not in self.unborn, "I7: what was stopped before it ran never runs")
        must(attempt not in self.starts, "I2: one effect per command")
        must(not any(its.child for its in self.dirs.values()), "I2: one process per execution")
        later = [other for other in self.journal.attempts if other.start_token > attempt.start_token]
        must(not later, "I4: no lower token begins once a higher one is known")
        must(self.engine.keyset.value.version == 1, "I6: nothing runs whose key is known to be compromised")
        if row.lease is not None:
            must(row.lease.deadline_ms > self.now.boot_ms, "nothing begins under a lease that is over")
            must(row.lease.boot_id == self.boot_id, "nothing begins under a lease of another boot")
            must(found.lease[0] == row.lease.token, "its shim knows its lease before it is let go")
        self.starts |= {attempt}
        self.dirs[attempt] = replace(found, phase=Phase.RUNNING, child=True)

    def stop(self, attempt: Attempt, by: str) -> None:
        """The shim hears it. Behind its barrier it is over at once, else its child may take its time."""
        found = self.dirs.get(attempt)
        if found is None or not found.shim or not found.connected or found.exit:
            return
        self.dirs[attempt] = replace(found, stop_by=found.stop_by or by, exit="" if found.child else "unreleased")
        self.tell_end(attempt)

    def push(self, attempt: Attempt, token: int, deadline_ms: int, action: LeaseAction) -> None:
        """The shim is told its lease."""
        must(deadline_ms <= self.now.boot_ms + TTL_MS, "no lease reaches further than its ttl")
        found = self.dirs.get(attempt)
        if found is not None and found.shim and found.connected:
            must(token >= found.lease[0], "I4: a shim is never told a lower token")
            self.dirs[attempt] = replace(found, lease=(token, deadline_ms, action))

    def tell_end(self, attempt: Attempt) -> None:
        """A shim we are connected to tells its end, or is gone without a word."""
        found = self.dirs.get(attempt)
        if found is not None and found.connected and (found.exit or not found.shim):
            self.answers |= {("exit" if found.exit else "lost", attempt)}

    def observed(self) -> list[Observed]:
        """What a daemon that starts finds."""
        return [
            Observed(
                attempt=attempt,
                same_boot=its.same_boot,
                phase=its.phase,
                lock_held=its.shim,
                exit=record_of(its.exit, its.stop_by) if its.exit else None,
                child_alive=its.child,
            )
            for attempt, its in self.dirs.items()
        ]

    # --- the daemon dies ------------------------------------------------------------------------------------------------

    def deaths(self, *, reboot: bool = False) -> Iterator[Move]:
        """Nothing of its memory is left. Shims behind their barriers go, and what was half prepared is left in some way.

        Consumes this one.
        """
        self.engine, self.up, self.beat = None, False, None
        self.answers = frozenset()
        wanted, self.preparing = self.preparing, {}
        behind = [attempt for attempt, its in self.dirs.items() if its.shim and its.phase is Phase.READY]
        for attempt, its in self.dirs.items():
            self.dirs[attempt] = replace(its, connected=False)
            if reboot:
                self.dirs[attempt] = replace(its, connected=False, shim=False, child=False, same_boot=False)
        for how in ("nothing", "bare", "ready", "unreleased") if wanted or behind else ("",):
            left = self.fork()
            for attempt in behind:
                told = "unreleased" if how == "unreleased" else left.dirs[attempt].exit
                left.dirs[attempt] = replace(left.dirs[attempt], shim=False, exit=told)
            for attempt, again in wanted.items():
                left.half_prepared(attempt, how, again=again)
            yield f", leaving {how}" if how else "", left

    def half_prepared(self, attempt: Attempt, how: str, *, again: bool) -> None:
        """The daemon died while its shim was on the way."""
        if attempt in self.dirs and not again:
            return
        self.dirs.pop(attempt, None)
        if how != "nothing":
            phase, told = Phase.NONE if how == "bare" else Phase.READY, "unreleased" if how == "unreleased" else ""
            self.dirs[attempt] = Directory(phase=phase, shim=False, exit=told, connected=False)


@cache
def record_of(kind: str, stop_by: str) -> ExitRecord:
    """The record that a shim leaves."""
    if kind == "unreleased":
        return an_unreleased_exit()
    if kind == "lease":
        return an_exit(verdict="stopped", code=None, signal=15, cause_kind="lease")
    if stop_by:
        return an_exit(verdict="stopped", code=None, signal=15, cause_kind="stop", cause_by=stop_by)
    return an_exit()


def named(what: str, moves: Iterator[Move]) -> Iterator[Move]:
    """The same moves, with their names behind `what`; so is the name of one that breaks a rule."""
    try:
        for name, ground in moves:
            yield what + name, ground
    except BROKEN as broken:
        broken.add_note(what)
        raise
