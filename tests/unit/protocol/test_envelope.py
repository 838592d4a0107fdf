"""Envelopes: the strict profile, rule by rule."""

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest

from protocol.envelope import PayloadType, Verified, digest_of, open_envelope, pae, seal
from protocol.errors import EnvelopeError, Reason
from protocol.limits import ENVELOPE_BYTES_MAX, PAYLOAD_BYTES_MAX, SIGNATURES_MAX
from tests.support.builders import a_key

KEY = a_key()
KEYS = {KEY.key_id: KEY.public}
PAYLOAD = b'{"a":1}'


def sealed(**over: Any) -> dict[str, Any]:
    """A good envelope as JSON values, with fields replaced."""
    wrapper: dict[str, Any] = json.loads(seal(PAYLOAD, PayloadType.RECEIPT, [KEY]))
    return wrapper | over


def refusal(envelope: bytes | dict[str, Any], threshold: int = 1, keys: Any = KEYS) -> Reason:
    """Why `envelope` does not open."""
    if isinstance(envelope, dict):
        envelope = json.dumps(envelope).encode()
    with pytest.raises(EnvelopeError) as refused:
        open_envelope(envelope, PayloadType.RECEIPT, keys, bytes, threshold)
    return refused.value.reason


def test_pae_is_that_of_the_dsse_specification() -> None:
    """The example of the DSSE protocol document."""
    assert (
        pae("http://example.com/HelloWorld", b"hello world")
        == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )
    assert pae("é", b"") == b"DSSEv1 2 \xc3\xa9 0 "


def test_what_is_sealed_opens_with_the_same_bytes() -> None:
    """The value is parsed from the very bytes that were signed; digest and key id come along."""
    envelope = seal(PAYLOAD, PayloadType.RECEIPT, [KEY])
    opened = open_envelope(envelope, PayloadType.RECEIPT, KEYS, json.loads)
    assert (opened.value, opened.payload, opened.envelope) == ({"a": 1}, PAYLOAD, envelope)
    assert opened.key_ids == (KEY.key_id,)
    assert opened.digest == digest_of(PAYLOAD)
    assert repr(opened) == "Verified({'a': 1})"


def test_only_the_door_makes_a_verified() -> None:
    """Nobody else can say that something was verified."""
    with pytest.raises(TypeError, match="only open_envelope"):
        Verified(object(), 1, b"", b"", ())


def test_a_payload_of_another_type_is_never_read() -> None:
    """The verifier states the type; every pair of different types is refused."""
    for stated in PayloadType:
        envelope = seal(PAYLOAD, stated, [KEY])
        for expected in PayloadType:
            if stated is expected:
                open_envelope(envelope, expected, KEYS, bytes)
                continue
            with pytest.raises(EnvelopeError) as refused:
                open_envelope(envelope, expected, KEYS, bytes)
            assert refused.value.reason is Reason.WRONG_TYPE


def test_a_relabelled_payload_has_no_signature() -> None:
    """The type is inside what is signed."""
    wrapper = json.loads(seal(PAYLOAD, PayloadType.COMMAND, [KEY]))
    assert refusal(wrapper | {"payloadType": PayloadType.RECEIPT}) is Reason.BAD_SIG


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w | {"extra": 1},
        lambda w: {k: v for k, v in w.items() if k != "payload"},
        lambda w: w | {"payload": 1},
        lambda w: w | {"payloadType": None},
        lambda w: w | {"signatures": {}},
        lambda w: w | {"signatures": []},
        lambda w: w | {"signatures": ["x"]},
        lambda w: w | {"signatures": w["signatures"] * 2},
        lambda w: w | {"signatures": w["signatures"] * (SIGNATURES_MAX + 1)},
        lambda w: w | {"signatures": [w["signatures"][0] | {"alg": "none"}]},
        lambda w: w | {"signatures": [w["signatures"][0] | {"keyid": 1}]},
        lambda w: w | {"signatures": [w["signatures"][0] | {"sig": "AAAA"}]},
        lambda w: w | {"signatures": [w["signatures"][0] | {"sig": w["signatures"][0]["sig"].rstrip("=")}]},
        lambda w: w | {"payload": w["payload"] + "\n"},
        lambda w: w | {"payload": " " + w["payload"]},
        lambda w: w | {"payload": "YR=="},
        lambda w: w | {"payload": "-_-_"},
        lambda w: w | {"payload": "é"},
        lambda w: w | {"payload": base64.b64encode(b"x" * (PAYLOAD_BYTES_MAX + 1)).decode()},
    ],
)
def test_a_malformed_wrapper_is_refused(change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Unknown, missing and ill-typed fields, doubled signatures, and every base64 but the canonical one."""
    assert refusal(change(sealed())) is Reason.BAD_ENVELOPE


@pytest.mark.parametrize(
    "envelope", [b"", b"[]", b"\xff", b"{", b" " * (ENVELOPE_BYTES_MAX + 1), b'{"payload":"","payload":""}']
)
def test_what_is_no_json_object_is_refused(envelope: bytes) -> None:
    """Bytes that are not one strict JSON object."""
    assert refusal(envelope) is Reason.BAD_ENVELOPE


def test_an_unknown_key_and_a_wrong_signature_are_told_apart() -> None:
    """The key id selects; the signature decides."""
    other = a_key("other")
    assert refusal(seal(PAYLOAD, PayloadType.RECEIPT, [other])) is Reason.UNKNOWN_KEY
    forged = sealed(signatures=[{"keyid": KEY.key_id, "sig": base64.b64encode(other.sign(b"x")).decode()}])
    assert refusal(forged) is Reason.BAD_SIG


def test_one_bad_signature_spoils_the_envelope() -> None:
    """Also where a good one would be enough."""
    other = a_key("other")
    keys = {**KEYS, other.key_id: other.public}
    wrapper = json.loads(seal(PAYLOAD, PayloadType.RECEIPT, [KEY, other]))
    wrapper["signatures"][1]["sig"] = wrapper["signatures"][0]["sig"]
    assert refusal(wrapper, keys=keys) is Reason.BAD_SIG


def test_a_threshold_counts_distinct_keys() -> None:
    """Two ids of one key are one key, and two signatures by it are refused."""
    other = a_key("other")
    keys = {**KEYS, other.key_id: other.public}
    both = seal(PAYLOAD, PayloadType.RECEIPT, [KEY, other])
    assert open_envelope(both, PayloadType.RECEIPT, keys, bytes, 2).key_ids == (KEY.key_id, other.key_id)
    assert refusal(seal(PAYLOAD, PayloadType.RECEIPT, [KEY]), threshold=2, keys=keys) is Reason.BAD_SIG
    wrapper = json.loads(both)
    wrapper["signatures"][1]["sig"] = wrapper["signatures"][0]["sig"]
    twice = {KEY.key_id: KEY.public, other.key_id: KEY.public}
    assert refusal(wrapper, threshold=2, keys=twice) is Reason.BAD_ENVELOPE


def test_a_payload_that_does_not_parse_is_refused_after_its_signature() -> None:
    """A ValueError of the parser is BAD_PAYLOAD, an EnvelopeError stays what it is; a bad signature comes first."""

    def fails(_payload: bytes) -> bytes:
        raise ValueError("first line\nsecond line")

    def refuses(_payload: bytes) -> bytes:
        raise EnvelopeError(Reason.WEAK_KEY)

    envelope = seal(PAYLOAD, PayloadType.RECEIPT, [KEY])
    with pytest.raises(EnvelopeError, match=r"BAD_PAYLOAD: first line$"):
        open_envelope(envelope, PayloadType.RECEIPT, KEYS, fails)
    with pytest.raises(EnvelopeError, match="WEAK_KEY"):
        open_envelope(envelope, PayloadType.RECEIPT, KEYS, refuses)
    with pytest.raises(EnvelopeError, match="UNKNOWN_KEY"):
        open_envelope(envelope, PayloadType.RECEIPT, {}, fails)


def test_the_largest_payload_fits_with_all_signatures() -> None:
    """64 KiB and eight signatures stay under the bound of an envelope; one byte more does not seal."""
    keys = [a_key(str(n)) for n in range(SIGNATURES_MAX)]
    envelope = seal(b"x" * PAYLOAD_BYTES_MAX, PayloadType.RECEIPT, keys)
    assert len(envelope) <= ENVELOPE_BYTES_MAX
    open_envelope(envelope, PayloadType.RECEIPT, {k.key_id: k.public for k in keys}, bytes, SIGNATURES_MAX)
    for payload, signers in ((b"x" * (PAYLOAD_BYTES_MAX + 1), keys), (b"x", []), (b"x", [*keys, a_key("9")])):
        with pytest.raises(ValueError, match="1 to 8 signatures"):
            seal(payload, PayloadType.RECEIPT, signers)
