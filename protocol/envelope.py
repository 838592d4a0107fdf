"""DSSE envelopes in a strict profile: sign the bytes, verify the bytes, then parse those same bytes.

Source: DSSE v1.0.2 (PAE and the JSON wrapper), narrowed as `docs/protocol.md` §2 says: closed key set, canonical standard base64,
1 to 8 signatures by distinct keys, Ed25519 only. Whatever we seal opens under any DSSE library; not the other way round.

Rule 1: the payload type is stated by the verifier, never taken from the message.
Rule 2: a key id selects a key; it decides nothing. The algorithm belongs to the key.
Rule 3: only `open_envelope` makes a `Verified`, and everything past the door takes `Verified`.
"""

import base64
import binascii
import hashlib
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any, Final, Generic, TypeVar

from protocol import strict_json
from protocol.errors import EnvelopeError, Reason
from protocol.ids import Digest, KeyId
from protocol.keys import SIGNATURE_BYTES, PrivateKey, PublicKey
from protocol.limits import ENVELOPE_BYTES_MAX, PAYLOAD_BYTES_MAX, SIGNATURES_MAX

T = TypeVar("T")
Keys = Mapping[KeyId, PublicKey]


class PayloadType(StrEnum):
    """The closed table of what may be signed; a payload of one type can never be read as another."""

    COMMAND = "application/vnd.local-runner.command.v1+json"
    KEYSET = "application/vnd.local-runner.keyset.v1+json"
    HELLO = "application/vnd.local-runner.hello.v1+json"
    WELCOME = "application/vnd.local-runner.welcome.v1+json"
    ENROLL = "application/vnd.local-runner.enroll.v1+json"
    CERTIFICATE = "application/vnd.local-runner.certificate.v1+json"
    RECEIPT = "application/vnd.local-runner.receipt.v1+json"
    SETTLEMENT = "application/vnd.local-runner.settlement.v1+json"


class Verified(Generic[T]):
    """A value whose bytes carried a good signature of an accepted key. Made by `open_envelope` alone."""

    __slots__ = ("digest", "envelope", "key_ids", "payload", "value")

    def __init__(self, door: object, value: T, payload: bytes, envelope: bytes, key_ids: tuple[KeyId, ...]) -> None:
        if door is not _DOOR:
            raise TypeError("only open_envelope makes a Verified")
        self.value: Final = value
        self.payload: Final = payload
        self.envelope: Final = envelope
        self.key_ids: Final = key_ids
        self.digest: Final = digest_of(payload)

    def __repr__(self) -> str:
        return f"Verified({self.value!r})"


_DOOR: Final = object()


def digest_of(data: bytes) -> Digest:
    """`sha256:` and the hex digest of `data`; commands are known by the digest of their payload."""
    return Digest("sha256:" + hashlib.sha256(data).hexdigest())


def pae(payload_type: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: what is really signed."""
    kind = payload_type.encode("utf-8")
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def seal(payload: bytes, payload_type: PayloadType, keys: Sequence[PrivateKey]) -> bytes:
    """Sign `payload` with each of `keys` and wrap it. Raises ValueError for no key, too many, or too long a payload."""
    if not 1 <= len(keys) <= SIGNATURES_MAX or len(payload) > PAYLOAD_BYTES_MAX:
        raise ValueError("an envelope has 1 to 8 signatures over at most 64 KiB")
    message = pae(payload_type, payload)
    return strict_json.dumps(
        {
            "payload": _b64(payload),
            "payloadType": str(payload_type),
            "signatures": [{"keyid": key.key_id, "sig": _b64(key.sign(message))} for key in keys],
        }
    )


def open_envelope(
    envelope: bytes,
    payload_type: PayloadType,
    keys: Keys,
    parse: Callable[[bytes], T],
    threshold: int = 1,
) -> Verified[T]:
    """Verify `envelope` and only then parse its payload.

    Args:
        envelope: the JSON wrapper as received.
        payload_type: the one type that is expected here.
        keys: keys accepted for this purpose, by id.
        parse: makes the value from the verified bytes; its ValueErrors become BAD_PAYLOAD.
        threshold: how many distinct keys must have signed.

    Raises:
        EnvelopeError: BAD_ENVELOPE, WRONG_TYPE, UNKNOWN_KEY, BAD_SIG or BAD_PAYLOAD (or what `parse` raised of its kind).
    """
    payload, stated_type, signatures = _unwrap(envelope)
    if stated_type != payload_type:
        raise EnvelopeError(Reason.WRONG_TYPE, f"expected {payload_type.name.lower()}")
    signers = _signers(pae(payload_type, payload), signatures, keys)
    if len(signers) < threshold:
        raise EnvelopeError(Reason.BAD_SIG, f"{threshold} signatures are needed")
    try:
        value = parse(payload)
    except EnvelopeError:
        raise
    except ValueError as exc:
        raise EnvelopeError(Reason.BAD_PAYLOAD, _one_line(exc)) from exc
    return Verified(_DOOR, value, payload, envelope, signers)


def _unwrap(envelope: bytes) -> tuple[bytes, str, list[tuple[str, bytes]]]:
    try:
        wrapper = strict_json.loads_object(envelope, ENVELOPE_BYTES_MAX)
    except strict_json.JsonRefused as exc:
        raise EnvelopeError(Reason.BAD_ENVELOPE, str(exc)) from exc
    _closed(wrapper, {"payload", "payloadType", "signatures"})
    entries, stated_type = wrapper["signatures"], wrapper["payloadType"]
    if not isinstance(stated_type, str) or not isinstance(entries, list):
        raise EnvelopeError(Reason.BAD_ENVELOPE, "a field has the wrong type")
    if not 1 <= len(entries) <= SIGNATURES_MAX:
        raise EnvelopeError(Reason.BAD_ENVELOPE, f"1 to {SIGNATURES_MAX} signatures are accepted")
    payload = _unb64(wrapper["payload"])
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise EnvelopeError(Reason.BAD_ENVELOPE, f"payload over {PAYLOAD_BYTES_MAX} bytes")
    return payload, stated_type, [_signature(entry) for entry in entries]


def _signature(entry: Any) -> tuple[str, bytes]:
    if not isinstance(entry, dict):
        raise EnvelopeError(Reason.BAD_ENVELOPE, "a signature is not an object")
    _closed(entry, {"keyid", "sig"})
    signature = _unb64(entry["sig"])
    if not isinstance(entry["keyid"], str) or len(signature) != SIGNATURE_BYTES:
        raise EnvelopeError(Reason.BAD_ENVELOPE, "a signature has the wrong form")
    return entry["keyid"], signature


def _signers(message: bytes, signatures: list[tuple[str, bytes]], keys: Keys) -> tuple[KeyId, ...]:
    """Every signature must be by a known key and good: an envelope with one bad signature is a damaged envelope."""
    signers: dict[PublicKey, KeyId] = {}
    for key_id, signature in signatures:
        key = keys.get(KeyId(key_id))
        if key is None:
            raise EnvelopeError(Reason.UNKNOWN_KEY, "signed by a key that is not accepted here")
        if key in signers:
            raise EnvelopeError(Reason.BAD_ENVELOPE, "two signatures by one key")
        if not key.verifies(signature, message):
            raise EnvelopeError(Reason.BAD_SIG, "the signature does not fit")
        signers[key] = KeyId(key_id)
    return tuple(signers.values())


def _closed(value: dict[str, Any], names: set[str]) -> None:
    if value.keys() != names:
        raise EnvelopeError(Reason.BAD_ENVELOPE, "missing or unknown fields")


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _unb64(text: object) -> bytes:
    if not isinstance(text, str):
        raise EnvelopeError(Reason.BAD_ENVELOPE, "a field is not text")
    try:
        data = binascii.a2b_base64(text.encode("ascii"), strict_mode=True)
    except (UnicodeEncodeError, binascii.Error) as exc:
        raise EnvelopeError(Reason.BAD_ENVELOPE, "not standard base64") from exc
    # Even the strict mode of the decoder takes non-zero bits behind the last byte: two texts, one value.
    if _b64(data) != text:
        raise EnvelopeError(Reason.BAD_ENVELOPE, "not canonical base64")
    return data


def _one_line(exc: ValueError) -> str:
    """First line of an error, bounded: pydantic prints several, and never the input when it is told not to."""
    lines = str(exc).splitlines()
    return (lines[0] if lines else "does not parse")[:200]
