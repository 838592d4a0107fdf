"""Secrets sealed to one runner, for one attempt and one name.

HPKE (RFC 9180) base mode, X25519 / HKDF-SHA256 / ChaCha20-Poly1305. `info` binds the box to its place, so a sealed value
cannot be moved to another runner, execution or variable.
"""

import base64
import binascii
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from protocol.errors import ProtocolError, Reason
from protocol.ids import Attempt
from protocol.keys import KEY_BYTES, b64url, b64url_decode
from protocol.limits import SECRET_BYTES_MAX

_SUITE: Final = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)


class SecretRefused(ProtocolError):
    """A sealed value does not open here: other key, other place, or damaged."""


def _info(runner: str, attempt: Attempt, name: str) -> bytes:
    return f"local-runner secret v1\n{runner}\n{attempt.name}\n{name}".encode()


def seal_secret(value: bytes, recipient: str, runner: str, attempt: Attempt, name: str) -> str:
    """Seal `value` to the X25519 key `recipient` (base64url). Returns standard base64. Raises ValueError."""
    if len(value) > SECRET_BYTES_MAX:
        raise ValueError(f"a secret has at most {SECRET_BYTES_MAX} bytes")
    key = X25519PublicKey.from_public_bytes(b64url_decode(recipient, KEY_BYTES))
    return base64.b64encode(_SUITE.encrypt(value, key, _info(runner, attempt, name))).decode("ascii")


def open_secret(sealed: str, seed: bytes, runner: str, attempt: Attempt, name: str) -> bytes:
    """Open a sealed value with the runner's X25519 seed. Raises SecretRefused(SECRET_UNREADABLE)."""
    try:
        box = base64.b64decode(sealed.encode("ascii"), validate=True)
        key = X25519PrivateKey.from_private_bytes(seed)
        return _SUITE.decrypt(box, key, _info(runner, attempt, name))
    except (InvalidTag, ValueError, UnicodeEncodeError, binascii.Error) as exc:
        raise SecretRefused(Reason.SECRET_UNREADABLE, "a sealed secret does not open") from exc


def recipient_of(seed: bytes) -> str:
    """The public half of an X25519 seed, base64url: what the control plane seals to."""
    return b64url(X25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw())
