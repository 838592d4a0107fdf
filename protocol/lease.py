"""Leases: the right to run until a deadline, under a token that only rises.

Theory of operation. The plane grants a lease inside a signed command and renews it in the answer to a beat. The holder counts
from the moment it *sent* what was answered, on a clock that goes on while the machine sleeps, so its deadline is never later
than the plane's. Stopping begins early enough to be over before the deadline; the plane grants anew only after its own.

Rule 1: every transition is in TRANSITIONS. Rule 2: a deadline moves forward only. Rule 3: a lower token changes nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Final
from zlib import crc32

from protocol.commands import LeaseGrant, OnLoss
from protocol.limits import KILL_WAIT_MS, LEASE_MARGIN_MS, REGRANT_DELAY_MS

RENEW_JITTER_PERCENT: Final = 10
"""Of a third of the ttl."""


class LeaseState(StrEnum):
    """Where a lease is in its life."""

    HELD = "held"
    LOST = "lost"
    """Its deadline passed; the attempt follows `on_loss`."""
    RELEASED = "released"
    FENCED = "fenced"
    """Somebody holds a higher token."""


class LeaseInput(StrEnum):
    """What can happen to a lease."""

    RENEW = "renew"
    DEADLINE = "deadline"
    RELEASE = "release"
    SUPERSEDE = "supersede"
    ACQUIRE = "acquire"
    """A signed grant under a higher token, to the same attempt."""


TRANSITIONS: Final[Mapping[tuple[LeaseState, LeaseInput], LeaseState]] = MappingProxyType(
    {
        (LeaseState.HELD, LeaseInput.RENEW): LeaseState.HELD,
        (LeaseState.HELD, LeaseInput.DEADLINE): LeaseState.LOST,
        (LeaseState.HELD, LeaseInput.RELEASE): LeaseState.RELEASED,
        (LeaseState.HELD, LeaseInput.SUPERSEDE): LeaseState.FENCED,
        (LeaseState.HELD, LeaseInput.ACQUIRE): LeaseState.HELD,
        (LeaseState.LOST, LeaseInput.DEADLINE): LeaseState.LOST,
        (LeaseState.LOST, LeaseInput.RELEASE): LeaseState.RELEASED,
        (LeaseState.LOST, LeaseInput.SUPERSEDE): LeaseState.FENCED,
        (LeaseState.LOST, LeaseInput.ACQUIRE): LeaseState.HELD,
        (LeaseState.RELEASED, LeaseInput.RELEASE): LeaseState.RELEASED,
        (LeaseState.RELEASED, LeaseInput.SUPERSEDE): LeaseState.FENCED,
        (LeaseState.RELEASED, LeaseInput.ACQUIRE): LeaseState.HELD,
        (LeaseState.FENCED, LeaseInput.RELEASE): LeaseState.FENCED,
        (LeaseState.FENCED, LeaseInput.SUPERSEDE): LeaseState.FENCED,
    }
)
"""What is not here changes nothing: a late renewal does not revive a lease, it needs a new token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """One lease as its holder sees it; `deadline_ms` is CLOCK_BOOTTIME."""

    res: str
    token: int
    ttl_ms: int
    on_loss: OnLoss
    deadline_ms: int
    state: LeaseState = LeaseState.HELD
    boot_id: str = ""
    """The boot whose clock `deadline_ms` is of."""

    def step(self, happened: LeaseInput) -> "Lease":
        """The lease after `happened`; the same one where the table has no row."""
        return replace(self, state=TRANSITIONS.get((self.state, happened), self.state))

    def renewed(self, token: int, sent_ms: int, ttl_ms: int) -> "Lease":
        """After a renewal of `token` that was asked for at `sent_ms`: never an earlier deadline."""
        if token != self.token or self.state is not LeaseState.HELD:
            return self
        return replace(self, ttl_ms=ttl_ms, deadline_ms=max(self.deadline_ms, sent_ms + ttl_ms))

    def acquired(self, token: int, ttl_ms: int, on_loss: OnLoss, deadline_ms: int) -> "Lease":
        """After a grant of `token` to the same attempt: it must be higher than ours, also for the same holder."""
        after = TRANSITIONS.get((self.state, LeaseInput.ACQUIRE))
        if token <= self.token or after is None:
            return self
        return replace(self, token=token, ttl_ms=ttl_ms, on_loss=on_loss, deadline_ms=deadline_ms, state=after)

    def superseded(self, token: int) -> "Lease":
        """After word of a holder with `token`: fenced when it is higher than ours."""
        return self.step(LeaseInput.SUPERSEDE) if token > self.token else self

    def loss_begins_ms(self, grace_ms: int) -> int:
        """When `on_loss` must begin so that it is over before the deadline."""
        return self.deadline_ms - self.grace_at_loss_ms(grace_ms) - KILL_WAIT_MS - LEASE_MARGIN_MS

    def grace_at_loss_ms(self, grace_ms: int) -> int:
        """The grace a stop at lease loss gives: at most a third of the ttl, whatever the command allows."""
        return min(grace_ms, self.ttl_ms // 3)

    @property
    def renew_at_ms(self) -> int:
        """When a renewal is due: with two thirds of the ttl left, give or take RENEW_JITTER so that leases do not march in step."""
        begun_ms = self.deadline_ms - self.ttl_ms
        percent = crc32(f"{self.res} {self.token} {begun_ms}".encode()) % (2 * RENEW_JITTER_PERCENT + 1)
        return begun_ms + self.ttl_ms * (100 - RENEW_JITTER_PERCENT + percent) // 300


def granted(grant: LeaseGrant, received_ms: int, in_transit_ms: int, boot_id: str = "") -> Lease:
    """The lease of a command that was received at `received_ms` (BOOTTIME) after at most `in_transit_ms` under way."""
    return Lease(
        res=grant.res,
        token=grant.token,
        ttl_ms=grant.ttl_ms,
        on_loss=grant.on_loss,
        deadline_ms=received_ms - max(in_transit_ms, 0) + grant.ttl_ms,
        boot_id=boot_id,
    )


def regrant_at_ms(granted_ms: int, ttl_ms: int) -> int:
    """When the plane may grant a resource to another holder: its own grant, the ttl, and 15 s."""
    return granted_ms + ttl_ms + REGRANT_DELAY_MS
