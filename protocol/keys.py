"""Ed25519 keys, their ids (RFC 7638 thumbprints of RFC 8037 keys), and the points that are no keys at all.

The library that verifies accepts small-order public keys, for which one constant signature fits many messages; they are
refused here, at the only two doors a point comes through: a public key, and the R of a signature.
"""

import base64
import binascii
import hashlib
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from protocol.errors import EnvelopeError, Reason
from protocol.ids import KeyId

KEY_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
_P: Final = 2**255 - 19
_SIGN_BIT: Final = 1 << 255
_Y_OF_ORDER_8: Final = 2707385501144840649318225287225658788936804267575313519463743609750303402022
"""y of the points of order 8 with the smaller y (its negative is the other); see the derivation in the tests."""
SMALL_ORDER_Y: Final = frozenset({0, 1, _P - 1, _Y_OF_ORDER_8 % _P, (_P - _Y_OF_ORDER_8) % _P})
"""y coordinates of the eight points whose order divides 8."""


def is_weak_point(encoded: bytes) -> bool:
    """Whether 32 bytes encode a point of small order, or a y that is not reduced modulo 2^255-19."""
    number = int.from_bytes(encoded, "little")
    y = number & (_SIGN_BIT - 1)
    return y >= _P or y in SMALL_ORDER_Y


def b64url(data: bytes) -> str:
    """Base64url without padding (RFC 4648 §5), as in JWK."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def b64url_decode(text: str, length: int) -> bytes:
    """Decode canonical unpadded base64url of exactly `length` bytes. Raises ValueError."""
    try:
        data = base64.urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4))
    except (UnicodeEncodeError, binascii.Error) as exc:
        raise ValueError("not base64url") from exc
    if len(data) != length or b64url(data) != text:
        raise ValueError("not canonical base64url of the expected length")
    return data


class PublicKey:
    """A verifying key. Raises EnvelopeError(WEAK_KEY) for points that are no keys.

    A y that no point of the curve has may load (the library looks only when it verifies); such a key verifies nothing.
    """

    __slots__ = ("_key", "key_id", "raw")

    def __init__(self, raw: bytes) -> None:
        if len(raw) != KEY_BYTES or is_weak_point(raw):
            raise EnvelopeError(Reason.WEAK_KEY, "not a canonical point of full order")
        self.raw: Final = raw
        self.key_id: Final = thumbprint(raw)
        try:
            self._key = Ed25519PublicKey.from_public_bytes(raw)
        except ValueError as exc:
            raise EnvelopeError(Reason.WEAK_KEY, "not a point of the curve") from exc

    @classmethod
    def from_b64url(cls, text: str) -> "PublicKey":
        """Read the `x` of a JWK. Raises EnvelopeError(WEAK_KEY)."""
        try:
            return cls(b64url_decode(text, KEY_BYTES))
        except ValueError as exc:
            raise EnvelopeError(Reason.WEAK_KEY, "not 32 bytes of base64url") from exc

    @property
    def x(self) -> str:
        """The key as the `x` of a JWK."""
        return b64url(self.raw)

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Whether `signature` (64 bytes) is this key's over `message`; a small-order R is never one."""
        if len(signature) != SIGNATURE_BYTES or is_weak_point(signature[:KEY_BYTES]):
            return False
        try:
            self._key.verify(signature, message)
        except InvalidSignature:
            return False
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PublicKey) and other.raw == self.raw

    def __hash__(self) -> int:
        return hash(self.raw)

    def __repr__(self) -> str:
        return f"PublicKey({self.key_id})"


class PrivateKey:
    """A signing key; prints as its id."""

    __slots__ = ("_key", "_seed", "public")

    def __init__(self, seed: bytes) -> None:
        if len(seed) != KEY_BYTES:
            raise ValueError("an Ed25519 seed has 32 bytes")
        self._seed = seed
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public: Final = PublicKey(self._key.public_key().public_bytes_raw())

    @property
    def seed(self) -> bytes:
        """The 32 secret bytes, for the key store only."""
        return self._seed

    @property
    def key_id(self) -> KeyId:
        """Thumbprint of the public half."""
        return self.public.key_id

    def sign(self, message: bytes) -> bytes:
        """Sign deterministically (RFC 8032): 64 bytes."""
        return self._key.sign(message)

    def __repr__(self) -> str:
        return f"PrivateKey({self.key_id})"


def thumbprint(raw: bytes) -> KeyId:
    """RFC 7638 thumbprint (SHA-256, base64url) of an RFC 8037 OKP key."""
    jwk = f'{{"crv":"Ed25519","kty":"OKP","x":"{b64url(raw)}"}}'
    return KeyId(b64url(hashlib.sha256(jwk.encode("ascii")).digest()))


def fingerprint(raw: bytes) -> str:
    """A key as people compare it: `SHA256:` and its thumbprint."""
    return f"SHA256:{thumbprint(raw)}"
