"""Leases as the control plane grants them: what a beat renews, and what is granted anew. Pure.

Theory of operation. A grant runs for its ttl from the moment it was numbered or renewed, on the plane's own clock, which counts while
the machine sleeps. The holder counts from an earlier moment, so its deadline is never later. What ran out is not revived: it is
granted anew to the same attempt under a higher token, and no earlier than REGRANT_DELAY_MS after the grant before. After a restart
every living lease counts as granted at the start, so nothing is granted early.

A plane that comes back from a backup has forgotten tokens that it gave out. So a token is also at least the age of what it is for,
in seconds: what was forgotten is outdone by the next one, and no attempt has the name of another.

Rule 1: only a grant that runs is renewed, and only under its own token. Rule 2: tokens rise. Rule 3: what is not wanted any more
(stopped, superseded, final) is not granted again.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from controlplane.rows import ExecutionState
from protocol.errors import Reason
from protocol.ids import Attempt, ExecutionId, FencingToken
from protocol.lease import regrant_at_ms
from protocol.limits import LEASE_TTL_MS
from protocol.messages import HeldLease, Renewal

_FOR_GOOD: Final = frozenset({Reason.UNKNOWN_TARGET, Reason.UNSUPPORTED_KIND})
"""A runner that refused a grant for one of these refuses the next one, too."""


def lease_resource(execution_id: str) -> str:
    """The name under which an execution's lease is granted."""
    return f"exec:{execution_id}"


def worktree_resource(worktree_id: str) -> str:
    """The name under which the orders about a worktree get their tokens."""
    return f"worktree:{worktree_id}"


def token_floor(created_ms: int, now_ms: int) -> int:
    """The lowest token to give out now for what was created at `created_ms`."""
    return 1 + max(now_ms - created_ms, 0) // 1000


@dataclass(frozen=True, slots=True)
class Grant:
    """A lease as it was granted or renewed last, at `at_ms` of the plane's own clock."""

    token: int
    at_ms: int
    ttl_ms: int = LEASE_TTL_MS

    def runs(self, now_ms: int) -> bool:
        """Whether it may still be renewed."""
        return now_ms < self.at_ms + self.ttl_ms

    @property
    def regrant_at_ms(self) -> int:
        """When the resource may be granted anew."""
        return regrant_at_ms(self.at_ms, self.ttl_ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class Living:
    """An attempt that is not final, as beats are answered from it."""

    execution_id: str
    start_token: int
    token: int
    """Of the lease it has now."""
    cmd_id: str
    """Its start."""
    state: ExecutionState
    sent: bool = True
    """Whether its start was ever signed: else no runner can know it."""
    stop_cmd_id: str | None = None
    superseded_by: str | None = None
    """The start of the attempt that took its place."""
    lease_refused: str | None = None

    @property
    def attempt(self) -> Attempt:
        """Its name in parts."""
        return Attempt(ExecutionId(self.execution_id), FencingToken(self.start_token))

    @property
    def name(self) -> str:
        """Its name."""
        return self.attempt.name

    @property
    def res(self) -> str:
        """The resource it holds."""
        return lease_resource(self.execution_id)

    @property
    def wants_lease(self) -> bool:
        """Whether a lease that ran out is to be granted again."""
        wanted = self.stop_cmd_id is None and self.superseded_by is None
        return wanted and self.state is ExecutionState.RUNNING and self.lease_refused not in _FOR_GOOD


@dataclass(frozen=True, slots=True)
class Renewed:
    """The answers to the leases of a beat, and the grants that go on, by attempt."""

    answers: tuple[Renewal, ...]
    grants: Mapping[str, Grant]


def renew(held: Iterable[HeldLease], living: Collection[Living], grants: Mapping[str, Grant], now_ms: int) -> Renewed:
    """Answer the leases of a beat from the living attempts of its runner."""
    current = {row.res: row for row in living if row.superseded_by is None}
    fenced = {row.res for row in living if row.superseded_by is not None}
    answers: list[Renewal] = []
    renewed: dict[str, Grant] = {}
    for lease in held:
        row = current.get(lease.res)
        reason = _refusal(lease, row, grants, now_ms, fenced=lease.res in fenced)
        if reason is not None or row is None:
            answers.append(Renewal(res=lease.res, token=lease.token, reason=reason))
            continue
        renewed[row.name] = Grant(lease.token, now_ms)
        answers.append(Renewal(res=lease.res, token=lease.token, ttl_ms=LEASE_TTL_MS))
    return Renewed(tuple(answers), renewed)


def _refusal(
    lease: HeldLease, row: Living | None, grants: Mapping[str, Grant], now_ms: int, *, fenced: bool
) -> Reason | None:
    if row is None:
        return Reason.FENCED if fenced else Reason.UNKNOWN_TARGET
    if lease.token < row.token:
        return Reason.FENCED
    if lease.token > row.token:
        # No token of ours: it was granted by nobody we know.
        return Reason.UNKNOWN_TARGET
    grant = grants.get(row.name)
    return None if grant is not None and grant.runs(now_ms) else Reason.EXPIRED


@dataclass(frozen=True, slots=True)
class Regrant:
    """A lease that is to be granted anew, under a token above `above`."""

    attempt: Attempt
    above: int


def due(
    living: Iterable[Living],
    grants: Mapping[str, Grant],
    told: Iterable[HeldLease],
    named: Collection[str],
    now_ms: int,
) -> list[Regrant]:
    """Leases to grant anew now.

    Args:
        living: the living attempts of a runner.
        grants: by attempt.
        told: leases that its beat holds or has lost: a token we do not know must be outdone.
        named: attempts that its beat names. What lives there no more wants no lease.
        now_ms: the plane's own clock.
    """
    tokens = {lease.res: lease.token for lease in told}
    found: list[Regrant] = []
    for row in living:
        grant = grants.get(row.name)
        there = row.name in named or row.res in tokens
        if row.wants_lease and there and grant is not None and now_ms >= grant.regrant_at_ms:
            found.append(Regrant(row.attempt, max(row.token, tokens.get(row.res, 0))))
    return found
