"""The shim's machine in a world of its own: any order of words, ends, losses and sleeps keeps its promises.

The world keeps its own record of the lease, the freeze and the tree, and ticks whenever the machine asks to be ticked.

Mutants that died by hand: a lower token replaces the lease; a stop has no kill wait ahead of it, a freeze no margin; the KILL
ignores the lease; nothing is given up; the wake is not waited for; a freeze is not looked at again; nothing thaws; TERM comes
before THAW or without it; the time limit stands still in a freeze; GO spawns under a lost lease; a later STOP takes the cause.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.shim import lease as leases
from runner.shim import machine as m

pytestmark = pytest.mark.slow

KILL_WAIT_MS = 5_000
TICKS_AT_ONCE_MAX = 8
"""More ticks than a machine has states, all due at one moment, lead nowhere."""
TIMES = st.integers(0, 120_000) | st.sampled_from([0, 1, 20, 5_000, 30_000, 900_000])
LEASES = st.builds(
    leases.Lease,
    st.integers(0, 3),
    st.integers(-10_000, 200_000),  # from now; the world makes it absolute
    st.sampled_from([leases.CONTINUE, leases.ON_LOSS_FREEZE, leases.ON_LOSS_STOP]),
    st.none() | st.integers(0, 60_000),
)
EVENTS = st.lists(
    st.tuples(st.just("wait"), TIMES)
    | st.tuples(st.just("wait"), TIMES)
    | st.tuples(st.just("sleep"), st.integers(5_000, 2_000_000))
    | st.tuples(st.just("lease"), LEASES)
    | st.tuples(st.just("lease"), LEASES)
    | st.tuples(st.sampled_from([m.STOP]), st.none() | st.integers(0, 100_000))
    | st.tuples(st.sampled_from([m.GO, m.LOST, m.FAULT, m.ENDED, m.CLOSED, m.FENCED, m.SPAWN_FAILED]), st.none()),
    max_size=25,
)
TREES = st.sampled_from(["obedient", "stubborn", "unkillable"])
"""Ends at TERM; ends at KILL only; never ends."""


class World:
    """One machine, its tree and the clock."""

    def __init__(self, tree: str, *, grace_ms: int, timeout_ms: int | None, lease: leases.Lease | None) -> None:
        self.now_ms = 0
        self.tree = tree
        self.grace_ms = grace_ms
        self.timeout_ms = timeout_ms
        self.lease = None if lease is None else self._absolute(lease)
        self.in_time = self._in_time()
        self.machine = m.Machine(
            now_ms=0, grace_ms=grace_ms, kill_wait_ms=KILL_WAIT_MS, timeout_ms=timeout_ms, lease=self.lease
        )
        self.done: list[str] = []
        self.alive = False
        self.frozen_ms: int | None = None
        self.started_ms = 0
        self.slept = False
        self.patient_ms = 0
        self.excused = False
        self.cause = m.CAUSE_NONE

    def happen(self, kind: str, what: Any) -> None:
        """One event of the list."""
        if kind == "wait":
            self.wait(what)
        elif kind == "sleep":
            self.now_ms += what
            self.slept = True
            self.patient_ms = self.now_ms + leases.WAKE_WAIT_MS
            self.feed(m.WOKE)
            self.feed(m.TICK)
        elif kind == "lease":
            self.push(self._absolute(what))
        elif kind == m.ENDED:
            self.end()
        elif kind in (m.FENCED, m.SPAWN_FAILED):
            # Only a release that is under way has such a result, and it is there at once.
            return
        else:
            self.excused = self.excused or kind in (m.STOP, m.FAULT)
            self.feed(kind, number=what, text="x")

    def wait(self, ms: int) -> None:
        """Time goes by; the machine is ticked whenever it is due."""
        end_ms = self.now_ms + ms
        at_once = 0
        while (due_ms := self.machine.deadline_ms()) is not None and due_ms <= end_ms:
            at_once = 0 if due_ms > self.now_ms else at_once + 1
            assert at_once <= TICKS_AT_ONCE_MAX, f"due for ever in {self.machine.state}"
            self.now_ms = max(self.now_ms, due_ms)
            self.feed(m.TICK)
        self.now_ms = max(self.now_ms, end_ms)
        self.check(self.machine.state)

    def push(self, lease: leases.Lease) -> None:
        """A LEASE; a lower token must leave no trace at all."""
        if self.lease is not None and lease.token < self.lease.token:
            before = copy.deepcopy(self.machine)
            assert self.machine.step(m.LEASE, self.now_ms, lease=lease) == []
            assert facts(self.machine) == facts(before)
            return
        self.lease = lease
        self.in_time = self._in_time()
        self.feed(m.LEASE, lease=lease)

    def end(self) -> None:
        """The child ends by itself."""
        if self.alive:
            self.alive = False
            self.excused = True
            self.feed(m.ENDED)

    def feed(self, kind: str, **more: Any) -> None:
        """One input, its actions, and their results as further inputs; then all that must hold."""
        state = self.machine.state
        actions = self.machine.step(kind, self.now_ms, **more)
        assert (m.SPAWN in actions) <= (kind == m.GO and state == m.READY)
        for action in actions:
            self.done.append(action)
            self._perform(action)
        self.check(state)

    def check(self, before: str) -> None:
        """What holds after every input."""
        machine, now_ms, lease = self.machine, self.now_ms, self.lease
        if self.cause != m.CAUSE_NONE:
            assert machine.cause.kind == self.cause, "the first cause wins"
        self.cause = machine.cause.kind
        if machine.state == m.RUNNING and self.alive and self.frozen_ms is None:
            assert self._may_run(), "it runs without a right to"
        if self.frozen_ms is not None and machine.state == m.RUNNING:
            assert now_ms < max(self.frozen_ms + leases.FROZEN_MAX_MS, self.patient_ms), "frozen for too long"
            assert self.timeout_ms is None or now_ms < self.started_ms + self.timeout_ms, "the time limit goes on"
        left = before == m.STOPPING and machine.state in (m.DRAINING, m.EXITED)
        if left and lease is not None and lease.action == leases.ON_LOSS_STOP and self.in_time and not self.slept:
            assert now_ms <= lease.deadline_ms - leases.LEASE_MARGIN_MS, "a stop for a loss is over before the deadline"

    def _may_run(self) -> bool:
        if self.lease is None or self.lease.action == leases.CONTINUE:
            return True
        return self.now_ms < self.lease.deadline_ms - leases.LEASE_MARGIN_MS

    def _perform(self, action: str) -> None:
        if action == m.SPAWN:
            assert self._may_run(), "started without a right to run"
            self.alive = True
            self.started_ms = self.now_ms
            self.feed(m.SPAWNED)
        elif action == m.FREEZE:
            assert self.frozen_ms is None
            self.frozen_ms = self.now_ms
        elif action == m.THAW:
            assert self.frozen_ms is not None
            self.frozen_ms = None
        elif action in (m.TERM, m.KILL, m.SCAN):
            self._signal(action)

    def _signal(self, action: str) -> None:
        if action != m.SCAN:
            assert self.frozen_ms is None, "a frozen tree takes no signal"
            late = self.timeout_ms is not None and self.now_ms >= self.started_ms + self.timeout_ms
            assert self.now_ms >= self.patient_ms or self.excused or late or self._ladder(), (
                "the wake was not waited for"
            )
        dies = self.alive and (action, self.tree) in ((m.TERM, "obedient"), (m.KILL, "obedient"), (m.KILL, "stubborn"))
        self.feed(m.FOUND, number=int(self.alive))
        if dies:
            self.alive = False
            self.feed(m.ENDED)

    def _ladder(self) -> bool:
        """Whether this signal belongs to a ladder that began before."""
        return len([action for action in self.done if action in (m.TERM, m.KILL)]) > 1

    def _absolute(self, lease: leases.Lease) -> leases.Lease:
        return leases.Lease(lease.token, self.now_ms + lease.deadline_ms, lease.action, lease.grace_ms)

    def _in_time(self) -> bool:
        """Whether the stop of this lease can still begin when it should."""
        if self.lease is None:
            return False
        grace_ms = self.grace_ms if self.lease.grace_ms is None else min(self.grace_ms, self.lease.grace_ms)
        return self.now_ms <= self.lease.deadline_ms - grace_ms - KILL_WAIT_MS - leases.LEASE_MARGIN_MS


def facts(machine: m.Machine) -> dict[str, Any]:
    """Everything a machine knows."""
    told: dict[str, Any] = dict(vars(machine))
    tenure, cause = told.pop("tenure"), told.pop("cause")
    told |= {name: getattr(tenure, name) for name in tenure.__slots__ if name != "lease"}
    told |= {name: getattr(cause, name) for name in cause.__slots__}
    return told | {name: getattr(tenure.lease, name, None) for name in leases.Lease.__slots__}


@settings(max_examples=400)
@given(EVENTS, TREES, st.integers(0, 300_000), st.none() | st.integers(1, 1_000_000), st.none() | LEASES, st.booleans())
def test_a_machine_keeps_its_promises_in_any_world(
    events: list[tuple[str, Any]],
    tree: str,
    grace_ms: int,
    timeout_ms: int | None,
    lease: leases.Lease | None,
    started: bool,
) -> None:
    """No spawn without GO, no run without the right, no act before the renewal had its time; then it comes to its end."""
    world = World(tree, grace_ms=grace_ms, timeout_ms=timeout_ms, lease=lease)
    if started:
        world.happen(m.GO, None)
    for kind, what in events:
        world.happen(kind, what)
    world.happen(m.STOP, 1_000)
    world.wait(1_000 + KILL_WAIT_MS + m.DRAIN_MS)
    assert world.machine.state == m.EXITED
    done = world.done
    assert (done.count(m.SPAWN) <= 1, done.count(m.FINISH), done[-1]) == (True, 1, m.FINISH)
    if m.KILL in done:
        assert m.TERM in done[: done.index(m.KILL)]


@settings(max_examples=200)
@given(TREES, st.integers(0, 300_000), st.integers(20_000, 400_000), st.integers(0, 60_000) | st.none())
def test_a_loss_is_over_before_the_deadline(tree: str, grace_ms: int, ahead_ms: int, own_ms: int | None) -> None:
    """Alone with the clock: nothing before the loss, everything before the deadline."""
    world = World(
        tree, grace_ms=grace_ms, timeout_ms=None, lease=leases.Lease(1, ahead_ms, leases.ON_LOSS_STOP, own_ms)
    )
    world.happen(m.GO, None)
    if not world.in_time:
        return
    loss_ms = ahead_ms - min(grace_ms, grace_ms if own_ms is None else own_ms) - KILL_WAIT_MS - leases.LEASE_MARGIN_MS
    world.wait(loss_ms - 1)
    assert m.TERM not in world.done
    world.wait(1)
    assert world.cause == m.CAUSE_LEASE
    world.wait(ahead_ms - loss_ms - leases.LEASE_MARGIN_MS)
    assert world.machine.state in (m.DRAINING, m.EXITED)


@settings(max_examples=200)
@given(TREES, st.integers(0, 50_000), st.integers(0, 10_000_000), st.booleans())
def test_a_stop_of_any_grace_is_over_before_the_deadline(tree: str, at_ms: int, grace_ms: int, own: bool) -> None:
    """Whoever stops an attempt, or however it ends: its ladder does not outlive its lease."""
    world = World(tree, grace_ms=grace_ms, timeout_ms=None, lease=leases.Lease(1, 60_000, leases.ON_LOSS_STOP, 0))
    world.happen(m.GO, None)
    world.wait(at_ms - 1)
    if own:
        world.machine.step(m.ENDED, world.now_ms)
        world.feed(m.FOUND, number=1)
    else:
        world.happen(m.STOP, grace_ms)
    world.wait(60_000 - leases.LEASE_MARGIN_MS - world.now_ms)
    assert world.machine.state in (m.DRAINING, m.EXITED)


FROZEN_EVENTS = st.lists(
    st.tuples(st.just("wait"), st.integers(0, leases.FROZEN_MAX_MS))
    | st.tuples(st.just("sleep"), st.integers(5_000, 2 * leases.FROZEN_MAX_MS))
    | st.tuples(
        st.just("lease"),
        st.builds(leases.Lease, st.integers(0, 3), st.integers(-10_000, 4_000), st.just(leases.ON_LOSS_FREEZE)),
    ),
    max_size=8,
)


@settings(max_examples=200)
@given(FROZEN_EVENTS, TREES, st.none() | st.integers(60_001, 1_000_000))
def test_a_freeze_is_bounded_whatever_comes_too_late(
    events: list[tuple[str, Any]], tree: str, timeout_ms: int | None
) -> None:
    """Leases without a future, waits and sleeps neither thaw nor prolong; it is the lease or the time limit that ends it."""
    freezing = leases.Lease(1, 60_000, leases.ON_LOSS_FREEZE)
    world = World(tree, grace_ms=10_000, timeout_ms=timeout_ms, lease=freezing)
    world.happen(m.GO, None)
    world.wait(60_000)
    for kind, what in events:
        world.happen(kind, what)
        assert (m.THAW in world.done) == (m.TERM in world.done)
    world.wait(leases.FROZEN_MAX_MS)
    assert world.cause in ({m.CAUSE_LEASE} if timeout_ms is None else {m.CAUSE_LEASE, m.CAUSE_TIMEOUT})
    world.wait(10_000 + KILL_WAIT_MS + m.DRAIN_MS)
    assert world.machine.state == m.EXITED


@settings(max_examples=200)
@given(st.integers(0, 3_000_000), st.sampled_from([leases.ON_LOSS_FREEZE, leases.ON_LOSS_STOP]), st.integers(2, 30_000))
def test_a_renewal_within_the_wait_of_a_wake_saves_every_attempt(slept_ms: int, action: int, after_ms: int) -> None:
    """However long the machine slept: who is renewed within the wait runs on as if nothing had been."""
    world = World("obedient", grace_ms=10_000, timeout_ms=None, lease=leases.Lease(1, 60_000, action, None))
    world.happen(m.GO, None)
    world.happen("sleep", slept_ms)
    world.wait(after_ms - 1)
    world.push(leases.Lease(2, world.now_ms + 60_000, action))
    assert world.machine.state == m.RUNNING
    assert world.frozen_ms is None
    assert world.alive
