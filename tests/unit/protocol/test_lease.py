"""Leases: times and tokens. (The table is in the property tests.)"""

import pytest

from protocol.commands import LeaseGrant, OnLoss
from protocol.lease import LeaseInput, LeaseState, granted, regrant_at_ms
from protocol.limits import KILL_WAIT_MS, LEASE_MARGIN_MS, REGRANT_DELAY_MS
from tests.support.builders import a_lease


def test_a_grant_counts_from_before_it_was_sent() -> None:
    """Time under way is taken off; a negative one is nobody's gain."""
    grant = LeaseGrant(res="exec:ex_1", token=3, ttl_ms=60_000, on_loss=OnLoss.STOP)
    assert granted(grant, 100_000, 2_000).deadline_ms == 158_000
    assert granted(grant, 100_000, -2_000).deadline_ms == 160_000
    assert granted(grant, 100_000, 0).token == 3


def test_a_renewal_counts_from_when_it_was_asked_for() -> None:
    """And never moves a deadline back."""
    lease = a_lease()
    assert lease.renewed(1, 20_000, 60_000).deadline_ms == 80_000
    assert lease.renewed(1, -10_000, 60_000).deadline_ms == 60_000
    assert lease.renewed(1, 20_000, 10_000).deadline_ms == 60_000


def test_a_renewal_of_another_token_or_of_a_lost_lease_changes_nothing() -> None:
    """It takes a new grant to come back."""
    lease = a_lease(token=2)
    assert lease.renewed(1, 20_000, 60_000) is lease
    assert lease.renewed(3, 20_000, 60_000) is lease
    lost = lease.step(LeaseInput.DEADLINE)
    assert lost.state is LeaseState.LOST
    assert lost.renewed(2, 20_000, 60_000) is lost


def test_a_higher_token_fences() -> None:
    """Ours and lower ones do not."""
    lease = a_lease(token=5)
    assert lease.superseded(6).state is LeaseState.FENCED
    assert lease.superseded(5) is lease
    assert lease.superseded(4) is lease


def test_stopping_is_over_before_the_deadline() -> None:
    """Grace is at most a third of the ttl, then the kill, then a margin."""
    lease = a_lease()
    assert lease.grace_at_loss_ms(300_000) == 20_000
    assert lease.grace_at_loss_ms(1_000) == 1_000
    assert lease.loss_begins_ms(300_000) + 20_000 + KILL_WAIT_MS + LEASE_MARGIN_MS == lease.deadline_ms


def test_a_renewal_is_due_with_two_thirds_left_give_or_take_a_tenth() -> None:
    """Twenty seconds into sixty, ±2: always the same for one grant, and leases of one moment are spread over it."""
    due = [a_lease(res=f"exec:ex_{number}").renew_at_ms for number in range(500)]
    assert due == [a_lease(res=f"exec:ex_{number}").renew_at_ms for number in range(500)]
    assert min(due) == 18_000 and max(due) == 22_000
    assert all(due.count(moment) < 60 for moment in due)
    moved = a_lease(deadline_ms=1_000_000 + 60_000)
    assert 1_018_000 <= moved.renew_at_ms <= 1_022_000


@pytest.mark.parametrize("state", [LeaseState.HELD, LeaseState.LOST, LeaseState.RELEASED])
def test_a_grant_under_a_higher_token_is_held_again(state: LeaseState) -> None:
    """With the ttl, the action and the deadline of the new grant, also an earlier one."""
    lease = a_lease(token=2, state=state, deadline_ms=90_000, boot_id="boot-1")
    again = lease.acquired(3, 30_000, OnLoss.FREEZE, 80_000)
    assert (again.token, again.ttl_ms, again.on_loss, again.deadline_ms) == (3, 30_000, OnLoss.FREEZE, 80_000)
    assert again.state is LeaseState.HELD and (again.res, again.boot_id) == (lease.res, "boot-1")


def test_a_grant_under_the_same_or_a_lower_token_or_to_a_fenced_holder_changes_nothing() -> None:
    """Also when it is the same runner that takes it again."""
    lease = a_lease(token=2, state=LeaseState.LOST)
    for token in (1, 2):
        assert lease.acquired(token, 30_000, OnLoss.STOP, 80_000) is lease
    fenced = a_lease(token=2, state=LeaseState.FENCED)
    assert fenced.acquired(3, 30_000, OnLoss.STOP, 80_000) is fenced


def test_a_grant_says_of_which_boots_clock_its_deadline_is() -> None:
    """BOOTTIME of another boot says nothing."""
    grant = LeaseGrant(res="exec:ex_1", token=3, ttl_ms=60_000, on_loss=OnLoss.STOP)
    assert granted(grant, 100_000, 0, "boot-1").boot_id == "boot-1"


def test_the_plane_waits_longer_than_the_holder() -> None:
    """Its own grant, the ttl, and a delay."""
    assert regrant_at_ms(0, 60_000) == 60_000 + REGRANT_DELAY_MS
