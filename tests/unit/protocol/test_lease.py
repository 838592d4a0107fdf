"""Leases: times and tokens. (The table is in the property tests.)"""

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


def test_a_renewal_is_due_with_two_thirds_left() -> None:
    """Twenty seconds into sixty."""
    assert a_lease().renew_at_ms == 20_000


def test_the_plane_waits_longer_than_the_holder() -> None:
    """Its own grant, the ttl, and a delay."""
    assert regrant_at_ms(0, 60_000) == 60_000 + REGRANT_DELAY_MS
