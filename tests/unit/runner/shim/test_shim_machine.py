"""The machine: every state with every input, and what must hold whatever comes in whatever order.

Mutants that died by hand: STOP in `stopping` overwrites the cause; a longer grace is taken; a lower token is taken;
EXITED acts on FOUND; LOST in `running` ends the attempt.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.shim import lease as ls
from runner.shim import machine as m

GRACE_MS, KILL_WAIT_MS = 10_000, 5_000


def made(now_ms: int = 0, *, timeout_ms: int | None = None, lease: ls.Lease | None = None) -> m.Machine:
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
    (m.RELEASED, m.FENCED): (m.EXITED, [m.FINISH]),
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
    lease = ls.Lease(1, 1 << 40, ls.CONTINUE) if kind == m.LEASE else None
    actions = machine.step(kind, 3, lease=lease)
    assert (machine.state, actions) == EXPECTED.get((state, kind), (state, []))
    assert (state, kind) in m.TRANSITIONS


INPUT = st.tuples(
    st.sampled_from(m.INPUTS),
    st.integers(0, 4_000),
    st.one_of(st.none(), st.integers(0, 30_000)),
    st.builds(ls.Lease, st.integers(0, 5), st.integers(0, 100_000), st.integers(0, 2)),
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
        assert not went or actions in ([m.SPAWN], [m.FINISH])  # the latter under a lease that is lost
        assert went or m.SPAWN not in actions
        seen += actions
        if first_cause:
            assert machine.cause.kind == first_cause
        elif machine.cause.kind != m.CAUSE_NONE:
            first_cause = machine.cause.kind
        held = machine.tenure.lease
        if held is not None:
            assert held.token >= token
            token = held.token
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
    machine = running(lease=ls.Lease(1, 60_000, ls.ON_LOSS_STOP))
    begin = 60_000 - GRACE_MS - KILL_WAIT_MS - ls.LEASE_MARGIN_MS
    assert machine.deadline_ms() == begin
    assert machine.step(m.TICK, begin - 1) == []
    assert machine.step(m.TICK, begin) == [m.TERM]
    machine.step(m.FOUND, begin, number=1)
    assert machine.step(m.TICK, begin + GRACE_MS) == [m.KILL]
    assert machine.step(m.TICK, begin + GRACE_MS + KILL_WAIT_MS) == []
    assert (machine.state, machine.survivors) == (m.DRAINING, 1)


def test_a_long_grace_yields_to_the_lease_and_the_timeout() -> None:
    """Rule 3: a stop with an hour of grace does not outlive the lease nor the time limit."""
    leased = running(lease=ls.Lease(1, 60_000, ls.ON_LOSS_STOP))
    leased.step(m.STOP, 0, number=3_600_000)
    assert leased.step(m.TICK, 60_000 - KILL_WAIT_MS - ls.LEASE_MARGIN_MS) == [m.KILL]
    limited = running(timeout_ms=1_000)
    limited.step(m.STOP, 0, number=3_600_000)
    assert limited.step(m.TICK, 1_000 + GRACE_MS) == [m.KILL]


def test_the_grace_at_loss_is_the_leases_own_and_never_longer_than_the_specs() -> None:
    """A short ttl with a long grace is not lost at once; a lease cannot lengthen the grace."""
    short = running(lease=ls.Lease(1, 60_000, ls.ON_LOSS_STOP, 2_000))
    begin = 60_000 - 2_000 - KILL_WAIT_MS - ls.LEASE_MARGIN_MS
    assert short.deadline_ms() == begin
    assert short.step(m.TICK, begin) == [m.TERM]
    short.step(m.FOUND, begin, number=1)
    assert short.step(m.TICK, begin + 1_999) == [m.SCAN]
    assert short.step(m.TICK, begin + 2_000) == [m.KILL]
    long = running(lease=ls.Lease(1, 60_000, ls.ON_LOSS_STOP, 300_000))
    assert long.deadline_ms() == 60_000 - GRACE_MS - KILL_WAIT_MS - ls.LEASE_MARGIN_MS


def test_a_stop_at_loss_keeps_its_grace_when_the_lease_comes_back() -> None:
    """Begun is begun: a lease that is taken again during the ladder neither ends nor slows it."""
    machine = running(lease=ls.Lease(1, 60_000, ls.ON_LOSS_STOP, 2_000))
    begin = 60_000 - 2_000 - KILL_WAIT_MS - ls.LEASE_MARGIN_MS
    assert machine.step(m.TICK, begin) == [m.TERM]
    assert machine.step(m.LEASE, begin, lease=ls.Lease(2, 900_000, ls.ON_LOSS_STOP)) == []
    assert machine.step(m.TICK, begin + 2_000) == [m.KILL]


def test_renewals_that_cross_take_nothing_back() -> None:
    """An earlier deadline under the same token is an older word, unless it is over: then it is a release."""
    machine = running(lease=ls.Lease(3, 100_000, ls.ON_LOSS_STOP))
    machine.step(m.LEASE, 1_000, lease=ls.Lease(3, 90_000, ls.ON_LOSS_STOP))
    assert machine.tenure.lease is not None and machine.tenure.lease.deadline_ms == 100_000
    machine.step(m.LEASE, 1_000, lease=ls.Lease(3, 110_000, ls.ON_LOSS_STOP))
    assert machine.tenure.lease.deadline_ms == 110_000
    assert machine.step(m.LEASE, 2_000, lease=ls.Lease(3, 2_000, ls.ON_LOSS_STOP)) == [m.TERM]


def test_freeze_and_thaw_follow_the_lease() -> None:
    """The margin holds for a freeze too; a renewal thaws, a stale one freezes on."""
    machine = running(lease=ls.Lease(1, 20_000, ls.ON_LOSS_FREEZE))
    assert machine.step(m.TICK, 15_000) == [m.FREEZE]
    assert machine.step(m.TICK, 16_000) == []
    assert machine.step(m.LEASE, 17_000, lease=ls.Lease(1, 18_000, ls.ON_LOSS_FREEZE)) == []
    assert machine.step(m.LEASE, 18_000, lease=ls.Lease(0, 90_000, ls.ON_LOSS_FREEZE)) == []
    assert machine.step(m.LEASE, 19_000, lease=ls.Lease(1, 90_000, ls.ON_LOSS_FREEZE)) == [m.THAW]
    assert machine.deadline_ms() == 85_000
    assert machine.step(m.TICK, 85_000) == [m.FREEZE]
    assert machine.step(m.LEASE, 86_000, lease=ls.Lease(2, 85_500, ls.CONTINUE)) == [m.THAW]


def test_a_frozen_attempt_is_given_up_after_a_quarter_of_an_hour() -> None:
    """It is thawed to take the TERM, and has no grace: its right to run is long over."""
    machine = frozen()
    assert machine.deadline_ms() == 15_000 + ls.FROZEN_MAX_MS
    assert machine.step(m.LEASE, 20_000, lease=ls.Lease(1, 18_000, ls.ON_LOSS_FREEZE)) == []
    assert machine.step(m.TICK, 15_000 + ls.FROZEN_MAX_MS - 1) == []
    assert machine.step(m.TICK, 15_000 + ls.FROZEN_MAX_MS) == [m.THAW, m.TERM]
    assert machine.step(m.TICK, 15_000 + ls.FROZEN_MAX_MS) == [m.KILL]
    assert (machine.cause.kind, machine.verdict(9)) == ("lease", "stopped")


def frozen(*, timeout_ms: int | None = None) -> m.Machine:
    """A machine whose lease was lost at 15 s, frozen since."""
    machine = running(lease=ls.Lease(1, 20_000, ls.ON_LOSS_FREEZE), timeout_ms=timeout_ms)
    assert machine.step(m.TICK, 15_000) == [m.FREEZE]
    return machine


def test_the_time_limit_goes_on_while_frozen() -> None:
    """A frozen attempt whose run time is over is stopped for that, as if it ran."""
    machine = frozen(timeout_ms=60_000)
    assert machine.deadline_ms() == 60_000
    assert machine.step(m.TICK, 60_000) == [m.THAW, m.TERM]
    assert (machine.cause.kind, machine.verdict(15)) == ("timeout", "timed_out")


def test_whatever_ends_a_frozen_attempt_thaws_it_first() -> None:
    """A frozen tree takes no TERM; also what a killed child leaves behind is thawed."""
    assert frozen().step(m.STOP, 16_000, text="x") == [m.THAW, m.TERM]
    assert frozen().step(m.FAULT, 16_000) == [m.THAW, m.TERM]
    left = frozen()
    assert left.step(m.ENDED, 16_000) == [m.SCAN]
    assert left.step(m.FOUND, 16_000, number=1) == [m.THAW, m.TERM]
    assert left.cause.kind == "none"


def test_after_a_wake_a_lost_lease_is_frozen_and_given_up_half_a_minute_later() -> None:
    """Renew first, act after: what can be taken back is done at once, what cannot waits for the renewal."""
    machine = running(lease=ls.Lease(1, 60_000, ls.ON_LOSS_STOP))
    assert machine.step(m.WOKE, 3_600_000) == [m.FREEZE]
    assert machine.step(m.TICK, 3_600_000) == []
    assert machine.deadline_ms() == 3_600_000 + ls.WAKE_WAIT_MS
    assert machine.step(m.TICK, 3_600_000 + ls.WAKE_WAIT_MS - 1) == []
    assert machine.step(m.TICK, 3_600_000 + ls.WAKE_WAIT_MS) == [m.THAW, m.TERM]
    assert machine.cause.kind == "lease"


@pytest.mark.parametrize("token", [1, 2])
def test_a_renewal_after_a_wake_leaves_all_as_it_was(token: int) -> None:
    """The same lease renewed, or taken again under a higher token: the tree runs on."""
    machine = running(lease=ls.Lease(1, 60_000, ls.ON_LOSS_STOP))
    assert machine.step(m.WOKE, 3_600_000) == [m.FREEZE]
    renewed = ls.Lease(token, 3_700_000, ls.ON_LOSS_STOP)
    assert machine.step(m.LEASE, 3_601_000, lease=renewed) == [m.THAW]
    begin = 3_700_000 - GRACE_MS - KILL_WAIT_MS - ls.LEASE_MARGIN_MS
    assert machine.deadline_ms() == begin
    assert machine.step(m.TICK, begin) == [m.TERM]


def test_a_lease_that_runs_out_soon_after_a_wake_is_frozen_first_too() -> None:
    """The network may not be back yet when a deadline comes right after the wake."""
    machine = running(lease=ls.Lease(1, 60_000, ls.ON_LOSS_STOP))
    assert machine.step(m.WOKE, 35_000) == []
    assert machine.step(m.TICK, 40_000) == [m.FREEZE]
    assert machine.step(m.TICK, 64_999) == []
    assert machine.step(m.TICK, 65_000) == [m.THAW, m.TERM]


def test_a_long_sleep_while_frozen_leaves_time_to_renew() -> None:
    """The quarter of an hour may have passed in a sleep: half a minute remains."""
    machine = frozen()
    assert machine.step(m.WOKE, 9_000_000) == []
    assert machine.step(m.TICK, 9_000_000 + ls.WAKE_WAIT_MS - 1) == []
    assert machine.step(m.TICK, 9_000_000 + ls.WAKE_WAIT_MS) == [m.THAW, m.TERM]


def test_a_wake_changes_nothing_for_a_lease_that_continues_or_holds() -> None:
    """Without a loss there is nothing to freeze."""
    for lease in (None, ls.Lease(1, 60_000, ls.CONTINUE), ls.Lease(1, 9_000_000, ls.ON_LOSS_STOP)):
        machine = running(lease=lease)
        assert machine.step(m.WOKE, 3_600_000) == []
        assert machine.state == m.RUNNING


def test_the_time_limit_counts_sleep() -> None:
    """CLOCK_BOOTTIME: a limit that passed in a sleep ends the attempt at the wake, lease or not."""
    machine = running(timeout_ms=60_000, lease=ls.Lease(1, 60_000, ls.ON_LOSS_FREEZE))
    assert machine.step(m.WOKE, 3_600_000) == [m.TERM]
    assert machine.cause.kind == "timeout"


def test_an_end_of_its_own_is_kept_over_what_a_sleep_brought() -> None:
    """Rule 4: the child had ended before the limit and the lease ran out, both in the sleep before the scan's answer."""
    machine = running(timeout_ms=60_000, lease=ls.Lease(1, 60_000, ls.ON_LOSS_FREEZE))
    assert machine.step(m.ENDED, 1_000) == [m.SCAN]
    assert machine.step(m.WOKE, 3_600_000) == []
    assert machine.step(m.FOUND, 3_600_000, number=1) == [m.TERM]
    assert (machine.cause.kind, machine.verdict(None)) == ("none", "exited")


def test_waits_that_end_in_a_verdict_begin_anew_after_a_wake() -> None:
    """The release, the end of the killed and the last output get their time awake."""
    ready = made()
    assert (ready.step(m.WOKE, 600_000), ready.step(m.TICK, 629_999)) == ([], [])
    assert ready.step(m.TICK, 600_000 + m.RELEASE_WAIT_MS) == [m.FINISH]
    killing = running()
    killing.step(m.STOP, 0, number=0)
    assert killing.step(m.TICK, 0) == [m.KILL]
    killing.step(m.WOKE, 600_000)
    assert killing.step(m.TICK, 600_000) == [m.KILL]
    killing.step(m.TICK, 600_000 + KILL_WAIT_MS)
    assert killing.state == m.DRAINING
    killing.step(m.WOKE, 900_000)
    assert killing.step(m.TICK, 900_000 + m.QUIET_MS - 1) == []
    assert killing.step(m.TICK, 900_000 + m.QUIET_MS) == [m.FINISH]


@pytest.mark.parametrize("action", [ls.ON_LOSS_FREEZE, ls.ON_LOSS_STOP])
def test_nothing_is_started_under_a_lease_that_is_lost(action: int) -> None:
    """A release that comes too late finds an attempt without the right to run."""
    machine = made(lease=ls.Lease(1, 20_000, action))
    assert machine.step(m.GO, 15_000) == [m.FINISH]
    assert (machine.cause.kind, machine.verdict(None)) == ("lease", "never_started")
    again = made(lease=ls.Lease(1, 20_000, ls.ON_LOSS_FREEZE))
    again.step(m.LEASE, 15_000, lease=ls.Lease(2, 90_000, action))
    assert again.step(m.GO, 15_000) == [m.SPAWN]


def test_a_fenced_attempt_was_never_started() -> None:
    """The fence refuses between the release and the spawn."""
    machine = made()
    machine.step(m.GO, 0)
    assert machine.step(m.FENCED, 1, detail="why") == [m.FINISH]
    assert (machine.cause.kind, machine.cause.reason, machine.cause.detail) == ("fenced", "FENCED", "why")
    assert machine.verdict(None) == "never_started"


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


# --- silence ----------------------------------------------------------------------------------------------------------


def silent(idle_ms: int = 1_000, lease: ls.Lease | None = None) -> m.Machine:
    """A child that runs since 0 and may be silent for so long."""
    machine = m.Machine(
        now_ms=0, grace_ms=GRACE_MS, kill_wait_ms=KILL_WAIT_MS, timeout_ms=None, lease=lease, idle_ms=idle_ms
    )
    machine.step(m.GO, 0)
    machine.step(m.SPAWNED, 500)
    return machine


def test_silence_counts_from_the_start_and_from_each_output() -> None:
    """Not from when the shim was made, and not once the child has ended."""
    machine = silent()
    assert machine.deadline_ms() == 1_500
    assert machine.step(m.TICK, 1_499) == []
    machine.output_ms = 1_499
    assert machine.step(m.TICK, 2_498) == []
    assert machine.step(m.TICK, 2_499) == [m.TERM]
    assert (machine.cause.kind, machine.verdict(15)) == ("idle", "timed_out")
    ended = silent()
    ended.step(m.ENDED, 600)
    assert ended.step(m.TICK, 9_000) == []


def test_a_sleep_of_the_machine_is_no_silence() -> None:
    """What it waits for slept, too."""
    machine = silent()
    machine.step(m.WOKE, 60_000)
    assert machine.step(m.TICK, 60_999) == []
    assert machine.step(m.TICK, 61_000) == [m.TERM]


def test_what_is_frozen_is_not_silent() -> None:
    """It begins anew with the thaw."""
    machine = silent(idle_ms=50_000, lease=ls.Lease(1, 20_000, ls.ON_LOSS_FREEZE))
    assert machine.step(m.TICK, 20_000) == [m.FREEZE]
    assert machine.step(m.TICK, 200_000) == []
    assert machine.step(m.LEASE, 200_000, lease=ls.Lease(2, 900_000, ls.ON_LOSS_FREEZE)) == [m.THAW]
    assert machine.deadline_ms() == 250_000
