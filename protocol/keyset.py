"""Which keys count: a root pinned by fingerprint signs versioned, expiring keysets; a keyset names the keys and what they may sign.

The update rule here: a runner takes a keyset only under its pinned root, never an older version than it has, and never another
document under the version it has.
"""

import hashlib
from collections.abc import Mapping
from enum import StrEnum
from functools import cached_property
from typing import Annotated

from pydantic import Field, model_validator

from protocol.envelope import PayloadType, Verified, open_envelope
from protocol.errors import EnvelopeError, Reason
from protocol.ids import KeyId
from protocol.keys import PublicKey, b64url
from protocol.limits import KEYSET_TTL_MS_MAX, SIGNATURES_MAX
from protocol.wire import Closed, FormatOne, Id, Millis, Positive


class Role(StrEnum):
    """What a key may sign."""

    COMMAND = "command"
    SAFETY = "safety"
    APPROVER = "approver"
    ENROL = "enrol"


class RevokedFor(StrEnum):
    """`superseded`: bytes already issued still count. `compromised`: nothing of that key counts."""

    SUPERSEDED = "superseded"
    COMPROMISED = "compromised"


KeyText = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{43}$")]


class Root(Closed):
    """The pinned root: `threshold` of `keys` sign keysets. Known by its fingerprint, so it may travel unsigned."""

    v: FormatOne = 1
    threshold: Annotated[int, Field(ge=1, le=SIGNATURES_MAX)]
    keys: Annotated[list[KeyText], Field(min_length=1, max_length=SIGNATURES_MAX)]

    @model_validator(mode="after")
    def _attainable(self) -> "Root":
        if len(set(self.keys)) != len(self.keys) or self.threshold > len(self.keys):
            raise ValueError("the threshold needs as many distinct keys")
        return self

    @property
    def fingerprint(self) -> str:
        """`SHA256:` and the digest of threshold and sorted keys: what a join string pins."""
        text = "\n".join(["local-runner root v1", str(self.threshold), *sorted(self.keys)])
        return "SHA256:" + b64url(hashlib.sha256(text.encode("ascii")).digest())

    def public_keys(self) -> Mapping[KeyId, PublicKey]:
        """The root keys by id. Raises EnvelopeError(WEAK_KEY)."""
        keys = [PublicKey.from_b64url(x) for x in self.keys]
        return {key.key_id: key for key in keys}


class KeyEntry(Closed):
    """One key, what it may sign, and the window its commands' `iat` must lie in."""

    x: KeyText
    roles: Annotated[list[Role], Field(min_length=1, max_length=4)]
    nbf: Millis
    naf: Millis

    @cached_property
    def key(self) -> PublicKey:
        """The key itself. Raises EnvelopeError(WEAK_KEY)."""
        return PublicKey.from_b64url(self.x)


class Revocation(Closed):
    """A key that counts no more from `at` on."""

    kid: KeyText
    at: Millis
    reason: RevokedFor


class Keyset(Closed):
    """The keys of an organisation, as of `version`."""

    v: FormatOne = 1
    org: Id
    version: Positive
    iat: Millis
    exp: Millis
    min_v: Positive = 1
    keys: Annotated[list[KeyEntry], Field(min_length=1, max_length=64)]
    revoked: Annotated[list[Revocation], Field(max_length=256)] = []

    @model_validator(mode="after")
    def _bounded(self) -> "Keyset":
        if not self.iat < self.exp <= self.iat + KEYSET_TTL_MS_MAX:
            raise ValueError("a keyset expires after it is issued and within 90 days")
        return self

    def keys_for(self, *roles: Role) -> dict[KeyId, PublicKey]:
        """Keys with any of `roles` that are not compromised. Raises EnvelopeError(WEAK_KEY)."""
        dead = {entry.kid for entry in self.revoked if entry.reason is RevokedFor.COMPROMISED}
        chosen = [entry.key for entry in self.keys if set(entry.roles) & set(roles)]
        return {key.key_id: key for key in chosen if key.key_id not in dead}

    def entry(self, key_id: KeyId) -> KeyEntry | None:
        """The entry of a key by its id."""
        return next((entry for entry in self.keys if entry.key.key_id == key_id), None)

    def admits(self, key_id: KeyId, role: Role, issued_ms: int) -> Reason | None:
        """Whether the key may sign for `role` something issued at `issued_ms`; else the reason."""
        entry = self.entry(key_id)
        if entry is None:
            return Reason.UNKNOWN_KEY
        for revocation in self.revoked:
            if revocation.kid == key_id and (revocation.reason is RevokedFor.COMPROMISED or issued_ms >= revocation.at):
                return Reason.REVOKED_KEY
        if not entry.nbf <= issued_ms <= entry.naf:
            return Reason.UNKNOWN_KEY
        return None if role in entry.roles else Reason.SCOPE_DENIED


def open_keyset(envelope: bytes, root: Root) -> Verified[Keyset]:
    """Open a keyset under the pinned root. Raises EnvelopeError."""
    return open_envelope(envelope, PayloadType.KEYSET, root.public_keys(), Keyset.parse, root.threshold)


def newer(current: Verified[Keyset], candidate: Verified[Keyset]) -> Verified[Keyset]:
    """The keyset to keep of two that both opened.

    Raises:
        EnvelopeError: KEYSET_TOO_OLD for a roll-back or a twin, WRONG_AUD for another organisation's.
    """
    if candidate.value.org != current.value.org:
        raise EnvelopeError(Reason.WRONG_AUD, "the keyset of another organisation")
    if candidate.value.version < current.value.version:
        raise EnvelopeError(Reason.KEYSET_TOO_OLD, "older than the keyset at hand")
    if candidate.value.version == current.value.version and candidate.digest != current.digest:
        raise EnvelopeError(Reason.KEYSET_TOO_OLD, "another document under the same version")
    return candidate
