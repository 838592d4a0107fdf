"""Commands: the header rule by rule, the arguments kind by kind."""

from typing import Any

import pytest

from protocol import strict_json
from protocol.commands import (
    ARGS,
    STREAM_OF,
    ArgsRefused,
    Command,
    ExecutionStart,
    ExecutionStop,
    Kind,
    LeaseAcquire,
    Stream,
    WorktreeCreate,
    parse_args,
)
from protocol.errors import Reason
from protocol.ids import GENESIS
from protocol.limits import ARGV_ITEM_BYTES_MAX, COMMAND_TTL_MS_MAX, SAFETY_TTL_MS_MAX
from tests.support.builders import a_command, an_attempt, command_fields, start_fields, stop_fields

DIGEST = "sha256:" + "aa" * 32
LEASE = {"res": "exec:ex_1", "token": 1, "ttl_ms": 60_000, "on_loss": "stop"}


def test_a_command_is_read_from_its_bytes() -> None:
    """The header's fields are there; optional ones are None."""
    command = a_command(lease=LEASE, trace="00-" + "a" * 32 + "-" + "b" * 16 + "-01", pre={"head": "0" * 40})
    assert command.kind == Kind.EXECUTION_START
    assert command.lease is not None
    assert command.actor is None
    assert command.ttl_ms_max == COMMAND_TTL_MS_MAX
    assert a_command(kind=Kind.EXECUTION_STOP).ttl_ms_max == SAFETY_TTL_MS_MAX


@pytest.mark.parametrize(
    "over",
    [
        {"v": 2},
        {"v": True},
        {"v": "1"},
        {"cmd_id": ""},
        {"cmd_id": "a b"},
        {"cmd_id": "cmd_1\n"},
        {"cmd_id": "x" * 65},
        {"kind": "start"},
        {"kind": "Execution.start"},
        {"kind": "execution..start"},
        {"kind": "a.b.c.d.e"},
        {"aud": {"org": "o", "runner": "r"}},
        {"aud": {"org": "o", "runner": "r", "inc": 0}},
        {"aud": {"org": "o", "runner": "r", "inc": 1, "labels": []}},
        {"aud": "o/r"},
        {"iss": ""},
        {"stream": "other"},
        {"seq": None},
        {"prev": None},
        {"seq": 0},
        {"seq": -1},
        {"seq": True},
        {"seq": "1"},
        {"seq": 1, "prev": DIGEST},
        {"seq": 2, "prev": "sha256:00"},
        {"seq": 2, "prev": DIGEST.upper()},
        {"stream": "safety", "seq": 1, "prev": GENESIS},
        {"stream": "safety", "seq": None, "prev": GENESIS},
        {"stream": "safety", "seq": 1, "prev": None},
        {"iat": -1},
        {"exp": None},
        {"keyset_min": 0},
        {"lease": {**LEASE, "res": "ex_1"}},
        {"lease": {**LEASE, "ttl_ms": 1}},
        {"lease": {**LEASE, "on_loss": "explode"}},
        {"lease": {**LEASE, "epoch": 1}},
        {"pre": {"head": "xyz"}},
        {"need": {"approvals": 0, "of": "g"}},
        {"actor": {"sub": "u", "role": "root"}},
        {"trace": "00-xyz"},
        {"args": []},
        {"unknown": 1},
    ],
)
def test_a_header_that_is_not_exact_is_refused(over: dict[str, Any]) -> None:
    """Wrong types, forms and bounds, unknown fields, and numbers where the stream has none."""
    with pytest.raises(ValueError, match=r".") as refused:
        Command.parse(strict_json.dumps(command_fields(**over)))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "name", ["v", "cmd_id", "kind", "aud", "iss", "stream", "seq", "prev", "iat", "nbf", "exp", "keyset_min", "args"]
)
def test_a_required_field_cannot_be_left_out(name: str) -> None:
    """Also those that may be null are stated."""
    fields = command_fields()
    del fields[name]
    with pytest.raises(ValueError, match=name):
        Command.parse(strict_json.dumps(fields))


def test_every_kind_has_a_model_and_a_stream() -> None:
    """The tables are complete."""
    assert set(ARGS) == set(STREAM_OF) == set(Kind)
    assert {kind for kind in Kind if STREAM_OF[kind] is Stream.SAFETY} == {
        Kind.EXECUTION_STOP,
        Kind.PTY_CLOSE,
        Kind.LEASE_RELEASE,
    }


def test_arguments_are_read_by_kind() -> None:
    """Each kind gives its own model."""
    start = parse_args(a_command())
    assert isinstance(start, ExecutionStart)
    assert start.attempt == an_attempt("ex_1", 1)
    assert isinstance(parse_args(a_command(kind=Kind.EXECUTION_STOP)), ExecutionStop)
    by_command = stop_fields(target={"type": "command", "cmd_id": "cmd_0"}, grace_ms=0)
    assert isinstance(parse_args(a_command(kind=Kind.EXECUTION_STOP, args=by_command)), ExecutionStop)
    create = {"worktree_id": "wt_1", "repo": "/srv/repo", "base": "main"}
    made = parse_args(a_command(kind=Kind.WORKTREE_CREATE, args=create))
    assert isinstance(made, WorktreeCreate)
    assert made.branch is None


def test_an_acquire_names_the_attempt_that_is_to_hold_its_lease() -> None:
    """In order with the starts: it is no word that may overtake them."""
    args = {"execution_id": "ex_1", "start_token": 2}
    acquire = parse_args(a_command(kind=Kind.LEASE_ACQUIRE, args=args, lease=LEASE | {"token": 3}))
    assert isinstance(acquire, LeaseAcquire) and acquire.attempt == an_attempt("ex_1", 2)
    for bad in ({}, {"execution_id": "ex_1"}, args | {"start_token": 0}, args | {"token": 3}):
        with pytest.raises(ArgsRefused) as refused:
            parse_args(a_command(kind=Kind.LEASE_ACQUIRE, args=bad))
        assert refused.value.reason is Reason.BAD_ARGS


def test_a_kind_from_the_future_is_told_apart_from_bad_arguments() -> None:
    """The header is good, so the number is consumed, and the reason says what was not understood."""
    with pytest.raises(ArgsRefused) as refused:
        parse_args(a_command(kind="disk.format", args={}))
    assert refused.value.reason is Reason.UNSUPPORTED_KIND


def test_a_kind_travels_on_its_stream() -> None:
    """A start on the safety stream would be outside all order; a stop on ctl would wait behind it."""
    for command in (
        a_command(stream="safety"),
        a_command(kind=Kind.EXECUTION_STOP, stream="ctl"),
        a_command(kind=Kind.LEASE_ACQUIRE, stream="safety", seq=None, prev=None),
    ):
        with pytest.raises(ArgsRefused) as refused:
            parse_args(command)
        assert refused.value.reason is Reason.WRONG_STREAM


@pytest.mark.parametrize(
    "args",
    [
        start_fields(argv=[]),
        start_fields(argv=[""]),
        start_fields(argv=["a\0b"]),
        start_fields(argv="make"),
        start_fields(argv=["x" * (ARGV_ITEM_BYTES_MAX + 1)]),
        start_fields(argv=["é" * (ARGV_ITEM_BYTES_MAX // 2 + 1)]),
        start_fields(argv=["x"] * 1025),
        start_fields(start_token=0),
        start_fields(execution_id="../x"),
        start_fields(cwd="/srv"),
        start_fields(cwd={"type": "path", "path": "srv"}),
        start_fields(cwd={"type": "path", "path": "/srv/../etc"}),
        start_fields(cwd={"type": "path", "path": "/srv\0"}),
        start_fields(cwd={"type": "path", "path": "/" + "x" * 4096}),
        start_fields(cwd={"type": "other", "path": "/srv"}),
        start_fields(cwd={"type": "worktree", "worktree_id": "wt_1", "subdir": "/abs"}),
        start_fields(cwd={"type": "worktree", "worktree_id": "wt_1", "subdir": "a/../b"}),
        start_fields(cwd={"type": "worktree", "worktree_id": "wt_1", "subdir": "a//b"}),
        start_fields(env={"": "x"}),
        start_fields(env={"A=B": "x"}),
        start_fields(env={"A\0": "x"}),
        start_fields(env={"A": "x\0"}),
        start_fields(env={"A": 1}),
        start_fields(secrets=[{"name": "T=", "sealed": "x"}]),
        start_fields(secrets=[{"name": "T", "sealed": "x"}] * 2),
        start_fields(env={"T": "x"}, secrets=[{"name": "T", "sealed": "x"}]),
        start_fields(timeout_ms=0),
        start_fields(grace_ms=-1),
        start_fields(grace_ms=300_001),
        start_fields(shell=True),
    ],
)
def test_bad_arguments_of_a_start_are_refused(args: dict[str, Any]) -> None:
    """Closed, bounded, and nothing an exec could not take."""
    with pytest.raises(ArgsRefused) as refused:
        parse_args(a_command(args=args))
    assert refused.value.reason is Reason.BAD_ARGS


def test_the_bounds_of_a_start_are_inside() -> None:
    """The longest argument, in bytes, and every optional field."""
    args = start_fields(
        argv=["é" * (ARGV_ITEM_BYTES_MAX // 2)],
        env={"A": "", "lower.with-dots": "x"},
        secrets=[{"name": "T", "sealed": "x"}],
        timeout_ms=1,
        grace_ms=0,
        cwd={"type": "worktree", "worktree_id": "wt_1", "subdir": "a/b"},
    )
    assert isinstance(parse_args(a_command(args=args)), ExecutionStart)


def test_a_refusal_shows_nothing_of_the_arguments() -> None:
    """Names that a terminal would obey are replaced, tags and values are left out."""
    evil = "\x1b[31mhunter2"
    for args in (
        start_fields(env={evil: 1}),
        start_fields(cwd={"type": evil}),
        start_fields(**{evil: 1}),
        start_fields(execution_id=evil),
    ):
        with pytest.raises(ArgsRefused) as refused:
            parse_args(a_command(args=args))
        assert "hunter2" not in str(refused.value)
        assert "\x1b" not in str(refused.value)
