"""The machine: every state with every input, and what must hold whatever comes in whatever order.

Mutants that died by hand: STOP in `stopping` overwrites the cause; a longer grace is taken; a lower token is taken;
EXITED acts on FOUND; LOST in `running` ends the attempt.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.shim import machine as m

GRACE_MS, KILL_WAIT_MS = 10_000, 5_000


def made(now_ms: int = 0, *, timeout_ms: int | None = None, lease: m.Lease | None = None) -> m.Machine:
    """A fresh machine."""
    return m.Machine(now_ms=now_ms, grace_ms=GRACE_MS, kill_wait_ms=KILL_WAIT_MS, timeout_ms=timeout_ms, lease=lease)


def running(**more: Any) -> m.Machine:
    """A machine whose child runs since 0."""
    machine = made(**more)
    assert machine.step(m.GO, 0) == [m.SPAWN]
    machine.step(m.SPAWNED, 0)
    return machine


def in_state(state: str) -> m.Machine:
    """A machine brought to `state` by inputs."""
    if state == m.READY:
        return made()
    machine = made()
    machine.step(m.GO, 0)
    if state == m.RELEASED:
        return machine
    machine.step(m.SPAWNED, 0)
    if state in (m.STOPPING, m.DRAINING, m.EXITED):
        machine.step(m.STOP, 0, text="first")
    if state in (m.DRAINING, m.EXITED):
        machine.step(m.ENDED, 1)
        machine.step(m.FOUND, 1, number=0)
        machine.step(m.FOUND, 1, number=0)
    if state == m.EXITED:
        machine.step(m.CLOSED, 2)
    return machine


EXPECTED = {
    (m.READY, m.GO): (m.RELEASED, [m.SPAWN]),
    (m.READY, m.LOST): (m.EXITED, [m.FINISH]),
    (m.READY, m.STOP): (m.EXITED, [m.FINISH]),
    (m.READY, m.FAULT): (m.EXITED, [m.FINISH]),
    (m.RELEASED, m.SPAWNED): (m.RUNNING, []),
    (m.RELEASED, m.SPAWN_FAILED): (m.EXITED, [m.FINISH]),
    (m.RELEASED, m.FAULT): (m.EXITED, [m.FINISH]),
    (m.RUNNING, m.STOP): (m.STOPPING, [m.TERM]),
    (m.RUNNING, m.FAULT): (m.STOPPING, [m.TERM]),
    (m.RUNNING, m.ENDED): (m.RUNNING, [m.SCAN]),
    (m.STOPPING, m.ENDED): (m.STOPPING, [m.SCAN]),
    (m.DRAINING, m.FAULT): (m.EXITED, [m.FINISH]),
    (m.DRAINING, m.CLOSED): (m.EXITED, [m.FINISH]),
}


@pytest.mark.parametrize("state", m.STATES)
@pytest.mark.parametrize("kind", m.INPUTS)
def test_every_state_takes_every_input(state: str, kind: str) -> None:
    """What the table does not name changes neither state nor world."""
    machine = in_state(state)
    assert machine.state == state
    lease = m.Lease(1, 1 << 40, m.CONTINUE) if kind == m.LEASE else None
    actions = machine.step(kind, 3, lease=lease)
    assert (machine.state, actions) == EXPECTED.get((state, kind), (state, []))
    assert (state, kind) in m.TRANSITIONS


INPUT = st.tuples(
    st.sampled_from(m.INPUTS),
    st.integers(0, 4_000),
    st.one_of(st.none(), st.integers(0, 30_000)),
    st.builds(m.Lease, st.integers(0, 5), st.integers(0, 100_000), st.integers(0, 2)),
)


@given(st.lists(INPUT, max_size=60), st.one_of(st.none(), st.integers(1, 50_000)))
def test_any_order_of_inputs_keeps_the_promises(inputs: list[Any], timeout_ms: int | None) -> None:
    """One spawn, one finish, first cause kept, tokens never fall, KILL only after TERM."""
    machine = made(timeout_ms=timeout_ms)
    now_ms = 0
    seen: list[str] = []
    first_cause = ""
    token = -1
    for kind, wait_ms, number, lease in inputs:
        now_ms += wait_ms
        went = kind == m.GO and machine.state == m.READY
        actions = machine.step(kind, now_ms, number=number, text="x", lease=lease if kind == m.LEASE else None)
        assert (m.SPAWN in actions) == went
        seen += actions
        if first_cause:
            assert machine.cause.kind == first_cause
        elif machine.cause.kind != m.CAUSE_NONE:
            first_cause = machine.cause.kind
        if machine.lease is not None:
            assert machine.lease.token >= token
            token = machine.lease.token
    assert seen.count(m.SPAWN) <= 1
    assert seen.count(m.FINISH) == (machine.state == m.EXITED)
    if m.KILL in seen:
        assert m.TERM in seen[: seen.index(m.KILL)]
    if seen:
        assert m.FINISH not in seen[:-1], "nothing is done after the end"


@given(st.lists(INPUT, max_size=30), st.integers(0, 3))
def test_a_stop_always_comes_to_an_end(inputs: list[Any], survivors: int) -> None:
    """From any state a stop and the clock lead to the end, survivors or not."""
    machine = made()
    now_ms = 0
    for kind, wait_ms, number, lease in inputs:
        now_ms += wait_ms
        machine.step(kind, now_ms, number=number, lease=lease if kind == m.LEASE else None)
    if machine.state == m.RELEASED:
        machine.step(m.SPAWNED, now_ms)
    machine.step(m.STOP, now_ms, number=1_000)
    for _ in range(1_000):
        due = machine.deadline_ms()
        if machine.state == m.EXITED:
            break
        assert due is not None, f"stuck in {machine.state}"
        now_ms = max(now_ms, due)
        for action in machine.step(m.TICK, now_ms):
            if action in (m.TERM, m.KILL, m.SCAN):
                machine.step(m.FOUND, now_ms, number=survivors)
    assert machine.state == m.EXITED


def test_a_longer_grace_is_not_taken() -> None:
    """Rule 3: a stop while stopping may only come sooner."""
    machine = running()
    machine.step(m.STOP, 0, number=500, text="a")
    machine.step(m.STOP, 100, number=90_000, text="b")
    assert machine.step(m.TICK, 499) in ([], [m.SCAN])
    assert machine.step(m.TICK, 500) == [m.KILL]
    assert machine.cause.by == "a"


def test_a_lease_stop_leaves_room_before_the_deadline() -> None:
    """Stopping begins grace + kill wait + margin before the deadline, not a moment earlier."""
    machine = running(lease=m.Lease(1, 60_000, m.ON_LOSS_STOP))
    begin = 60_000 - GRACE_MS - KILL_WAIT_MS - m.LEASE_MARGIN_MS
    assert machine.deadline_ms() == begin
    assert machine.step(m.TICK, begin - 1) == []
    assert machine.step(m.TICK, begin) == [m.TERM]
    machine.step(m.FOUND, begin, number=1)
    assert machine.step(m.TICK, begin + GRACE_MS) == [m.KILL]
    assert machine.step(m.TICK, begin + GRACE_MS + KILL_WAIT_MS) == []
    assert (machine.state, machine.survivors) == (m.DRAINING, 1)


def test_a_long_grace_yields_to_the_lease_and_the_timeout() -> None:
    """Rule 3: a stop with an hour of grace does not outlive the lease nor the time limit."""
    leased = running(lease=m.Lease(1, 60_000, m.ON_LOSS_STOP))
    leased.step(m.STOP, 0, number=3_600_000)
    assert leased.step(m.TICK, 60_000 - KILL_WAIT_MS - m.LEASE_MARGIN_MS) == [m.KILL]
    limited = running(timeout_ms=1_000)
    limited.step(m.STOP, 0, number=3_600_000)
    assert limited.step(m.TICK, 1_000 + GRACE_MS) == [m.KILL]


def test_freeze_and_thaw_follow_the_lease() -> None:
    """The margin holds for a freeze too; a renewal thaws, a stale one freezes on."""
    machine = running(lease=m.Lease(1, 20_000, m.ON_LOSS_FREEZE))
    assert machine.step(m.TICK, 15_000) == [m.FREEZE]
    assert machine.step(m.TICK, 16_000) == []
    assert machine.step(m.LEASE, 17_000, lease=m.Lease(1, 18_000, m.ON_LOSS_FREEZE)) == []
    assert machine.step(m.LEASE, 18_000, lease=m.Lease(0, 90_000, m.ON_LOSS_FREEZE)) == []
    assert machine.step(m.LEASE, 19_000, lease=m.Lease(1, 90_000, m.ON_LOSS_FREEZE)) == [m.THAW]
    assert machine.deadline_ms() == 85_000


def test_an_end_of_its_own_has_no_cause_even_when_the_sweep_is_stopped() -> None:
    """Rule 4: the child ended first; a stop that comes during the sweep only shortens it."""
    machine = running()
    assert machine.step(m.ENDED, 5) == [m.SCAN]
    assert machine.step(m.FOUND, 5, number=2) == [m.TERM]
    machine.step(m.FOUND, 5, number=2)
    machine.step(m.STOP, 6, number=10, text="late")
    assert machine.step(m.TICK, 16) == [m.KILL]
    assert machine.step(m.FOUND, 16, number=0) == [m.SCAN]
    machine.step(m.FOUND, 16, number=0)
    assert machine.step(m.CLOSED, 17) == [m.FINISH]
    assert (machine.cause.kind, machine.verdict(None), machine.verdict(9)) == ("none", "exited", "signalled")


def test_a_drain_ends_in_quiet_or_by_the_clock() -> None:
    """250 ms of silence end the drain; endless output ends after 5 s."""
    quiet = running()
    quiet.step(m.ENDED, 100)
    quiet.step(m.FOUND, 100, number=0)
    assert quiet.step(m.TICK, 349) == []
    assert quiet.step(m.TICK, 350) == [m.FINISH]
    assert quiet.drain == "quiet"
    loud = running()
    loud.step(m.ENDED, 100)
    loud.step(m.FOUND, 100, number=0)
    loud.output_ms = 5_090
    assert loud.step(m.TICK, 5_099) == []
    assert loud.step(m.TICK, 5_100) == [m.FINISH]
    assert loud.drain == "timeout"


def test_no_release_in_time_ends_the_attempt() -> None:
    """Half a minute, then the attempt is unreleased."""
    machine = made(1_000)
    assert machine.deadline_ms() == 31_000
    assert machine.step(m.TICK, 30_999) == []
    assert machine.step(m.TICK, 31_000) == [m.FINISH]
    assert (machine.cause.kind, machine.cause.reason) == ("unreleased", "NOT_RELEASED")
    assert machine.verdict(None) == "never_started"
