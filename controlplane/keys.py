"""The control plane's secrets on disk: root and command key, the key set they make, the admin token.

Every secret is a file of its own, made once, 0600. One that others may read is refused: a key that was readable is not a secret.
"""

import fcntl
import hmac
import os
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

from controlplane.errors import AnotherPlane, StartRefused
from controlplane.limits import KEYSET_TTL_MS
from protocol.envelope import PayloadType, Verified, seal
from protocol.errors import EnvelopeError
from protocol.identity import JOIN_TOKEN_BYTES, join_token
from protocol.ids import ENTROPY_BYTES, new_id
from protocol.keys import KEY_BYTES, PrivateKey, b64url, b64url_decode
from protocol.keyset import KeyEntry, Keyset, Role, Root, open_keyset
from protocol.limits import CLOCK_SKEW_MS

ADMIN_TOKEN_FILE: Final = "admin.token"  # noqa: S105 - a file name
KEYSET_FILE: Final = "keyset.json"
LOCK_FILE: Final = "lock"
_SECRET_MODE: Final = 0o600
_OTHERS: Final = 0o077
_FILE_BYTES_MAX: Final = 128 * 1024

Entropy = Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class Keys:
    """What the control plane signs and seals with."""

    directory: Path
    root_key: PrivateKey
    command: PrivateKey
    join_seed: bytes
    """Makes join tokens again from their salt, so that none is ever stored."""
    admin_token: str
    keyset: Verified[Keyset]
    first_start: bool

    @property
    def root(self) -> Root:
        """The pinned root: one key, threshold one."""
        return _root(self.root_key)

    @property
    def org(self) -> str:
        """The organisation all of it is for."""
        return self.keyset.value.org

    def is_admin(self, token: str) -> bool:
        """Whether `token` is the admin token; the comparison tells nothing by its time."""
        return hmac.compare_digest(token.encode("utf-8", "replace"), self.admin_token.encode())

    def join_token(self, salt: bytes) -> str:
        """The join token that belongs to `salt`."""
        return join_token(hmac.digest(self.join_seed, b"join token\0" + salt, "sha256")[:JOIN_TOKEN_BYTES])

    def request_digest(self, request: bytes) -> str:
        """What is kept of a request for its Idempotency-Key: keyed, since a body may hold a guessable secret."""
        return hmac.digest(self.join_seed, b"request\0" + request, "sha256").hex()

    def renewed(self, now_ms: int, version: int | None = None) -> "Keys":
        """The same keys under the next version of the keyset (at least `version`), durable before it is used."""
        last = self.keyset.value
        following = max(last.version + 1, version or 0)
        envelope = _issue(self.root_key, self.command, last.org, following, last.keys[0].nbf, now_ms)
        _create(self.directory / KEYSET_FILE, envelope)
        return Keys(
            self.directory,
            self.root_key,
            self.command,
            self.join_seed,
            self.admin_token,
            open_keyset(envelope, self.root),
            self.first_start,
        )

    def wants_renewal(self, now_ms: int) -> bool:
        """Whether less than a third of the keyset's life is left."""
        keyset = self.keyset.value
        return now_ms >= keyset.exp - (keyset.exp - keyset.iat) // 3


def token_hash(token: str) -> str:
    """What is kept of a join token."""
    return sha256(token.encode()).hexdigest()


def lock_directory(directory: Path) -> int:
    """Make `directory` where it is missing and hold it alone. Returns the fd to keep open. Raises StartRefused."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, _SECRET_MODE)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        os.close(fd)
        raise AnotherPlane(f"another control plane has {directory}") from exc
    return fd


def open_keys(directory: Path, now_ms: int, entropy: Entropy) -> Keys:
    """Read the keys in `directory`, or make them on the first start. Raises StartRefused."""
    first = not (directory / KEYSET_FILE).exists()
    root_key = PrivateKey(_seed(directory / "root.key", entropy))
    command = PrivateKey(_seed(directory / "command.key", entropy))
    join_seed = _seed(directory / "join.key", entropy)
    admin = _secret(directory / ADMIN_TOKEN_FILE, lambda: b64url(entropy(KEY_BYTES)))
    if first:
        org = new_id("org", now_ms, entropy(ENTROPY_BYTES))
        _create(directory / KEYSET_FILE, _issue(root_key, command, org, 1, now_ms - CLOCK_SKEW_MS, now_ms))
    try:
        keyset = open_keyset(_read(directory / KEYSET_FILE).strip(), _root(root_key))
    except EnvelopeError as exc:
        raise StartRefused(f"{directory / KEYSET_FILE} does not open with root.key: {exc}") from exc
    keys = Keys(directory, root_key, command, join_seed, admin, keyset, first)
    return keys.renewed(now_ms) if keys.wants_renewal(now_ms) else keys


def _root(key: PrivateKey) -> Root:
    return Root(threshold=1, keys=[key.public.x])


def _issue(root: PrivateKey, command: PrivateKey, org: str, version: int, nbf: int, now_ms: int) -> bytes:
    exp = now_ms + KEYSET_TTL_MS
    roles = [Role.COMMAND, Role.SAFETY, Role.ENROL]
    keyset = Keyset(
        org=org,
        version=version,
        iat=now_ms,
        exp=exp,
        keys=[KeyEntry(x=command.public.x, roles=roles, nbf=min(nbf, now_ms), naf=exp)],
    )
    return seal(keyset.dump(), PayloadType.KEYSET, [root])


def _seed(path: Path, entropy: Entropy) -> bytes:
    text = _secret(path, lambda: b64url(entropy(KEY_BYTES)))
    try:
        return b64url_decode(text, KEY_BYTES)
    except ValueError as exc:
        raise StartRefused(f"{path} holds no key: restore it from a backup") from exc


def _secret(path: Path, make: Callable[[], str]) -> str:
    """The text of a secret file, made on the first start."""
    if not path.exists():
        _create(path, make().encode())
    return _read(path, secret=True).decode("ascii", "replace").strip()


def _read(path: Path, *, secret: bool = False) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as exc:
        raise StartRefused(f"{path} cannot be read: {exc.strerror}") from exc
    with open(fd, "rb") as file:
        mode = os.fstat(fd).st_mode & 0o777
        if secret and mode & _OTHERS:
            raise StartRefused(f"{path} has mode {mode:04o}, others may read it: make new keys, or chmod 600 {path}")
        return file.read(_FILE_BYTES_MAX)


def _create(path: Path, content: bytes) -> None:
    """A 0600 file with this content, whole or not there, and durable."""
    fresh = path.with_name(path.name + ".new")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, _SECRET_MODE)
    with open(fd, "wb") as file:
        os.fchmod(fd, _SECRET_MODE)
        file.write(content + b"\n")
        file.flush()
        os.fsync(fd)
    os.rename(fresh, path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
