"""The handshake: both sides against each other, and against what a liar would say."""

from typing import Any

import pytest

from protocol.envelope import PayloadType, seal
from protocol.errors import CloseCode, EnvelopeError, Reason, RemoteError
from protocol.handshake import (
    PLANE_TABLE,
    RUNNER_TABLE,
    Established,
    PlaneHandshake,
    PlaneStep,
    RunnerHandshake,
    RunnerStep,
    Standing,
    open_certificate,
    seal_welcome,
)
from protocol.identity import HelloClaims, StreamMark
from protocol.keyset import Revocation, RevokedFor, Role
from protocol.messages import Bye, Challenge, Hello, Message, Need, Proof, Welcome
from protocol.replay import Mark
from tests.support.builders import (
    HOUR_MS,
    NOW_MS,
    POLICY_DIGEST,
    a_certificate,
    a_key,
    a_key_entry,
    a_keyset,
    a_mark,
    a_nonce,
    a_root,
    a_sealed_certificate,
    a_sealed_keyset,
    a_verified_keyset,
    hello_claims,
)

RUNNER_KEY = a_key("runner")
MARK = a_mark(7)


def standing(**over: Any) -> Standing:
    """A runner in its first incarnation that has consumed seven commands."""
    fields: dict[str, Any] = {
        "key": RUNNER_KEY,
        "certificate": a_certificate(),
        "root": a_root(),
        "keyset": a_verified_keyset(),
        "ctl": MARK,
        "out_head": 3,
        "boot_id": "boot-1",
        "policy_digest": POLICY_DIGEST,
        "version": "0.1.0",
        "platform": "linux",
    }
    return Standing(**(fields | over))


def proved(**over: Any) -> tuple[RunnerHandshake, PlaneHandshake, HelloClaims]:
    """Both sides after a good proof."""
    runner, plane = RunnerHandshake(standing(**over), a_nonce("runner")), PlaneHandshake(a_nonce("plane"))
    proof = runner.receive(plane.challenge(runner.start(), NOW_MS))
    assert isinstance(proof, Proof)
    return runner, plane, plane.verify(proof, RUNNER_KEY.public)


def welcome(claims: HelloClaims, **over: Any) -> str:
    """The plane's answer."""
    fields: dict[str, Any] = {
        "inc": 1,
        "session": "ses_1",
        "now_ms": NOW_MS,
        "beat_ms": 10_000,
        "ctl": MARK,
        "out_hw": 2,
        "key": a_key("command"),
    }
    return seal_welcome(claims, **(fields | over))


def test_both_sides_are_proven() -> None:
    """The runner's claims arrive as signed; the runner takes session, clock, interval and marks from the welcome."""
    runner, plane, claims = proved()
    assert (claims.ctl, claims.out_head) == (StreamMark(hw=7, head=MARK.head), 3)
    established = runner.receive(Welcome(env=welcome(claims)))
    assert isinstance(established, Established)
    assert (established.session, established.now_ms, established.beat_ms) == ("ses_1", NOW_MS, 10_000)
    assert (established.ctl, established.out_hw, established.certificate) == (MARK, 2, None)
    assert (runner.step, plane.step) == (RunnerStep.WELCOMED, PlaneStep.KNOWN)


@pytest.mark.parametrize(("oldest", "above"), [(None, 2), (3, 2), (2, 1), (1, 0)])
def test_what_had_no_answer_is_reported_whatever_the_mark_covers(oldest: int | None, above: int) -> None:
    """A machine that was set back uses numbers again that the plane has stored other items under."""
    runner, _plane, claims = proved()
    established = runner.receive(Welcome(env=welcome(claims)))
    assert isinstance(established, Established)
    assert established.report_above(oldest) == above


def test_a_mark_above_our_own_end_does_not_cover_what_comes_next() -> None:
    """The plane stored items that this machine has forgotten: the next one has one of their numbers."""
    runner, _plane, claims = proved(out_head=1)
    established = runner.receive(Welcome(env=welcome(claims, out_hw=2)))
    assert isinstance(established, Established)
    assert established.out_hw == 1


def test_a_new_incarnation_restarts_the_streams() -> None:
    """The certificate comes along, is signed by an enrol key, and everything is judged against it."""
    runner, _plane, claims = proved()
    env = welcome(claims, inc=2, ctl=Mark())
    established = runner.receive(Welcome(env=env, certificate=a_sealed_certificate(inc=2).decode()))
    assert isinstance(established, Established)
    assert established.ctl == Mark()
    assert established.certificate is not None
    assert established.certificate.value.inc == 2


def test_a_newer_keyset_counts_before_the_welcome_is_judged() -> None:
    """The welcome may be signed by a key that only the keyset beside it names."""
    fresh = a_key("fresh")
    keyset = a_keyset(version=2, keys=[a_key_entry(fresh, Role.COMMAND)])
    runner, _plane, claims = proved()
    established = runner.receive(
        Welcome(env=welcome(claims, key=fresh), keyset=a_sealed_keyset(keyset=keyset).decode())
    )
    assert isinstance(established, Established)
    assert established.keyset.value.version == 2


def refused_welcome(message: Welcome | None = None, **over: Any) -> None:
    """The runner closes with BAD_PROOF."""
    runner, _plane, claims = proved()
    with pytest.raises(RemoteError) as refused:
        runner.receive(message or Welcome(env=welcome(claims, **over)))
    assert refused.value.close is CloseCode.BAD_PROOF
    assert runner.step is RunnerStep.PROVED


@pytest.mark.parametrize(
    "over",
    [
        {"key": a_key("safety")},
        {"key": a_key("stranger")},
        {"inc": 2},
        {"ctl": a_mark(8)},
        {"ctl": a_mark(7, "bb")},
        {"ctl": Mark()},
        {"now_ms": NOW_MS - 2 * HOUR_MS},
        {"now_ms": NOW_MS + 1000 * HOUR_MS},
    ],
)
def test_a_welcome_that_does_not_fit_is_refused(over: dict[str, Any]) -> None:
    """Keys of other roles, other incarnations, other marks, and clocks outside the key's window or the keyset's life."""
    refused_welcome(**over)


def test_a_welcome_to_another_handshake_is_refused() -> None:
    """Neither nonce can be answered twice."""
    for over in ({"nonce_runner": a_nonce("old")}, {"nonce_plane": a_nonce("old")}, {"runner": "rnr_2"}, {"org": "o"}):
        refused_welcome(Welcome(env=welcome(hello_claims(**over))))


def test_an_expired_keyset_proves_nobody() -> None:
    """By the plane's own clock; a newer keyset in the same welcome helps."""
    keys = [a_key_entry(a_key("command"), Role.COMMAND, naf=NOW_MS + 10_000 * HOUR_MS)]
    old = a_keyset(keys=keys, exp=NOW_MS - 1)
    runner, _plane, claims = proved(keyset=a_verified_keyset(keyset=old))
    with pytest.raises(RemoteError, match="expired"):
        runner.receive(Welcome(env=welcome(claims)))
    newer = a_sealed_keyset(keyset=a_keyset(version=2, keys=keys)).decode()
    assert isinstance(runner.receive(Welcome(env=welcome(claims), keyset=newer)), Established)


@pytest.mark.parametrize(
    "keyset",
    [
        a_sealed_keyset(keyset=a_keyset(version=2), names=("stranger",)),
        a_sealed_keyset(keyset=a_keyset(exp=NOW_MS + HOUR_MS)),
        a_sealed_keyset(keyset=a_keyset(version=2, org="org_2")),
        b"{}",
    ],
)
def test_a_keyset_that_comes_along_is_judged_by_the_pinned_root(keyset: bytes) -> None:
    """Another root, a twin, another organisation, nonsense."""
    _runner, _plane, claims = proved()
    refused_welcome(Welcome(env=welcome(claims), keyset=keyset.decode()))


@pytest.mark.parametrize(
    "certificate",
    [
        a_sealed_certificate(inc=1),
        a_sealed_certificate(inc=2, runner="rnr_2"),
        a_sealed_certificate(inc=2, org="org_2"),
        a_sealed_certificate(inc=2, x=a_key("other").public.x),
        a_sealed_certificate(inc=2, seal_x=a_nonce("other")),
        a_sealed_certificate(inc=2, key=a_key("command")),
        a_sealed_certificate(inc=2, iat=NOW_MS - 2 * HOUR_MS),
        b"{}",
    ],
)
def test_a_certificate_that_does_not_fit_is_refused(certificate: bytes) -> None:
    """Not newer, not ours, not by an enrol key, not in that key's window."""
    _runner, _plane, claims = proved()
    env = welcome(claims, inc=2, ctl=Mark())
    refused_welcome(Welcome(env=env, certificate=certificate.decode()))


def test_a_superseded_enrol_key_vouches_for_older_certificates_only() -> None:
    """What it issued before counts on; what it issues after does not."""
    kid = a_key("enrol").key_id
    keyset = a_keyset(revoked=[Revocation(kid=kid, at=NOW_MS, reason=RevokedFor.SUPERSEDED)])
    assert open_certificate(a_sealed_certificate(iat=NOW_MS - 1), keyset).value.inc == 1
    with pytest.raises(EnvelopeError) as refused:
        open_certificate(a_sealed_certificate(iat=NOW_MS), keyset)
    assert refused.value.reason is Reason.REVOKED_KEY


def plane_refuses(claims: HelloClaims, key: Any = RUNNER_KEY, enrolled: Any = RUNNER_KEY.public) -> CloseCode | None:
    """How the plane ends a connection after this proof."""
    plane = PlaneHandshake(a_nonce("plane"))
    plane.challenge(Hello(org="org_1", runner="rnr_1", nonce=a_nonce("runner")), NOW_MS)
    with pytest.raises(RemoteError) as refused:
        plane.verify(Proof(env=seal(claims.dump(), PayloadType.HELLO, [key]).decode()), enrolled)
    return refused.value.close


def test_a_proof_that_does_not_fit_is_refused() -> None:
    """Another key, another handshake, another runner; not enrolled has a code of its own."""
    assert plane_refuses(hello_claims(), key=a_key("other")) is CloseCode.BAD_PROOF
    assert plane_refuses(hello_claims(nonce_plane=a_nonce("old"))) is CloseCode.BAD_PROOF
    assert plane_refuses(hello_claims(nonce_runner=a_nonce("old"))) is CloseCode.BAD_PROOF
    assert plane_refuses(hello_claims(runner="rnr_2")) is CloseCode.BAD_PROOF
    assert plane_refuses(hello_claims(), enrolled=None) is CloseCode.UNKNOWN_RUNNER


def test_a_runner_says_which_start_of_which_machine_it_is_and_what_it_came_for() -> None:
    """Signed, so that a plane can tell two machines apart that hold one key."""
    runner, _plane, claims = proved(instance="I" * 22, dial=7, purpose="renew")
    assert (claims.instance, claims.dial, claims.purpose) == ("I" * 22, 7, "renew")
    assert runner.standing.purpose == "renew"
    _runner, _plane, older = proved()
    assert (older.instance, older.dial, older.purpose) == ("", 0, "session")


def test_a_proof_for_another_purpose_is_refused() -> None:
    """A connection that carries beats only cannot be made the session, nor the other way round."""
    assert plane_refuses(hello_claims(purpose="renew")) is CloseCode.BAD_PROOF
    plane = PlaneHandshake(a_nonce("plane"))
    plane.challenge(Hello(org="org_1", runner="rnr_1", nonce=a_nonce("runner"), purpose="renew"), NOW_MS)
    with pytest.raises(RemoteError) as refused:
        plane.verify(
            Proof(env=seal(hello_claims().dump(), PayloadType.HELLO, [RUNNER_KEY]).decode()), RUNNER_KEY.public
        )
    assert refused.value.close is CloseCode.BAD_PROOF


def test_versions_must_meet() -> None:
    """A peer of only other versions is told so."""
    hello = Hello(v_min=2, v_max=3, org="o", runner="r", nonce=a_nonce())
    with pytest.raises(RemoteError) as refused:
        PlaneHandshake(a_nonce("plane")).challenge(hello, NOW_MS)
    assert refused.value.close is CloseCode.UNSUPPORTED_VERSION
    runner = RunnerHandshake(standing(), a_nonce("runner"))
    runner.start()
    with pytest.raises(RemoteError) as other:
        runner.receive(Challenge(v=2, nonce=a_nonce("plane"), now_ms=NOW_MS))
    assert other.value.close is CloseCode.UNSUPPORTED_VERSION


def test_a_message_out_of_turn_ends_the_handshake() -> None:
    """Every step of each side, with every message that its table does not name."""
    messages: list[Message] = [Need(seq=1), Bye(reason=Reason.GOING_AWAY), Welcome(env="{}"), Proof(env="{}")]
    messages += [Challenge(nonce=a_nonce(), now_ms=1), Hello(org="o", runner="r", nonce=a_nonce())]
    for step in RunnerStep:
        for message in messages:
            if (step, type(message)) not in RUNNER_TABLE:
                runner = RunnerHandshake(standing(), a_nonce("runner"), step)
                with pytest.raises(RemoteError, match="UNEXPECTED_MESSAGE"):
                    runner.receive(message)
    for plane_step in PlaneStep:
        for message in messages:
            if (plane_step, type(message)) not in PLANE_TABLE:
                with pytest.raises(RemoteError, match="UNEXPECTED_MESSAGE"):
                    PlaneHandshake(a_nonce("plane"), plane_step).verify(message, None)


def test_a_handshake_is_used_once() -> None:
    """A second start is our own mistake."""
    runner = RunnerHandshake(standing(), a_nonce("runner"))
    runner.start()
    with pytest.raises(AssertionError):
        runner.start()
