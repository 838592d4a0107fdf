"""Everything a plane, a stranger or the wire can get wrong: each has a stable reason, and none has an effect."""

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest

from protocol import strict_json
from protocol.commands import Kind
from protocol.envelope import PayloadType, seal
from protocol.errors import Reason
from protocol.limits import CLOCK_SKEW_MS, COMMAND_TTL_MS_MAX, ENVELOPE_BYTES_MAX, SAFETY_TTL_MS_MAX
from protocol.messages import Need
from protocol.receipt import Outcome
from runner.core.effects import (
    CreateWorktree,
    Effect,
    Note,
    Offer,
    Persist,
    PrepareAttempt,
    RemoveWorktree,
    ReportAgain,
    Say,
    StopAttempt,
)
from runner.core.journaling import PutCommand, PutMark, PutReceipt
from tests.support.builders import HOUR_MS, NOW_MS, a_key, a_keyset, a_verified_keyset
from tests.support.engine import Turn, World, a_policy

DEEDS: tuple[type[Effect], ...] = (PrepareAttempt, CreateWorktree, RemoveWorktree, StopAttempt)
"""What a bad input must never lead to."""


def assert_untouched(world: World, turn: Turn, reason: Reason) -> None:
    """Refused with `reason`, no number consumed, nothing journaled, and the next good command goes on."""
    assert turn.refused.reason is reason
    assert not any(turn.has(deed) for deed in DEEDS) and not turn.has(Persist) and not turn.has(Offer)
    before = world.engine.ledger.ctl.hw
    assert before == world.journal.marks[1].hw if world.journal.marks else before == 0


def assert_consumed(world: World, turn: Turn, reason: Reason) -> None:
    """Refused with `reason` in one signed receipt, its number consumed, and no deed."""
    assert (turn.receipt.outcome, turn.receipt.reason) == (Outcome.REFUSED, reason)
    assert not any(turn.has(deed) for deed in DEEDS)
    writes = [write for effect in turn.of(Persist) for write in effect.writes]
    assert [type(write) for write in writes[-2:]] in ([PutCommand, PutReceipt], [PutMark, PutCommand, PutReceipt][-2:])
    assert world.engine.ledger.ctl == world.mark
    assert world.engine.attempts.living == 0


def wrapper(env: bytes) -> dict[str, Any]:
    """The JSON of an envelope."""
    decoded: dict[str, Any] = json.loads(env)
    return decoded


def packed(env: dict[str, Any]) -> bytes:
    """An envelope of a wrapper that a stranger wrote."""
    return json.dumps(env).encode()


def sealed(payload: bytes, kind: PayloadType = PayloadType.COMMAND, *names: str) -> bytes:
    """Any bytes, signed."""
    return seal(payload, kind, [a_key(name) for name in names or ("command",)])


def payload_of(env: bytes) -> bytes:
    """What was signed."""
    return base64.b64decode(wrapper(env)["payload"])


def forged(env: bytes) -> bytes:
    """The payload of `env` with another directory, under the old signature."""
    changed = wrapper(env)
    changed["payload"] = base64.b64encode(payload_of(env).replace(b"/srv/work", b"/srv/evil")).decode()
    return packed(changed)


def non_canonical(env: bytes) -> bytes:
    """The same payload in a base64 text whose last character has bits that mean nothing."""
    changed = wrapper(env)
    text = base64.b64encode(payload_of(env) + b" " * ((1 - len(payload_of(env))) % 3)).decode()
    assert text.endswith("==")
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    last = alphabet[alphabet.index(text[-3]) ^ 1]
    changed["payload"] = text[:-3] + last + "=="
    return packed(changed)


def respelled(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    """The payload with `old` written as `new`, and signed like that."""

    def spell(env: bytes) -> bytes:
        payload = payload_of(env)
        assert old in payload
        return sealed(payload.replace(old, new, 1))

    return spell


def with_wrapper(**over: Any) -> Callable[[bytes], bytes]:
    """The envelope with other fields in its wrapper."""
    return lambda env: packed(wrapper(env) | over)


UNCONSUMED: dict[str, tuple[Callable[[bytes], bytes], Reason]] = {
    "forged": (forged, Reason.BAD_SIG),
    "truncated": (lambda env: env[:-10], Reason.BAD_ENVELOPE),
    "cut to nothing": (lambda _env: b"", Reason.BAD_ENVELOPE),
    "not JSON": (lambda _env: b"\x00\xff\xfe", Reason.BAD_ENVELOPE),
    "oversized envelope": (lambda env: env + b" " * ENVELOPE_BYTES_MAX, Reason.BAD_ENVELOPE),
    "oversized payload": (
        with_wrapper(payload=base64.b64encode(b" " * (64 * 1024 + 1)).decode()),
        Reason.BAD_ENVELOPE,
    ),
    "unknown key": (lambda env: sealed(payload_of(env), PayloadType.COMMAND, "stranger"), Reason.UNKNOWN_KEY),
    "a good key beside an unknown one": (
        lambda env: sealed(payload_of(env), PayloadType.COMMAND, "command", "stranger"),
        Reason.UNKNOWN_KEY,
    ),
    "another type": (lambda env: sealed(payload_of(env), PayloadType.RECEIPT), Reason.WRONG_TYPE),
    "no signature": (with_wrapper(signatures=[]), Reason.BAD_ENVELOPE),
    "unknown field in the wrapper": (with_wrapper(extra=1), Reason.BAD_ENVELOPE),
    "non-canonical base64": (non_canonical, Reason.BAD_ENVELOPE),
    "base64 of URLs": (with_wrapper(payload="-_-_"), Reason.BAD_ENVELOPE),
    "unknown field": (respelled(b'"v":1', b'"v":1,"extra":1'), Reason.BAD_PAYLOAD),
    "duplicate key": (respelled(b'"v":1', b'"v":1,"v":1'), Reason.BAD_PAYLOAD),
    "duplicate key in args": (respelled(b'"start_token":1', b'"start_token":1,"start_token":2'), Reason.BAD_PAYLOAD),
    "a float": (respelled(b'"v":1', b'"v":1.0'), Reason.BAD_PAYLOAD),
    "a float in args": (respelled(b'"start_token":1', b'"start_token":1e0'), Reason.BAD_PAYLOAD),
    "NaN": (respelled(b'"start_token":1', b'"start_token":NaN'), Reason.BAD_PAYLOAD),
    "infinity": (respelled(b'"start_token":1', b'"start_token":-Infinity'), Reason.BAD_PAYLOAD),
    "an integer no JavaScript can hold": (
        respelled(b'"start_token":1', b'"start_token":9007199254740993'),
        Reason.BAD_PAYLOAD,
    ),
    "deep nesting": (respelled(b'["make","test"]', b"[" * 40 + b"]" * 40), Reason.BAD_PAYLOAD),
    "bottomless nesting": (respelled(b'["make","test"]', b"[" * 20_000 + b"]" * 20_000), Reason.BAD_PAYLOAD),
    "a lone surrogate": (respelled(b'"make"', b'"\\ud800"'), Reason.BAD_PAYLOAD),
    "bytes that are no UTF-8": (respelled(b'"make"', b'"\xff\xfe"'), Reason.BAD_PAYLOAD),
    "a byte order mark": (lambda env: sealed(b"\xef\xbb\xbf" + payload_of(env)), Reason.BAD_PAYLOAD),
    "an array": (lambda _env: sealed(b"[]"), Reason.BAD_PAYLOAD),
    "true for 1": (respelled(b'"v":1', b'"v":true'), Reason.BAD_PAYLOAD),
    "another version": (respelled(b'"v":1', b'"v":2'), Reason.BAD_PAYLOAD),
    "another organisation": (respelled(b'"org":"org_1"', b'"org":"org_2"'), Reason.WRONG_AUD),
    "another runner": (respelled(b'"runner":"rnr_1"', b'"runner":"rnr_2"'), Reason.WRONG_AUD),
    "an incarnation to come": (respelled(b'"inc":1', b'"inc":2'), Reason.WRONG_AUD),
    "a keyset to come": (respelled(b'"keyset_min":1', b'"keyset_min":2'), Reason.KEYSET_TOO_OLD),
    "signed before the key was valid": (respelled(b'"iat":17950000', b'"iat":17900000'), Reason.UNKNOWN_KEY),
    "a safety key on ctl": (lambda env: sealed(payload_of(env), PayloadType.COMMAND, "safety"), Reason.SCOPE_DENIED),
    "an enrol key": (lambda env: sealed(payload_of(env), PayloadType.COMMAND, "enrol"), Reason.UNKNOWN_KEY),
    "a forked first command": (respelled(b"0" * 64, b"1" * 64), Reason.BAD_PAYLOAD),
}


@pytest.mark.parametrize("name", UNCONSUMED)
def test_what_is_not_well_signed_and_well_addressed_consumes_nothing(name: str) -> None:
    """No receipt, no number, no journal; the good original is taken right after."""
    spoil, reason = UNCONSUMED[name]
    world = World()
    good = world.start()
    turn = world.send(spoil(good))
    assert_untouched(world, turn, reason)
    assert world.send(good).has(PrepareAttempt)


def test_a_refusal_names_the_command_only_when_its_signature_was_good() -> None:
    """A stranger cannot have us repeat its words."""
    world = World()
    good = world.start()
    assert world.send(forged(good)).refused.cmd_id is None
    assert world.send(respelled(b'"runner":"rnr_1"', b'"runner":"rnr_2"')(good)).refused.cmd_id == "cmd_1"


def test_a_command_of_an_earlier_incarnation_is_stale() -> None:
    """It was for the runner as it was before."""
    world = World(inc=2)
    assert_untouched(
        world, world.send(world.start(aud={"org": "org_1", "runner": "rnr_1", "inc": 1})), Reason.STALE_INC
    )


CONSUMED: dict[str, tuple[dict[str, Any], Reason]] = {
    "expired": ({"iat": NOW_MS - 200_000, "exp": NOW_MS - CLOCK_SKEW_MS - 1}, Reason.EXPIRED),
    "not yet valid": ({"nbf": NOW_MS + CLOCK_SKEW_MS + 1, "exp": NOW_MS + 400_000}, Reason.NOT_YET),
    "valid too long": ({"exp": NOW_MS + COMMAND_TTL_MS_MAX + 1}, Reason.TTL_TOO_LONG),
    "valid before it was signed": ({"nbf": NOW_MS - 2 * CLOCK_SKEW_MS}, Reason.TTL_TOO_LONG),
    "unknown kind": ({"kind": "execution.teleport"}, Reason.UNSUPPORTED_KIND),
    "unknown kind that wants approvals": (
        {"kind": "execution.teleport", "need": {"approvals": 1, "of": "owners"}},
        Reason.UNSUPPORTED_KIND,
    ),
    "approvals missing": ({"need": {"approvals": 1, "of": "owners"}}, Reason.APPROVAL_MISSING),
    "a stop on ctl": ({"kind": "execution.stop"}, Reason.WRONG_STREAM),
    "a lease for another execution": (
        {"lease": {"res": "exec:ex_2", "token": 1, "ttl_ms": 60_000, "on_loss": "stop"}},
        Reason.BAD_ARGS,
    ),
    "a precondition on a plain directory": ({"pre": {"head": "ab" * 20}}, Reason.PRECONDITION_FAILED),
}


@pytest.mark.parametrize("name", CONSUMED)
def test_a_bad_header_behind_a_good_signature_gets_a_receipt(name: str) -> None:
    """The number is consumed, so nothing behind it is stalled."""
    over, reason = CONSUMED[name]
    world = World()
    assert_consumed(world, world.send(world.start(**over)), reason)
    assert world.send(world.start("ex_9")).has(PrepareAttempt)


BAD_ARGS: dict[str, tuple[dict[str, Any], Reason]] = {
    "no argv": ({"argv": []}, Reason.BAD_ARGS),
    "argv of nothing": ({"argv": [""]}, Reason.BAD_ARGS),
    "argv with a NUL": ({"argv": ["a\0b"]}, Reason.BAD_ARGS),
    "argv of numbers": ({"argv": [1]}, Reason.BAD_ARGS),
    "argv without end": ({"argv": ["x"] * 1025}, Reason.BAD_ARGS),
    "an argument without end": ({"argv": ["x" * 33_000]}, Reason.BAD_ARGS),
    "an unknown field": ({"shell": True}, Reason.BAD_ARGS),
    "token zero": ({"start_token": 0}, Reason.BAD_ARGS),
    "an id with a slash": ({"execution_id": "../x"}, Reason.BAD_ARGS),
    "an id that ends in a line": ({"execution_id": "ex_1\n"}, Reason.BAD_ARGS),
    "a relative directory": ({"cwd": {"type": "path", "path": "srv"}}, Reason.BAD_ARGS),
    "path traversal": ({"cwd": {"type": "path", "path": "/srv/work/../../etc"}}, Reason.BAD_ARGS),
    "traversal out of a worktree": (
        {"cwd": {"type": "worktree", "worktree_id": "wt_1", "subdir": "../.."}},
        Reason.BAD_ARGS,
    ),
    "a worktree by path": ({"cwd": {"type": "worktree", "worktree_id": "../x"}}, Reason.BAD_ARGS),
    "outside the roots": ({"cwd": {"type": "path", "path": "/etc"}}, Reason.CWD_OUTSIDE_ROOTS),
    "beside a root": ({"cwd": {"type": "path", "path": "/srv/work-evil"}}, Reason.CWD_OUTSIDE_ROOTS),
    "two slashes": ({"cwd": {"type": "path", "path": "//srv/work"}}, Reason.CWD_OUTSIDE_ROOTS),
    "an unknown worktree": ({"cwd": {"type": "worktree", "worktree_id": "wt_9"}}, Reason.WORKTREE_UNKNOWN),
    "a loader's variable": ({"env": {"LD_PRELOAD": "/x.so"}}, Reason.ENV_DENIED),
    "a secret in the clear": ({"env": {"APP_TOKEN": "x"}}, Reason.ENV_SECRET_NAME),
    "a name the owner does not allow": ({"env": {"EDITOR": "vi"}}, Reason.ENV_DENIED),
    "a sealed loader's variable": ({"secrets": [{"name": "LD_PRELOAD", "sealed": "x"}]}, Reason.ENV_DENIED),
    "a name given twice": ({"env": {"CI": "1"}, "secrets": [{"name": "CI", "sealed": "x"}]}, Reason.BAD_ARGS),
    "an endless grace": ({"grace_ms": 10**9}, Reason.BAD_ARGS),
    "true for a number": ({"start_token": True}, Reason.BAD_ARGS),
}


@pytest.mark.parametrize("name", BAD_ARGS)
def test_bad_arguments_get_a_receipt_and_no_effect(name: str) -> None:
    """Judged by kind after the number was consumed."""
    over, reason = BAD_ARGS[name]
    world = World()
    turn = world.send(world.start(args=over))
    assert turn.receipt.reason is reason and turn.receipt.outcome is Outcome.REFUSED
    assert not any(turn.has(deed) for deed in DEEDS) and world.engine.attempts.living == 0
    assert world.engine.ledger.ctl == world.mark


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"repo": "/srv/repos/../../etc"}, Reason.BAD_ARGS),
        ({"repo": "/home/me"}, Reason.REPO_OUTSIDE_ROOTS),
        ({"worktree_id": "a/b"}, Reason.BAD_ARGS),
        ({"base": ""}, Reason.BAD_ARGS),
        ({"base": "a\0b"}, Reason.BAD_ARGS),
        ({"force": True}, Reason.BAD_ARGS),
    ],
)
def test_bad_arguments_of_a_creation_get_a_receipt_and_no_effect(args: dict[str, Any], reason: Reason) -> None:
    """What only the disk or git knows is judged at the edge."""
    world = World()
    good = {"worktree_id": "wt_1", "repo": "/srv/repos/a", "base": "main", "branch": None}
    turn = world.send(world.seal(world.fields(Kind.WORKTREE_CREATE, good | args)))
    assert_consumed(world, turn, reason)


def test_the_same_bytes_again_get_their_receipt_again_and_nothing_else() -> None:
    """A replay is answered from the record, in whatever envelope it comes."""
    world = World()
    env = world.start()
    world.send(env)
    assert not world.send(env).has(ReportAgain)  # pending: nothing to say yet
    world.running("ex_2")
    refused = world.start(args={"cwd": {"type": "path", "path": "/etc"}}, execution_id="ex_3")
    number = world.send(refused).items[0].out_seq
    again = world.send(sealed(payload_of(refused)))
    assert again.one(ReportAgain).out_seqs == (number,)
    assert not again.has(Persist) and not again.has(Offer) and not again.has(PrepareAttempt)


def test_a_number_that_is_taken_by_other_bytes_is_a_replay_or_a_fork() -> None:
    """Below the mark it is old; at the mark somebody else signs our stream."""
    world = World()
    first, second = world.start("ex_1"), world.start("ex_2")
    world.send(first, second)
    old = sealed(payload_of(first).replace(b'"make"', b'"rake"'))
    turn = world.send(old)
    assert turn.refused.reason is Reason.SEQ_REPLAY and not turn.has(Persist)
    twin = world.send(sealed(payload_of(second).replace(b'"make"', b'"rake"')))
    assert twin.refused.reason is Reason.CHAIN_FORK
    assert twin.one(Note).event == "alarm.raised"


def test_a_command_that_names_another_past_is_a_fork() -> None:
    """Its number is next, and its chain is not ours."""
    world = World()
    world.send(world.start("ex_1"))
    turn = world.send(world.start("ex_2", prev="sha256:" + "9" * 64))
    assert turn.refused.reason is Reason.CHAIN_FORK
    assert turn.one(Note).event == "alarm.raised" and not turn.has(Persist)


def test_a_gap_asks_for_the_missing_ones_and_keeps_nothing_of_what_came_early() -> None:
    """Reordered commands have their effects in the order of their numbers."""
    world = World()
    first, second, third = world.start("ex_1"), world.start("ex_2"), world.start("ex_3")
    turn = world.send(third)
    assert turn.one(Say).message == Need(seq=1)
    assert not turn.has(Persist)
    assert world.send(second) == []  # asked a moment ago
    world.pass_time(1000)
    assert world.send(second).one(Say).message == Need(seq=1)
    done = world.send(first, second, third)
    assert [effect.plan.attempt.execution_id for effect in done.of(PrepareAttempt)] == ["ex_1", "ex_2", "ex_3"]


def test_another_gap_is_asked_for_at_once() -> None:
    """The pause is for the same number only."""
    world = World()
    first, second, third = world.start("ex_1"), world.start("ex_2"), world.start("ex_3")
    assert world.send(second).one(Say).message == Need(seq=1)
    world.send(first)
    assert world.send(third).one(Say).message == Need(seq=2)
    assert world.send(second).has(PrepareAttempt)


def test_an_id_with_another_payload_is_refused_with_a_receipt() -> None:
    """One cmd_id means one payload for ever."""
    world = World()
    world.send(world.start("ex_1", cmd_id="cmd_same"))
    turn = world.send(world.start("ex_2", cmd_id="cmd_same"))
    assert (turn.receipt.reason, turn.receipt.cmd_id) == (Reason.IDEMPOTENCY_MISMATCH, "cmd_same")
    assert not turn.has(PrepareAttempt) and world.engine.ledger.ctl == world.mark
    again = world.send(world.stop("ex_1", cmd_id="cmd_same"))
    assert again.receipt.reason is Reason.IDEMPOTENCY_MISMATCH and not again.has(StopAttempt)


@pytest.mark.parametrize("kind", [Kind.EXECUTION_START, Kind.WORKTREE_CREATE, Kind.WORKTREE_REMOVE])
def test_nothing_is_started_over_the_safety_stream(kind: Kind) -> None:
    """It has no order, so it may only end things."""
    world = World()
    args = {"execution_id": "ex_1", "start_token": 1, "argv": ["x"], "cwd": {"type": "path", "path": "/srv/work"}}
    turn = world.send(world.seal(world.fields(kind, args, stream="safety"), a_key("safety")))
    assert_consumed(world, turn, Reason.WRONG_STREAM)


def test_a_safety_key_alone_can_stop() -> None:
    """That is what it is for."""
    world = World()
    world.running()
    turn = world.send(world.stop(key=a_key("safety")))
    assert turn.has(StopAttempt) and turn.receipt.outcome is Outcome.DONE


def test_a_stop_lives_a_day_and_not_longer() -> None:
    """A laptop may have to wake first."""
    world = World()
    world.running()
    old = world.stop(iat=NOW_MS, exp=NOW_MS + SAFETY_TTL_MS_MAX)
    late = world.stop(iat=NOW_MS, exp=NOW_MS + SAFETY_TTL_MS_MAX, cmd_id="late")
    world.pass_time(SAFETY_TTL_MS_MAX + CLOCK_SKEW_MS)
    assert world.send(old).has(StopAttempt)
    world.pass_time(1)
    turn = world.send(late)
    assert turn.receipt.reason is Reason.EXPIRED and not turn.has(StopAttempt)


def test_a_policy_that_admits_nothing_still_lets_stops_through() -> None:
    """The owner who locks the door may always end what is inside."""
    world = World()
    world.running()
    world.engine.policy = a_policy(kinds=frozenset())
    denied = world.send(world.start("ex_2"))
    assert denied.receipt.reason is Reason.POLICY_DENIED and not denied.has(PrepareAttempt)
    turn = world.send(world.stop())
    assert turn.has(StopAttempt) and turn.receipt.outcome is Outcome.DONE


def test_an_expired_keyset_starts_nothing_and_still_stops() -> None:
    """Fail closed for starts; a stop is a stop."""
    world = World(keyset=a_verified_keyset(keyset=a_keyset(exp=NOW_MS + HOUR_MS)))
    world.running()
    world.pass_time(HOUR_MS + 1)
    turn = world.send(world.start("ex_2"))
    assert turn.receipt.reason is Reason.KEYSET_TOO_OLD and not turn.has(PrepareAttempt)
    assert world.send(world.stop()).has(StopAttempt)


def test_every_bad_input_leaves_its_one_line_in_the_log() -> None:
    """One fact is noted once."""
    world = World()
    for spoil, reason in UNCONSUMED.values():
        notes = world.send(spoil(world.start(seq=1, prev="sha256:" + "0" * 64))).of(Note)
        assert [note.fields["reason"] for note in notes] == [reason]


def test_a_payload_is_judged_by_its_bytes_and_not_by_its_envelope() -> None:
    """Signed again by a second key it is the same command."""
    world = World()
    fields = world.fields(Kind.EXECUTION_STOP, {"target": {"type": "command", "cmd_id": "cmd_x"}})
    payload = strict_json.dumps(fields)
    first = world.send(sealed(payload, PayloadType.COMMAND, "command"))
    again = world.send(sealed(payload, PayloadType.COMMAND, "safety"))
    assert again.one(ReportAgain).out_seqs == (first.items[0].out_seq,)
