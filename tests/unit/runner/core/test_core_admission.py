"""Verdicts that need no disk: each reason, and each plan."""

from typing import Any

import pytest

from protocol.commands import Kind, WorktreeCreate, WorktreeRemove, parse_args
from protocol.errors import Reason
from protocol.limits import CLOCK_SKEW_MS, COMMAND_TTL_MS_MAX, GRACE_MS
from runner.core.admission import (
    attempt_plan,
    inside,
    lease_resource,
    refuse_args,
    refuse_header,
    removal_plan,
    worktree_plan,
)
from runner.core.policy import Policy
from tests.support.builders import NOW_MS, a_command, a_keyset, start_fields
from tests.support.engine import a_policy

CREATE = {"worktree_id": "wt_1", "repo": "/srv/repos/a", "base": "main"}
NEED = {"approvals": 1, "of": "owners"}


@pytest.mark.parametrize(
    ("over", "policy", "reason"),
    [
        ({}, {}, None),
        ({"exp": NOW_MS - CLOCK_SKEW_MS - 1, "iat": NOW_MS - 90_000, "nbf": NOW_MS - 90_000}, {}, Reason.EXPIRED),
        ({"nbf": NOW_MS + CLOCK_SKEW_MS + 1, "exp": NOW_MS + 200_000}, {}, Reason.NOT_YET),
        ({"exp": NOW_MS + COMMAND_TTL_MS_MAX + 1}, {}, Reason.TTL_TOO_LONG),
        ({}, {"kinds": frozenset()}, Reason.POLICY_DENIED),
        ({}, {"kinds": frozenset({"worktree.create"})}, Reason.POLICY_DENIED),
        ({"need": NEED}, {}, Reason.APPROVAL_MISSING),
        ({"kind": "execution.stop"}, {"kinds": frozenset()}, None),
        ({"kind": "a.b", "need": NEED, "stream": "ctl"}, {"kinds": frozenset()}, None),
        ({"kind": "execution.stop", "need": NEED}, {"kinds": frozenset()}, None),
    ],
)
def test_each_verdict_on_a_header(over: dict[str, Any], policy: dict[str, Any], reason: Reason | None) -> None:
    """What no policy can name is left to the arguments, which say why."""
    verdict = refuse_header(a_command(**over), a_keyset(), a_policy(**policy), NOW_MS)
    assert (verdict.reason if verdict else None) is reason


def test_nothing_is_admitted_by_a_policy_that_says_nothing() -> None:
    """The default denies."""
    verdict = refuse_header(a_command(), a_keyset(), Policy(digest=a_policy().digest), NOW_MS)
    assert verdict is not None and verdict.reason is Reason.POLICY_DENIED
    denied = refuse_args(a_command(), parse_args(a_command()), Policy(digest=a_policy().digest), 0)
    assert denied is not None and denied.reason is Reason.CAPACITY


@pytest.mark.parametrize(
    ("args", "over", "living", "reason"),
    [
        ({}, {}, 7, None),
        ({}, {}, 8, Reason.CAPACITY),
        ({"env": {"GIT_DIR": "/x"}}, {}, 0, Reason.ENV_DENIED),
        ({"env": {"APP_SECRET": "/x"}}, {}, 0, Reason.ENV_SECRET_NAME),
        ({"secrets": [{"name": "APP_SECRET", "sealed": "x"}]}, {}, 0, None),
        ({"secrets": [{"name": "PATH", "sealed": "x"}]}, {}, 0, Reason.ENV_DENIED),
        ({"cwd": {"type": "path", "path": "/srv"}}, {}, 0, Reason.CWD_OUTSIDE_ROOTS),
        ({"cwd": {"type": "worktree", "worktree_id": "wt_1"}}, {"pre": {"head": "a" * 40}}, 0, None),
        ({}, {"pre": {"head": "a" * 40}}, 0, Reason.PRECONDITION_FAILED),
        ({}, {"lease": {"res": "exec:ex_1", "token": 1, "ttl_ms": 1000, "on_loss": "stop"}}, 0, None),
        ({}, {"lease": {"res": "exec:ex_2", "token": 1, "ttl_ms": 1000, "on_loss": "stop"}}, 0, Reason.BAD_ARGS),
        (
            {"start_token": 2},
            {"lease": {"res": "exec:ex_1", "token": 1, "ttl_ms": 1000, "on_loss": "stop"}},
            0,
            Reason.FENCED,
        ),
    ],
)
def test_each_verdict_on_a_start(
    args: dict[str, Any], over: dict[str, Any], living: int, reason: Reason | None
) -> None:
    """By the command, the owner's policy and what lives already."""
    command = a_command(args=start_fields(**args), **over)
    verdict = refuse_args(command, parse_args(command), a_policy(), living)
    assert (verdict.reason if verdict else None) is reason


@pytest.mark.parametrize(
    ("repo", "over", "reason"),
    [
        ("/srv/repos/a", {}, None),
        ("/srv/repos", {}, None),
        ("/srv/repos2", {}, Reason.REPO_OUTSIDE_ROOTS),
        ("/srv/repos/a", {"pre": {"head": None}}, Reason.PRECONDITION_FAILED),
    ],
)
def test_each_verdict_on_a_creation(repo: str, over: dict[str, Any], reason: Reason | None) -> None:
    """A precondition on what is not there cannot hold."""
    command = a_command(kind=Kind.WORKTREE_CREATE, args=CREATE | {"repo": repo}, **over)
    verdict = refuse_args(command, parse_args(command), a_policy(), 0)
    assert (verdict.reason if verdict else None) is reason


@pytest.mark.parametrize(
    ("path", "roots", "held"),
    [
        ("/srv/work", ("/srv/work",), True),
        ("/srv/work/", ("/srv/work",), True),
        ("/srv/work/a/b", ("/srv/work",), True),
        ("/srv/work/./a", ("/srv/work",), True),
        ("/srv/workshop", ("/srv/work",), False),
        ("/srv", ("/srv/work",), False),
        ("/srv/work/../../etc", ("/srv/work",), False),
        ("/srv/work/../work/a", ("/srv/work",), True),
        ("/anything", ("/",), True),
        ("/srv/work", (), False),
        ("/b/x", ("/a", "/b"), True),
    ],
)
def test_a_path_is_inside_a_root_or_not_by_its_text(path: str, roots: tuple[str, ...], held: bool) -> None:
    """Where links lead is judged by whoever opens it."""
    assert inside(path, roots) is held


def test_a_plan_in_a_worktree_names_it_and_its_head() -> None:
    """The path is looked up when it is needed."""
    args = start_fields(cwd={"type": "worktree", "worktree_id": "wt_1", "subdir": "a/b"})
    command = a_command(args=args, pre={"head": "a" * 40})
    start = parse_args(command)
    plan = attempt_plan(command, start, a_policy(), {"HOME": "/h"})  # type: ignore[arg-type]
    assert (plan.cwd, plan.worktree_id, plan.subdir, plan.pre_head) == (None, "wt_1", "a/b", "a" * 40)
    assert plan.grace_ms == GRACE_MS and plan.env == {"HOME": "/h"}


def test_a_command_may_set_what_a_child_would_inherit() -> None:
    """Where the owner allows the name."""
    command = a_command(args=start_fields(env={"LANG": "de"}))
    plan = attempt_plan(command, parse_args(command), a_policy(), {"LANG": "C", "TZ": "UTC"})  # type: ignore[arg-type]
    assert plan.env == {"LANG": "de", "TZ": "UTC"}


def test_plans_of_worktrees_carry_the_command_they_come_from() -> None:
    """Effects are named after it, so a second try finds the first."""
    create = a_command(kind=Kind.WORKTREE_CREATE, args=CREATE)
    made = worktree_plan(create, WorktreeCreate(**CREATE), a_policy())
    assert (made.worktree_id, made.cmd_id, made.branch, made.roots) == ("wt_1", "cmd_1", None, a_policy().roots)
    remove = a_command(kind=Kind.WORKTREE_REMOVE, args={"worktree_id": "wt_1"}, pre={"head": "b" * 40})
    gone = removal_plan(remove, WorktreeRemove(worktree_id="wt_1", force=True))
    assert (gone.worktree_id, gone.cmd_id, gone.force, gone.pre_head) == ("wt_1", "cmd_1", True, "b" * 40)


def test_the_lease_of_an_execution_has_its_name() -> None:
    """One grammar for both sides."""
    assert lease_resource("ex_1") == "exec:ex_1"
