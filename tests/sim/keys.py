"""Cheap keys: the library's Ed25519 replaced by a hash, below the door that judges.

Ed25519 takes more than half of a world's time. `cheap_keys` puts other classes in the place of the library's two, which only
`protocol.keys` uses: key ids, weak points, envelopes, roles and thresholds are judged by the code as it is. Such a signature proves
nothing to anybody outside; within a world only holders of a key sign, and a forger has a key of another name.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from cryptography.exceptions import InvalidSignature

from protocol import keys


class _CheapPublic:
    __slots__ = ("_raw",)

    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    @classmethod
    def from_public_bytes(cls, raw: bytes) -> "_CheapPublic":
        return cls(raw)

    def public_bytes_raw(self) -> bytes:
        return self._raw

    def verify(self, signature: bytes, message: bytes) -> None:
        if signature != _signature(self._raw, message):
            raise InvalidSignature


class _CheapPrivate:
    __slots__ = ("_raw",)

    def __init__(self, seed: bytes) -> None:
        self._raw = hashlib.blake2b(seed, digest_size=32, person=b"cheap public").digest()

    @classmethod
    def from_private_bytes(cls, seed: bytes) -> "_CheapPrivate":
        return cls(seed)

    def public_key(self) -> _CheapPublic:
        return _CheapPublic(self._raw)

    def sign(self, message: bytes) -> bytes:
        return _signature(self._raw, message)


def _signature(public: bytes, message: bytes) -> bytes:
    return hashlib.blake2b(message, digest_size=64, key=public).digest()


@contextmanager
def cheap_keys(wanted: bool = True) -> Iterator[None]:
    """While it lasts, keys that are made are cheap ones."""
    if not wanted:
        yield
        return
    with mock.patch.multiple(keys, Ed25519PrivateKey=_CheapPrivate, Ed25519PublicKey=_CheapPublic):
        yield
