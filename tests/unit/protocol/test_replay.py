"""The order of judgement, and how a plane goes on after a hello."""

from typing import Any

import pytest

from protocol.errors import Reason
from protocol.ids import CommandId, Digest
from protocol.keyset import Revocation, RevokedFor, Role
from protocol.limits import CLOCK_SKEW_MS, COMMAND_TTL_MS_MAX, SAFETY_TTL_MS_MAX
from protocol.replay import (
    Adopt,
    Advance,
    Duplicate,
    Fork,
    Gap,
    Mark,
    NotConsumed,
    Seen,
    after,
    freshness,
    judge,
    reconcile,
)
from tests.support.builders import (
    ME,
    NOW_MS,
    a_command,
    a_key,
    a_key_entry,
    a_keyset,
    a_mark,
    a_verified_command,
)

KEYSET = a_keyset()
STOP = "execution.stop"


def judged(seen: Seen | None = None, keyset: Any = KEYSET, **over: Any) -> Any:
    """Judge a command with these fields."""
    return judge(a_verified_command(**over), ME, keyset, seen or Seen())


def test_the_next_number_is_consumed() -> None:
    """The mark moves by one, to this digest."""
    command = a_verified_command()
    assert judge(command, ME, KEYSET, Seen()) == Advance(Mark(1, command.digest))


def test_a_chain_is_followed() -> None:
    """Each names the digest before it."""
    first = a_verified_command()
    seen = after(Seen(), first, Advance(Mark(1, first.digest)))
    second = a_verified_command(cmd_id="cmd_2", seq=2, prev=first.digest)
    assert judge(second, ME, KEYSET, seen) == Advance(Mark(2, second.digest))


@pytest.mark.parametrize(
    ("over", "reason"),
    [
        ({"aud": {"org": "org_2", "runner": "rnr_1", "inc": 1}}, Reason.WRONG_AUD),
        ({"aud": {"org": "org_1", "runner": "rnr_2", "inc": 1}}, Reason.WRONG_AUD),
        ({"aud": {"org": "org_1", "runner": "rnr_1", "inc": 2}}, Reason.WRONG_AUD),
        ({"keyset_min": 2}, Reason.KEYSET_TOO_OLD),
        ({"key": a_key("safety")}, Reason.SCOPE_DENIED),
        ({"key": a_key("approver")}, Reason.SCOPE_DENIED),
        ({"key": a_key("stranger")}, Reason.UNKNOWN_KEY),
        ({"iat": NOW_MS - 10**9}, Reason.UNKNOWN_KEY),
    ],
)
def test_what_is_not_for_us_consumes_nothing(over: dict[str, Any], reason: Reason) -> None:
    """Address, keyset and signer are judged before anything is remembered."""
    assert judged(**over) == NotConsumed(reason)


def test_an_older_incarnation_and_a_downgrade_consume_nothing() -> None:
    """Both are told by their own reason."""
    reborn = ME.model_copy(update={"inc": 2})
    assert judge(a_verified_command(), reborn, KEYSET, Seen()) == NotConsumed(Reason.STALE_INC)
    assert judged(keyset=a_keyset(min_v=2)) == NotConsumed(Reason.DOWNGRADE)


def test_a_revoked_signer_consumes_nothing() -> None:
    """Compromised at any time; superseded from its time on."""
    kid = a_key("command").key_id
    for reason, at in ((RevokedFor.COMPROMISED, NOW_MS + 5), (RevokedFor.SUPERSEDED, NOW_MS)):
        keyset = a_keyset(revoked=[Revocation(kid=kid, at=at, reason=reason)])
        assert judged(keyset=keyset) == NotConsumed(Reason.REVOKED_KEY)
    later = a_keyset(revoked=[Revocation(kid=kid, at=NOW_MS + 1, reason=RevokedFor.SUPERSEDED)])
    assert isinstance(judged(keyset=later), Advance)


def test_a_safety_key_stops_and_starts_nothing() -> None:
    """A command key may sign both streams."""
    assert isinstance(judged(kind=STOP, key=a_key("safety")), Advance)
    assert isinstance(judged(kind=STOP), Advance)
    both = a_keyset(keys=[a_key_entry(a_key("both"), Role.SAFETY, Role.COMMAND)])
    assert isinstance(judged(keyset=both, key=a_key("both")), Advance)


def test_the_same_bytes_are_a_duplicate_before_their_number_is_looked_at() -> None:
    """Whatever happened to the mark since; but an address that is not ours comes first."""
    command = a_verified_command()
    seen = Seen(ctl=a_mark(9), receipted=frozenset({command.digest}))
    assert judge(command, ME, KEYSET, seen) == Duplicate(command.digest)
    assert judge(command, ME.model_copy(update={"inc": 2}), KEYSET, seen) == NotConsumed(Reason.STALE_INC)


def test_a_missing_number_is_asked_for() -> None:
    """The answer names the first that is missing; its `prev` is not looked at."""
    assert judged(seq=5, prev="sha256:" + "cc" * 32) == Gap(1)
    assert judged(Seen(ctl=a_mark(3)), seq=6, prev="sha256:" + "cc" * 32) == Gap(4)


def test_other_bytes_under_a_taken_number_are_told_as_fork_or_replay() -> None:
    """At the mark two histories differ; below it nobody can say."""
    seen = Seen(ctl=a_mark(2))
    assert judged(seen, seq=2, prev="sha256:" + "cc" * 32) == NotConsumed(Reason.CHAIN_FORK)
    assert judged(seen) == NotConsumed(Reason.SEQ_REPLAY)


def test_a_forgotten_duplicate_at_the_mark_is_a_replay() -> None:
    """Forgetting old commands opens no hole."""
    command = a_verified_command()
    assert judge(command, ME, KEYSET, Seen(ctl=Mark(1, command.digest))) == NotConsumed(Reason.SEQ_REPLAY)


def test_a_next_number_on_another_head_is_a_fork() -> None:
    """The number fits and the history does not."""
    assert judged(Seen(ctl=a_mark(1)), seq=2, prev="sha256:" + "cc" * 32) == NotConsumed(Reason.CHAIN_FORK)


def test_an_id_with_other_bytes_consumes_its_number_and_is_refused() -> None:
    """On both streams; safety moves no mark."""
    seen = Seen(digests={CommandId("cmd_1"): Digest("sha256:" + "dd" * 32)})
    verdict = judged(seen)
    assert isinstance(verdict, Advance)
    assert (verdict.ctl.hw, verdict.refuse) == (1, Reason.IDEMPOTENCY_MISMATCH)
    assert judged(seen, kind=STOP) == Advance(Mark(), Reason.IDEMPOTENCY_MISMATCH)


def test_the_first_payload_of_an_id_stays_its_payload() -> None:
    """A refused second one is remembered as judged, not as the first."""
    first, second = a_verified_command(kind=STOP), a_verified_command(kind=STOP, iat=NOW_MS + 1)
    seen = after(Seen(), first, Advance(Mark()))
    seen = after(seen, second, Advance(Mark(), Reason.IDEMPOTENCY_MISMATCH))
    assert seen.digests == {"cmd_1": first.digest}
    assert judge(second, ME, KEYSET, seen) == Duplicate(second.digest)


@pytest.mark.parametrize(
    ("over", "now_ms", "reason"),
    [
        ({}, NOW_MS, None),
        ({}, NOW_MS + 60_000 + CLOCK_SKEW_MS, None),
        ({}, NOW_MS + 60_000 + CLOCK_SKEW_MS + 1, Reason.EXPIRED),
        ({}, NOW_MS - CLOCK_SKEW_MS, None),
        ({}, NOW_MS - CLOCK_SKEW_MS - 1, Reason.NOT_YET),
        ({"exp": NOW_MS + COMMAND_TTL_MS_MAX}, NOW_MS, None),
        ({"exp": NOW_MS + COMMAND_TTL_MS_MAX + 1}, NOW_MS, Reason.TTL_TOO_LONG),
        ({"kind": STOP, "exp": NOW_MS + SAFETY_TTL_MS_MAX}, NOW_MS, None),
        ({"kind": STOP, "exp": NOW_MS + SAFETY_TTL_MS_MAX + 1}, NOW_MS, Reason.TTL_TOO_LONG),
        ({"nbf": NOW_MS - CLOCK_SKEW_MS - 1}, NOW_MS, Reason.TTL_TOO_LONG),
    ],
)
def test_a_window_is_judged_with_skew(over: dict[str, Any], now_ms: int, reason: Reason | None) -> None:
    """Each bound is inside."""
    assert freshness(a_command(**over), now_ms) is reason


def test_the_plane_goes_on_where_the_runner_is() -> None:
    """Up to date, behind, and at the very beginning."""
    history = {n: a_mark(n, f"{n:02x}").head for n in range(1, 6)}
    assert reconcile(history, 5, 3, Mark(5, history[5])) == Adopt(Mark(5, history[5]))
    assert reconcile(history, 5, 3, Mark(3, history[3])) == Adopt(Mark(3, history[3]))
    assert reconcile({}, 0, 0, Mark()) == Adopt(Mark())


def test_a_plane_from_a_backup_adopts_the_runners_word() -> None:
    """It cannot know what it has forgotten; it learns how much."""
    assert reconcile({}, 2, 2, a_mark(6)) == Adopt(a_mark(6), lost=4)


def test_two_histories_are_a_fork() -> None:
    """Another digest under a number, a number that is not kept, and a runner that is older than its own word."""
    history = {n: a_mark(n, f"{n:02x}").head for n in range(1, 6)}
    assert reconcile(history, 5, 3, a_mark(4, "ee")) == Fork()
    assert reconcile({}, 5, 3, a_mark(4, "ee")) == Fork()
    assert reconcile(history, 5, 3, Mark(2, history[2])) == Fork()
    assert reconcile(history, 5, 3, Mark()) == Fork()


def test_a_runner_that_forgot_its_own_reports_is_a_fork() -> None:
    """Its `ctl` fits, but it would use numbers again that the plane has stored under other bytes."""
    assert reconcile({}, 0, 0, Mark(), out_hw=3, out_head=2) == Fork()
    assert reconcile({}, 0, 0, Mark(), out_hw=3, out_head=3) == Adopt(Mark())
