"""A control plane's keys for tests: a root, keysets under it, and certificates by its enrol key."""

from dataclasses import dataclass, field
from typing import Any

from protocol.envelope import PayloadType, Verified, seal
from protocol.handshake import open_certificate
from protocol.identity import Certificate
from protocol.keys import PrivateKey
from protocol.keyset import KeyEntry, Keyset, Role, Root, open_keyset
from protocol.secretbox import recipient_of

NEVER_MS = 2**52
ORG = "org_1"


def key(number: int) -> PrivateKey:
    """A key that is the same every time."""
    return PrivateKey(bytes([number]) * 32)


@dataclass
class PlaneKeys:
    """`number` sets one plane apart from another."""

    number: int = 1
    root_key: PrivateKey = field(init=False)
    enrol_key: PrivateKey = field(init=False)

    def __post_init__(self) -> None:
        self.root_key = key(self.number)
        self.enrol_key = key(self.number + 100)

    @property
    def root(self) -> Root:
        """The pinned root."""
        return Root(threshold=1, keys=[self.root_key.public.x])

    def keyset(self, version: int = 1, **changes: Any) -> bytes:
        """A sealed keyset whose only key is the enrol key."""
        entry = KeyEntry(x=self.enrol_key.public.x, roles=[Role.ENROL], nbf=0, naf=NEVER_MS)
        claims = Keyset(**{"org": ORG, "version": version, "iat": 1000, "exp": 2000, "keys": [entry], **changes})
        return seal(claims.dump(), PayloadType.KEYSET, [self.root_key])

    def opened_keyset(self, version: int = 1, **changes: Any) -> Verified[Keyset]:
        """The same, opened."""
        return open_keyset(self.keyset(version, **changes), self.root)

    def certificate(self, mine: PrivateKey, seal_seed: bytes, **changes: Any) -> bytes:
        """A sealed certificate for these keys."""
        claims = {
            "org": ORG,
            "runner": "rnr_1",
            "inc": 1,
            "name": "laptop",
            "x": mine.public.x,
            "seal_x": recipient_of(seal_seed),
            "iat": 1500,
        }
        return seal(Certificate(**{**claims, **changes}).dump(), PayloadType.CERTIFICATE, [self.enrol_key])

    def opened_certificate(self, mine: PrivateKey, seal_seed: bytes, **changes: Any) -> Verified[Certificate]:
        """The same, opened."""
        return open_certificate(self.certificate(mine, seal_seed, **changes), self.opened_keyset().value)
