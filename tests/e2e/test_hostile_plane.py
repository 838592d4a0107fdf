"""What an honest control plane never sends, to a real daemon: a stable reason each time, no effect, and the next good command runs.

One daemon hears all of it, one thing after the other.
"""

import base64
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio

from protocol import strict_json
from protocol.commands import Kind
from protocol.envelope import PayloadType, digest_of, seal
from protocol.errors import Reason
from protocol.ids import GENESIS
from protocol.keyset import Role
from protocol.limits import CLOCK_SKEW_MS, COMMAND_TTL_MS_MAX, ENVELOPE_BYTES_MAX, PAYLOAD_BYTES_MAX
from protocol.receipt import Outcome, Receipt
from protocol.replay import Mark
from tests.support.builders import a_key
from tests.support.hostile_plane import now_ms, payload_of
from tests.support.siege import Siege, siege

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system() -> AsyncIterator[Siege]:
    """One daemon for all."""
    async with siege() as besieged:
        yield besieged


# --- what consumes nothing -------------------------------------------------------------------------------------------


def rewrapped(env: bytes, **over: Any) -> bytes:
    """The envelope with other fields in its wrapper."""
    return json.dumps(json.loads(env) | over).encode()


def respelled(old: str, new: str) -> Callable[[bytes], bytes]:
    """The payload with `old` written as `new`, and signed like that."""

    def spell(env: bytes) -> bytes:
        payload = payload_of(env)
        assert old.encode() in payload
        return signed(payload.replace(old.encode(), new.encode("utf-8", "surrogatepass"), 1))

    return spell


def signed(payload: bytes, kind: PayloadType = PayloadType.COMMAND, name: str = "command") -> bytes:
    """Any bytes, signed."""
    return seal(payload, kind, [a_key(name)])


def forged(env: bytes) -> bytes:
    """Another payload under the old signature."""
    return rewrapped(env, payload=base64.b64encode(payload_of(env).replace(b'"true"', b'"date"')).decode())


def loose_bits(env: bytes) -> bytes:
    """The same payload in a base64 text whose last character has bits that mean nothing."""
    payload = payload_of(env)
    payload += b" " * ((1 - len(payload)) % 3)
    text = base64.b64encode(payload).decode()
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    return rewrapped(env, payload=f"{text[:-3]}{alphabet[alphabet.index(text[-3]) ^ 1]}==")


UNCONSUMED: dict[str, tuple[Callable[[bytes], bytes], Reason]] = {
    "forged": (forged, Reason.BAD_SIG),
    "truncated": (lambda env: env[:-7], Reason.BAD_ENVELOPE),
    "no JSON": (lambda _env: b"command", Reason.BAD_ENVELOPE),
    "an oversized payload": (
        lambda env: rewrapped(env, payload=base64.b64encode(b" " * (PAYLOAD_BYTES_MAX + 1)).decode()),
        Reason.BAD_ENVELOPE,
    ),
    "non-canonical base64": (loose_bits, Reason.BAD_ENVELOPE),
    "no signature": (lambda env: rewrapped(env, signatures=[]), Reason.BAD_ENVELOPE),
    "an unknown field in the wrapper": (lambda env: rewrapped(env, more=1), Reason.BAD_ENVELOPE),
    "an unknown key": (lambda env: signed(payload_of(env), name="stranger"), Reason.UNKNOWN_KEY),
    "a safety key on ctl": (lambda env: signed(payload_of(env), name=Role.SAFETY), Reason.SCOPE_DENIED),
    "an enrol key": (lambda env: signed(payload_of(env), name=Role.ENROL), Reason.UNKNOWN_KEY),
    "another type": (lambda env: signed(payload_of(env), PayloadType.WELCOME), Reason.WRONG_TYPE),
    "another organisation": (respelled('"org":"org_1"', '"org":"org_2"'), Reason.WRONG_AUD),
    "another runner": (respelled('"runner":"rnr_', '"runner":"rnr-'), Reason.WRONG_AUD),
    "an incarnation to come": (respelled('"inc":1', '"inc":2'), Reason.WRONG_AUD),
    "a keyset to come": (respelled('"keyset_min":1', '"keyset_min":2'), Reason.KEYSET_TOO_OLD),
    "an unknown field": (respelled('"v":1', '"v":1,"more":1'), Reason.BAD_PAYLOAD),
    "a duplicate key": (respelled('"v":1', '"v":1,"v":1'), Reason.BAD_PAYLOAD),
    "a duplicate key in args": (respelled('"start_token":1', '"start_token":1,"start_token":2'), Reason.BAD_PAYLOAD),
    "a float": (respelled('"start_token":1', '"start_token":1.0'), Reason.BAD_PAYLOAD),
    "NaN": (respelled('"start_token":1', '"start_token":NaN'), Reason.BAD_PAYLOAD),
    "an endless number": (respelled('"start_token":1', '"start_token":' + "9" * 5000), Reason.BAD_PAYLOAD),
    "deep nesting": (respelled('["true"]', "[" * 40 + "]" * 40), Reason.BAD_PAYLOAD),
    "bottomless nesting": (respelled('["true"]', "[" * 20_000 + "]" * 20_000), Reason.BAD_PAYLOAD),
    "an escaped lone surrogate": (respelled('"true"', '"\\ud800"'), Reason.BAD_PAYLOAD),
    "a raw lone surrogate": (respelled('"true"', '"\ud800"'), Reason.BAD_PAYLOAD),
    "another version": (respelled('"v":1', '"v":2'), Reason.BAD_PAYLOAD),
    "nothing": (lambda _env: signed(b""), Reason.BAD_PAYLOAD),
}


@pytest.mark.parametrize("name", UNCONSUMED)
async def test_what_is_not_well_signed_and_well_addressed_changes_nothing(system: Siege, name: str) -> None:
    """Refused by its digest, without a receipt; its number is still free for the next good command."""
    plane, stand = system.plane, system.stand
    spoil, reason = UNCONSUMED[name]
    before, told = stand.effects(), len(plane.told)
    env = spoil(system.start())
    assert (await plane.refusal(env)).reason is reason
    assert stand.effects() == before and len(plane.told) == told
    await system.lives()


async def test_a_replay_gets_its_stored_receipt_and_no_second_effect(system: Siege) -> None:
    """Byte for byte what was told before, also under another signature of the same payload."""
    plane, stand = system.plane, system.stand
    mark = stand.home / "ran"
    env = system.start({"argv": ["sh", "-c", f"echo ran >> {mark}"], "execution_id": "ex_replayed"})
    await plane.fate(env)
    await plane.end("ex_replayed")
    (receipt,) = [body for body in plane.told if is_receipt_of(body, env)]
    for copy in (env, signed(payload_of(env))):
        before = plane.told.count(receipt)
        await plane.send(copy)
        await plane.until(lambda before=before: plane.told.count(receipt) > before, "the receipt again")  # type: ignore[misc]
    await system.lives()
    assert mark.read_text() == "ran\n"


def is_receipt_of(body: str, env: bytes) -> bool:
    """Whether an item is the receipt of this very command."""
    said = json.loads(payload_of(body.encode()))
    return bool(said.get("cmd_id") == json.loads(payload_of(env))["cmd_id"] and "outcome" in said)


async def test_an_old_number_with_other_bytes_is_a_replay_and_the_newest_a_fork(system: Siege) -> None:
    """Neither runs, whoever signed it."""
    plane, stand = system.plane, system.stand
    await system.lives()
    old = Mark(plane.mark.hw, plane.mark.head)
    await system.lives()
    before = stand.effects()
    replayed = system.start(seq=old.hw, prev=GENESIS if old.hw == 1 else old.head)
    assert (await plane.refusal(replayed)).reason is Reason.SEQ_REPLAY
    twin = system.start(seq=plane.mark.hw, prev=old.head)
    assert (await plane.refusal(twin)).reason is Reason.CHAIN_FORK
    stranger = system.start(prev="sha256:" + "9" * 64)
    assert (await plane.refusal(stranger)).reason is Reason.CHAIN_FORK
    assert stand.effects() == before
    await system.lives()


async def test_commands_out_of_order_run_in_order(system: Siege) -> None:
    """A gap asks for the missing ones; nothing is kept of what came too early."""
    plane, stand = system.plane, system.stand
    log = stand.home / "order"
    begin, chain = plane.mark, []
    for number in range(3):
        env = system.start({"argv": ["sh", "-c", f"echo {number} >> {log}"], "execution_id": f"ex_order_{number}"})
        chain.append(env)
        plane.mark = Mark(plane.mark.hw + 1, digest_of(payload_of(env)))
    plane.mark = begin
    assert await plane.need(chain[2]) == begin.hw + 1
    assert not log.exists()
    for number, env in enumerate(chain):
        assert (await plane.fate(env)).outcome is Outcome.ACCEPTED
        await plane.end(f"ex_order_{number}")
    assert log.read_text() == "0\n1\n2\n"
    await system.lives()


# --- what consumes its number ----------------------------------------------------------------------------------------


def assert_refused(receipt: Receipt, mark: Mark, reason: Reason) -> None:
    """One receipt, with the reason; where there is a number, it is consumed."""
    assert (receipt.outcome, receipt.reason) == (Outcome.REFUSED, reason)
    assert receipt.seq in (None, mark.hw + 1)


HEADERS: dict[str, tuple[Callable[[], dict[str, Any]], Reason]] = {
    "expired": (lambda: aged(-400_000, exp=now_ms() - CLOCK_SKEW_MS - 5000), Reason.EXPIRED),
    "not yet valid": (
        lambda: {"nbf": now_ms() + CLOCK_SKEW_MS + 30_000, "exp": now_ms() + 400_000},
        Reason.NOT_YET,
    ),
    "valid too long": (lambda: {"exp": now_ms() + COMMAND_TTL_MS_MAX + 60_000}, Reason.TTL_TOO_LONG),
    "an unknown kind": (lambda: {"kind": "execution.teleport"}, Reason.UNSUPPORTED_KIND),
    "a stop in the numbered stream": (lambda: {"kind": "execution.stop", "stream": "ctl"}, Reason.WRONG_STREAM),
    "a start in the other stream": (lambda: {"stream": "safety"}, Reason.WRONG_STREAM),
    "approvals that nobody gave": (lambda: {"need": {"approvals": 1, "of": "owners"}}, Reason.APPROVAL_MISSING),
}


def aged(by_ms: int, **over: Any) -> dict[str, Any]:
    """Issued earlier."""
    return {"iat": now_ms() + by_ms, "nbf": now_ms() + by_ms, **over}


@pytest.mark.parametrize("name", HEADERS)
async def test_a_bad_header_gets_a_receipt_and_no_effect(system: Siege, name: str) -> None:
    """The number is consumed, so the stream goes on behind it."""
    plane, stand = system.plane, system.stand
    before, mark = stand.effects(), plane.mark
    header, reason = HEADERS[name]
    assert_refused(await plane.fate(system.start(**header())), mark, reason)
    assert stand.effects() == before
    await system.lives()


ARGS: dict[str, tuple[dict[str, Any], Reason]] = {
    "no argv": ({"argv": []}, Reason.BAD_ARGS),
    "argv of nothing": ({"argv": [""]}, Reason.BAD_ARGS),
    "an argument with a NUL": ({"argv": ["a\0b"]}, Reason.BAD_ARGS),
    "an unknown field": ({"shell": True}, Reason.BAD_ARGS),
    "true for a number": ({"start_token": True}, Reason.BAD_ARGS),
    "traversal in an execution's id": ({"execution_id": "../x"}, Reason.BAD_ARGS),
    "a directory above": ({"cwd": {"type": "path", "path": "/tmp/../etc"}}, Reason.BAD_ARGS),
    "a worktree by traversal": ({"cwd": {"type": "worktree", "worktree_id": "../x"}}, Reason.BAD_ARGS),
    "an unknown worktree": ({"cwd": {"type": "worktree", "worktree_id": "wt_9"}}, Reason.WORKTREE_UNKNOWN),
    "a name that is none": ({"env": {"A=B": "1"}}, Reason.BAD_ARGS),
    "a secret sealed to nobody": ({"secrets": [{"name": "CI_TOKEN", "sealed": "AAAA"}]}, Reason.SECRET_UNREADABLE),
}


@pytest.mark.parametrize("name", ARGS)
async def test_bad_arguments_get_a_receipt_and_no_effect(system: Siege, name: str) -> None:
    """What the models of an honest plane would not even have let through."""
    plane, stand = system.plane, system.stand
    args, reason = ARGS[name]
    before, mark = stand.effects(), plane.mark
    assert_refused(await plane.fate(system.start(args)), mark, reason)
    assert stand.effects() == before
    await system.lives()


async def test_an_id_with_another_payload_is_refused(system: Siege) -> None:
    """One cmd_id means one payload for ever, on either stream."""
    plane, stand = system.plane, system.stand
    await plane.fate(system.start({"execution_id": "ex_first"}, cmd_id="cm_twice"))
    await plane.end("ex_first")
    before, mark = stand.effects(), plane.mark
    assert_refused(await plane.fate(system.start(cmd_id="cm_twice")), mark, Reason.IDEMPOTENCY_MISMATCH)
    target = {"type": "attempt", "execution_id": "ex_first", "start_token": 1}
    stop = await plane.fate(plane.command(Kind.EXECUTION_STOP, {"target": target}, cmd_id="cm_twice"))
    assert (stop.outcome, stop.reason) == (Outcome.REFUSED, Reason.IDEMPOTENCY_MISMATCH)
    assert stand.effects() == before
    await system.lives()


async def test_a_stop_that_overtakes_its_start_prevents_it(system: Siege) -> None:
    """By the attempt's name or by the command's id; the late start is told so."""
    plane, stand = system.plane, system.stand
    before = stand.effects()
    for target in (
        {"type": "attempt", "execution_id": "ex_late", "start_token": 1},
        {"type": "command", "cmd_id": "cm_late"},
    ):
        stop = await plane.fate(plane.command(Kind.EXECUTION_STOP, {"target": target}))
        assert (stop.outcome, stop.result) == (Outcome.DONE, {"state": "tombstone"})
    mark = plane.mark
    assert_refused(await plane.fate(system.start({"execution_id": "ex_late"})), mark, Reason.CANCELLED_BEFORE_START)
    mark = plane.mark
    late = system.start({"execution_id": "ex_other"}, cmd_id="cm_late")
    assert_refused(await plane.fate(late), mark, Reason.CANCELLED_BEFORE_START)
    assert stand.effects() == before
    await system.lives()


async def test_a_stop_of_what_has_ended_gets_the_stored_settlement(system: Siege) -> None:
    """Byte for byte, and nothing is stopped."""
    plane = system.plane
    await plane.fate(system.start({"execution_id": "ex_over"}))
    await plane.end("ex_over")
    (settlement,) = [
        body
        for body in plane.told
        if "verdict" in (said := json.loads(payload_of(body.encode()))) and said["execution_id"] == "ex_over"
    ]
    target = {"type": "attempt", "execution_id": "ex_over", "start_token": 1}
    receipt = await plane.fate(plane.command(Kind.EXECUTION_STOP, {"target": target}))
    assert (receipt.outcome, receipt.result["state"]) == (Outcome.DONE, "settled")
    await plane.until(lambda: plane.told.count(settlement) == 2, "the settlement again")
    await system.lives()


async def test_an_attempt_that_is_known_is_not_started_again(system: Siege) -> None:
    """Whatever id the second command has."""
    plane, stand = system.plane, system.stand
    await plane.fate(system.start({"execution_id": "ex_once"}))
    await plane.end("ex_once")
    before, mark = stand.effects(), plane.mark
    assert_refused(await plane.fate(system.start({"execution_id": "ex_once"})), mark, Reason.DUPLICATE_ATTEMPT)
    assert stand.effects() == before


async def test_an_envelope_that_no_frame_may_carry_ends_the_connection(system: Siege) -> None:
    """4400 above the bound of an envelope, 1009 above that of a frame; the next connection takes the next number."""
    plane, stand = system.plane, system.stand
    big = strict_json.dumps({"t": "command", "env": "x" * (ENVELOPE_BYTES_MAX + 1)}).decode()
    huge = strict_json.dumps({"t": "command", "env": "x" * (128 * 1024)}).decode()
    for frame, code in ((big, 4400), (huge, 1009)):
        before, sessions = stand.effects(), plane.sessions
        closing = await plane.closing(lambda frame=frame: plane.say(frame))  # type: ignore[misc]
        assert closing.code == code
        await plane.online(sessions)
        assert stand.effects() == before
        await system.lives()
