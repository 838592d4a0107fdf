"""The root, keysets, and the rule by which a keyset replaces another."""

from typing import Any

import pytest

from protocol import strict_json
from protocol.envelope import Verified
from protocol.errors import EnvelopeError, Reason
from protocol.keyset import Keyset, Revocation, RevokedFor, Role, Root, newer, open_keyset
from protocol.limits import KEYSET_TTL_MS_MAX
from tests.support.builders import (
    DAY_MS,
    HOUR_MS,
    NOW_MS,
    a_key,
    a_key_entry,
    a_keyset,
    a_root,
    a_sealed_keyset,
    a_verified_keyset,
)

COMMAND = a_key("command")


def revoked(reason: RevokedFor, at: int = NOW_MS) -> Keyset:
    """A keyset in which the command key is revoked."""
    return a_keyset(revoked=[Revocation(kid=COMMAND.key_id, at=at, reason=reason)])


def test_a_root_is_known_by_threshold_and_keys() -> None:
    """The fingerprint does not depend on the order of the keys and changes with everything else."""
    root = a_root(threshold=2, names=("a", "b", "c"))
    assert root.fingerprint == a_root(threshold=2, names=("c", "a", "b")).fingerprint
    assert root.fingerprint != a_root(threshold=3, names=("a", "b", "c")).fingerprint
    assert root.fingerprint != a_root(threshold=2, names=("a", "b")).fingerprint
    assert root.fingerprint.startswith("SHA256:")
    assert len(root.public_keys()) == 3


@pytest.mark.parametrize(("threshold", "names"), [(2, ("a",)), (2, ("a", "a")), (0, ("a",)), (1, ())])
def test_a_threshold_must_be_attainable(threshold: int, names: tuple[str, ...]) -> None:
    """By distinct keys."""
    with pytest.raises(ValueError, match=r"threshold|keys"):
        a_root(threshold=threshold, names=names)


def test_a_root_of_a_weak_key_opens_nothing() -> None:
    """The keys of a root are loaded like any other."""
    root = Root(threshold=1, keys=["A" * 43])
    with pytest.raises(EnvelopeError, match="WEAK_KEY"):
        open_keyset(a_sealed_keyset(), root)


def test_a_keyset_opens_under_as_many_root_keys_as_the_root_says() -> None:
    """Two of three."""
    root = a_root(threshold=2, names=("a", "b", "c"))
    assert open_keyset(a_sealed_keyset(names=("c", "a")), root).value.version == 1
    for names in (("a",), ("a", "stranger")):
        with pytest.raises(EnvelopeError):
            open_keyset(a_sealed_keyset(names=names), root)


@pytest.mark.parametrize(
    "over",
    [
        {"exp": NOW_MS - HOUR_MS},
        {"exp": NOW_MS - HOUR_MS + KEYSET_TTL_MS_MAX + 1},
        {"keys": []},
        {"version": 0},
        {"extra": 1},
        {"keys": [{"x": "short", "roles": ["command"], "nbf": 0, "naf": 1}]},
        {"keys": [{"x": "A" * 43, "roles": [], "nbf": 0, "naf": 1}]},
        {"keys": [{"x": "A" * 43, "roles": ["root"], "nbf": 0, "naf": 1}]},
    ],
)
def test_a_keyset_is_closed_and_bounded(over: dict[str, Any]) -> None:
    """A keyset expires within 90 days, has keys, and nothing unknown."""
    fields = a_keyset().model_dump(mode="json") | over
    with pytest.raises(ValueError, match=r"."):
        Keyset.parse(strict_json.dumps(fields))


def test_keys_are_chosen_by_role() -> None:
    """A compromised key is chosen for nothing; a superseded one still is, for what it signed before."""
    assert set(a_keyset().keys_for(Role.COMMAND)) == {COMMAND.key_id}
    assert len(a_keyset().keys_for(Role.COMMAND, Role.SAFETY)) == 2
    assert revoked(RevokedFor.COMPROMISED).keys_for(Role.COMMAND) == {}
    assert set(revoked(RevokedFor.SUPERSEDED).keys_for(Role.COMMAND)) == {COMMAND.key_id}


def test_a_key_counts_in_its_window_for_its_roles() -> None:
    """Both ends of the window are inside."""
    keyset = a_keyset(keys=[a_key_entry(COMMAND, Role.COMMAND, nbf=100, naf=200)])
    assert keyset.admits(COMMAND.key_id, Role.COMMAND, 100) is None
    assert keyset.admits(COMMAND.key_id, Role.COMMAND, 200) is None
    assert keyset.admits(COMMAND.key_id, Role.COMMAND, 99) is Reason.UNKNOWN_KEY
    assert keyset.admits(COMMAND.key_id, Role.COMMAND, 201) is Reason.UNKNOWN_KEY
    assert keyset.admits(COMMAND.key_id, Role.SAFETY, 150) is Reason.SCOPE_DENIED
    assert keyset.admits(a_key("other").key_id, Role.COMMAND, 150) is Reason.UNKNOWN_KEY


def test_a_superseded_key_counts_for_what_it_signed_before() -> None:
    """Compromised, it counts for nothing."""
    superseded = revoked(RevokedFor.SUPERSEDED)
    assert superseded.admits(COMMAND.key_id, Role.COMMAND, NOW_MS - 1) is None
    assert superseded.admits(COMMAND.key_id, Role.COMMAND, NOW_MS) is Reason.REVOKED_KEY
    assert revoked(RevokedFor.COMPROMISED).admits(COMMAND.key_id, Role.COMMAND, NOW_MS - 1) is Reason.REVOKED_KEY


def refusal(current: Verified[Keyset], candidate: Verified[Keyset]) -> Reason:
    """Why `candidate` does not replace `current`."""
    with pytest.raises(EnvelopeError) as refused:
        newer(current, candidate)
    return refused.value.reason


def test_a_keyset_is_replaced_by_a_higher_version_only() -> None:
    """A roll-back, a twin under the same version and another organisation's are refused; the same document is no harm."""
    first, second = a_verified_keyset(), a_verified_keyset(keyset=a_keyset(version=2))
    assert newer(first, second) is second
    again = a_verified_keyset()
    assert newer(first, again) is again
    assert refusal(second, first) is Reason.KEYSET_TOO_OLD
    assert refusal(first, a_verified_keyset(keyset=a_keyset(exp=NOW_MS + DAY_MS))) is Reason.KEYSET_TOO_OLD
    assert refusal(first, a_verified_keyset(keyset=a_keyset(version=2, org="org_2"))) is Reason.WRONG_AUD
