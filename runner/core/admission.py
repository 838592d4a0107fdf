"""Verdicts on a command whose number is consumed: what it asks for × the owner's policy × what this machine holds.

Nothing here touches the disk: what only the disk knows (does the directory exist, where does a link lead) is judged by the adapter
that is about to use it, and refused with the same reasons.
"""

import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from protocol.commands import (
    STREAM_OF,
    Args,
    Command,
    ExecutionSignal,
    ExecutionStart,
    Kind,
    LeaseAcquire,
    Overflow,
    PathCwd,
    PtyOpen,
    Start,
    Stream,
    WorktreeCreate,
    WorktreeCwd,
    WorktreeRemove,
)
from protocol.errors import Reason
from protocol.ids import CommandId, WorktreeId
from protocol.keyset import Keyset
from protocol.limits import GRACE_MS
from protocol.replay import freshness
from runner.core.environment import refuse_env, refuse_names, terminal_env
from runner.core.plans import AttemptPlan, RemovalPlan, TerminalPlan, WorktreePlan
from runner.core.policy import Policy

PENDING_MAX: Final = 1024
"""Commands whose effect is queued or under way: beyond it the control plane is told CAPACITY instead of filling memory."""


RETRY_AFTER_MS: Final = 30 * 1000
"""What is short now is asked for again after this; repeated refusals double it."""
RETRY_AFTER_MS_MAX: Final = 5 * 60 * 1000


@dataclass(frozen=True, slots=True)
class Refusal:
    """A no with its reason; `detail` is for a person."""

    reason: Reason
    detail: str = ""
    retry_after_ms: int | None = None
    """When to ask again: what is short now comes back by itself. None: asking again changes nothing."""


def refuse_header(header: Command, keyset: Keyset, policy: Policy, plane_ms: int) -> Refusal | None:
    """Judge everything of a header that needs no arguments."""
    stale = freshness(header, plane_ms)
    if stale is not None:
        return Refusal(stale)
    if header.stream is Stream.SAFETY:
        # Whatever is wrong with keys' age or policy, a stop is a stop.
        return None
    if plane_ms > keyset.exp:
        return Refusal(Reason.KEYSET_TOO_OLD, "the keyset has expired")
    if STREAM_OF.get(header.kind) is not Stream.CTL:
        # No policy can admit it: `parse_args` says whether it is unknown or on the wrong stream.
        return None
    if policy.kinds.isdisjoint(_RIGHTS.get(header.kind, (header.kind,))):
        return Refusal(Reason.POLICY_DENIED, "the owner's policy does not admit this kind")
    if header.need is not None:
        return Refusal(Reason.APPROVAL_MISSING, "it wants approvals, and none is given")
    return None


_STARTS: Final = (Kind.EXECUTION_START, Kind.PTY_OPEN)
_RIGHTS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {Kind.LEASE_ACQUIRE: _STARTS, Kind.EXECUTION_SIGNAL: _STARTS, Kind.PTY_ATTACH: (Kind.PTY_OPEN,)}
)
"""Kinds one of which covers another: who may start may keep what was started alive, signal it, and let people look at it."""


def refuse_args(header: Command, args: Args, policy: Policy, living: int) -> Refusal | None:
    """Judge the arguments of a command that the policy admits by its kind."""
    match args:
        case Start():
            return _refuse_start(header, args, policy, living)
        case ExecutionSignal():
            allowed = args.signal in policy.signals
            return None if allowed else Refusal(Reason.POLICY_DENIED, "the owner's policy does not admit this signal")
        case LeaseAcquire():
            return _refuse_lease(header, lease_resource(args.execution_id), 1)
        case WorktreeRemove():
            return _refuse_worktree_lease(header, args.worktree_id)
        case WorktreeCreate():
            if header.pre is not None:
                return Refusal(Reason.PRECONDITION_FAILED, "a worktree that is not there has no head")
            if not inside(args.repo, policy.roots):
                return Refusal(Reason.REPO_OUTSIDE_ROOTS)
            return _refuse_worktree_lease(header, args.worktree_id)
        case _:
            return None


def _refuse_start(header: Command, start: Start, policy: Policy, living: int) -> Refusal | None:
    if living >= policy.concurrent_max:
        return Refusal(Reason.CAPACITY, f"{policy.concurrent_max} attempts are the owner's limit", RETRY_AFTER_MS)
    names = [secret.name for secret in start.secrets]
    denied = refuse_env(start.env, policy) or refuse_names(names, policy)
    if denied is not None:
        return Refusal(*denied)
    if isinstance(start.cwd, PathCwd):
        if not inside(start.cwd.path, policy.roots):
            return Refusal(Reason.CWD_OUTSIDE_ROOTS)
        if header.pre is not None:
            return Refusal(Reason.PRECONDITION_FAILED, "only a managed worktree has a head to compare")
    if header.lease is None:
        return None
    return _refuse_lease(header, lease_resource(start.execution_id), start.start_token)


def _refuse_lease(header: Command, resource: str, token_min: int) -> Refusal | None:
    lease = header.lease
    if lease is None:
        return Refusal(Reason.BAD_ARGS, "it carries no lease")
    if lease.res != resource:
        return Refusal(Reason.BAD_ARGS, "the lease is for another resource")
    if lease.token < token_min:
        return Refusal(Reason.FENCED, "the lease's token is below the attempt's")
    return None


def _refuse_worktree_lease(header: Command, worktree_id: str) -> Refusal | None:
    return None if header.lease is None else _refuse_lease(header, worktree_resource(worktree_id), 1)


def inside(path: str, roots: tuple[str, ...]) -> bool:
    """Whether `path`, by its text alone, is one of `roots` or below one."""
    plain = posixpath.normpath(path)
    return any(plain == root or plain.startswith(root.rstrip("/") + "/") for root in roots)


def lease_resource(execution_id: str) -> str:
    """The name under which an execution's lease is granted."""
    return f"exec:{execution_id}"


def worktree_resource(worktree_id: str) -> str:
    """The name under which the lease on a worktree is granted."""
    return f"worktree:{worktree_id}"


def attempt_plan(header: Command, start: Start, policy: Policy, base: Mapping[str, str]) -> AttemptPlan:
    """What an admitted start will do. `base` is what children inherit of the machine."""
    managed = start.cwd if isinstance(start.cwd, WorktreeCwd) else None
    grace_ms = GRACE_MS if start.grace_ms is None else start.grace_ms
    plan = AttemptPlan(
        attempt=start.attempt,
        cmd_id=CommandId(header.cmd_id),
        argv=tuple(start.argv),
        cwd=start.cwd.path if isinstance(start.cwd, PathCwd) else None,
        worktree_id=WorktreeId(managed.worktree_id) if managed else None,
        subdir=managed.subdir if managed else None,
        pre_head=header.pre.head if header.pre else None,
        env={**(terminal_env(base) if isinstance(start, PtyOpen) else base), **start.env},
        secrets={secret.name: secret.sealed for secret in start.secrets},
        timeout_ms=start.timeout_ms,
        grace_ms=min(grace_ms, policy.grace_ms_max),
        roots=policy.roots,
        token=header.lease.token if header.lease else start.start_token,
        outlive=policy.outlive,
        idle_ms=start.idle_timeout_ms,
    )
    match start:
        case ExecutionStart():
            key = None if start.stdin is None else start.stdin.key
            return replace(plan, overflow=start.overflow, input_key=key, events=start.events)
        case PtyOpen():
            return replace(plan, overflow=Overflow.HEAD_TAIL, terminal=_terminal_plan(start))
        case _:
            raise AssertionError("a start is one or the other")


def _terminal_plan(start: PtyOpen) -> TerminalPlan:
    return TerminalPlan(
        rows=start.size.rows, cols=start.size.cols, size_policy=start.size_policy, background=start.background
    )


def worktree_plan(header: Command, create: WorktreeCreate, policy: Policy) -> WorktreePlan:
    """What an admitted worktree.create will do."""
    return WorktreePlan(
        worktree_id=WorktreeId(create.worktree_id),
        cmd_id=CommandId(header.cmd_id),
        repo=create.repo,
        base=create.base,
        branch=create.branch,
        roots=policy.roots,
        token=header.lease.token if header.lease else 0,
    )


def removal_plan(header: Command, remove: WorktreeRemove) -> RemovalPlan:
    """What an admitted worktree.remove will do."""
    return RemovalPlan(
        worktree_id=WorktreeId(remove.worktree_id),
        cmd_id=CommandId(header.cmd_id),
        force=remove.force,
        pre_head=header.pre.head if header.pre else None,
        token=header.lease.token if header.lease else 0,
    )
