"""The runner's identity on disk: its two keys, the pinned root, the keyset, its certificate, and where its plane is.

The keys are made here and never leave. Everything else is kept as it was received and opened anew at each start, so a file that
was tampered with is an error and not an identity. `plane.json` is written last: without it there is no enrolment.
"""

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal, TypeVar

from pydantic import Field

from protocol.envelope import Verified
from protocol.errors import EnvelopeError, Reason
from protocol.handshake import open_certificate
from protocol.identity import Certificate
from protocol.keys import KEY_BYTES, PrivateKey, b64url, b64url_decode
from protocol.keyset import Keyset, Root, newer, open_keyset
from protocol.secretbox import recipient_of
from protocol.wire import Closed
from runner.errors import Broken, ConfigError, NotEnrolled, Refused

KEY: Final = "runner.key"
SEAL_KEY: Final = "seal.key"
ROOT: Final = "root.json"
KEYSET: Final = "keyset.json"
CERTIFICATE: Final = "certificate.json"
CERTIFICATE_KEYSET: Final = "certificate.keyset.json"
"""The keyset the certificate came with: a later one may no longer name the key that signed it."""
PLANE: Final = "plane.json"
FILE_BYTES_MAX: Final = 256 * 1024
"""More than any envelope, root or key has."""
_FILE_MODE: Final = 0o600
_DIRECTORY_MODE: Final = 0o700

C = TypeVar("C", bound=Closed)


class Plane(Closed):
    """Where the control plane is."""

    v: Literal[1] = 1
    url: Annotated[str, Field(pattern=r"^wss?://[!-~]{1,2000}$")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who this runner is, everything in it verified against the pinned root. An expired keyset is judged elsewhere."""

    key: PrivateKey
    seal_seed: bytes
    root: Root
    keyset: Verified[Keyset]
    certificate: Verified[Certificate]
    url: str

    def __repr__(self) -> str:
        return f"Identity({self.certificate.value.runner})"


class Keystore:
    """The directory `<state>/identity/`: 0700, its files 0600 from their first byte, each replaced as a whole."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def enrolled(self) -> bool:
        """Whether an enrolment was completed here."""
        return (self._directory / PLANE).exists()

    def load(self) -> Identity:
        """Read and verify everything. Raises NotEnrolled, ConfigError that names the file and what to do, Broken."""
        with self._opened() as directory:
            plane = self._document(directory, PLANE, Plane)
            key, seal_seed = self._seed(directory, KEY), self._seed(directory, SEAL_KEY)
            root = self._document(directory, ROOT, Root)
            keyset = self._keyset(directory, KEYSET, root)
            certificate = self._certificate(directory, root, keyset)
        mine = PrivateKey(key)
        if (certificate.value.x, certificate.value.seal_x) != (mine.public.x, recipient_of(seal_seed)):
            raise self._wrong(CERTIFICATE, "a certificate of the keys beside it")
        return Identity(key=mine, seal_seed=seal_seed, root=root, keyset=keyset, certificate=certificate, url=plane.url)

    def create_keys(self) -> tuple[PrivateKey, bytes]:
        """The runner's key and its seal seed: those that are there, and new ones in place of those that are not.

        Raises ConfigError where what is there is no key of ours, and Broken when the disk failed.
        """
        try:
            self._directory.mkdir(mode=_DIRECTORY_MODE, parents=True, exist_ok=True)
        except OSError as exc:
            raise ConfigError(str(self._directory), "", f"a directory that can be made ({exc.strerror})") from exc
        with self._opened() as directory:
            seeds = [self._seed_or_new(directory, name) for name in (KEY, SEAL_KEY)]
        return PrivateKey(seeds[0]), seeds[1]

    def keep(self, keyset: Verified[Keyset], certificate: Verified[Certificate] | None) -> None:
        """Make a newer keyset durable, and the certificate of a new incarnation with it.

        Raises:
            Refused: KEYSET_TOO_OLD or STALE_INC; what is stored stays.
            NotEnrolled, ConfigError, Broken: as `load`.
        """
        with self._opened() as directory:
            root = self._document(directory, ROOT, Root)
            stored = self._keyset(directory, KEYSET, root)
            try:
                newer(stored, keyset)
            except EnvelopeError as exc:
                raise Refused(exc.reason, exc.detail) from exc
            if certificate is not None:
                known = self._certificate(directory, root, stored).value
                if certificate.value.inc < known.inc:
                    raise Refused(Reason.STALE_INC, "a certificate of an earlier incarnation")
            # In this order a certificate always finds a keyset that opens it: the one it came with, or the newest.
            self._replace(directory, KEYSET, keyset.envelope)
            if certificate is not None:
                self._replace(directory, CERTIFICATE, certificate.envelope)
                self._replace(directory, CERTIFICATE_KEYSET, keyset.envelope)

    def keep_enrolment(self, root: Root, keyset: bytes, certificate: bytes, url: str) -> None:
        """Make an enrolment durable, in place of any other. The envelopes were verified by the caller.

        Raises ConfigError or Broken; then there is the old enrolment or none.
        """
        with self._opened() as directory:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(PLANE, dir_fd=directory)
            os.fsync(directory)
            self._replace(directory, ROOT, root.dump())
            self._replace(directory, KEYSET, keyset)
            self._replace(directory, CERTIFICATE, certificate)
            self._replace(directory, CERTIFICATE_KEYSET, keyset)
            self._replace(directory, PLANE, Plane(url=url).dump())

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        try:
            fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NotEnrolled(f"{self._directory}: no identity; run: runner enroll") from None
        except OSError as exc:
            raise ConfigError(str(self._directory), "", f"a directory, no link ({exc.strerror})") from exc
        try:
            self._check(self._directory, os.fstat(fd), _DIRECTORY_MODE)
            yield fd
        except OSError as exc:
            reason = Reason.DISK_FULL if exc.errno in (errno.ENOSPC, errno.EDQUOT) else Reason.INFRA
            raise Broken(reason, f"{self._directory}: {exc.strerror}") from exc
        finally:
            os.close(fd)

    def _check(self, path: Path, found: os.stat_result, mode_max: int) -> None:
        """Ours, and nobody else's. Raises ConfigError."""
        if found.st_uid != os.geteuid():
            raise ConfigError(str(path), "", f"owner {os.geteuid()}, found {found.st_uid}")
        mode = stat.S_IMODE(found.st_mode)
        if mode & ~mode_max:
            raise ConfigError(
                str(path), "", f"mode {mode_max:04o}, found {mode:04o}; put it right with: chmod {mode_max:o} {path}"
            )

    def _read(self, directory: int, name: str) -> bytes:
        path = self._directory / name
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        except FileNotFoundError:
            raise NotEnrolled(f"{path} is missing; run: runner enroll") from None
        except OSError as exc:
            raise ConfigError(str(path), "", f"a readable file, no link ({exc.strerror})") from exc
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise self._wrong(name, "a plain file")
            self._check(path, found, _FILE_MODE)
            with open(fd, "rb", closefd=False) as file:
                content = file.read(FILE_BYTES_MAX + 1)
        finally:
            os.close(fd)
        if len(content) > FILE_BYTES_MAX:
            raise self._wrong(name, f"at most {FILE_BYTES_MAX} bytes")
        return content

    def _seed(self, directory: int, name: str) -> bytes:
        content = self._read(directory, name)
        try:
            return b64url_decode(content.decode("ascii").removesuffix("\n"), KEY_BYTES)
        except ValueError:
            # The cause would print what may be most of a key.
            raise self._wrong(name, "a key: 43 characters of base64url and a newline") from None

    def _seed_or_new(self, directory: int, name: str) -> bytes:
        with contextlib.suppress(NotEnrolled):
            return self._seed(directory, name)
        temporary = self._write(directory, name, b64url(secrets.token_bytes(KEY_BYTES)).encode() + b"\n")
        try:
            # Unlike a rename, a link never replaces: of two that make a key at once, both use the one that was first.
            with contextlib.suppress(FileExistsError):
                os.link(temporary, name, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)
        finally:
            os.unlink(temporary, dir_fd=directory)
        os.fsync(directory)
        return self._seed(directory, name)

    def _document(self, directory: int, name: str, model: type[C]) -> C:
        content = self._read(directory, name)
        try:
            return model.parse(content)
        except ValueError as exc:
            raise self._wrong(name, f"what enrolment wrote there ({exc})") from exc

    def _keyset(self, directory: int, name: str, root: Root) -> Verified[Keyset]:
        content = self._read(directory, name)
        try:
            return open_keyset(content, root)
        except EnvelopeError as exc:
            raise self._wrong(name, f"a keyset of the pinned root ({exc})") from exc

    def _certificate(self, directory: int, root: Root, keyset: Verified[Keyset]) -> Verified[Certificate]:
        content = self._read(directory, CERTIFICATE)
        try:
            return open_certificate(content, self._keyset(directory, CERTIFICATE_KEYSET, root).value)
        except EnvelopeError:
            pass
        try:
            return open_certificate(content, keyset.value)
        except EnvelopeError as exc:
            raise self._wrong(CERTIFICATE, f"a certificate by an enrol key ({exc})") from exc

    def _wrong(self, name: str, expected: str) -> ConfigError:
        return ConfigError(str(self._directory / name), "", expected)

    def _write(self, directory: int, name: str, content: bytes) -> str:
        """A new durable file beside `name`; returns what it is called."""
        temporary = f".{name}.{secrets.token_hex(8)}"
        fd = os.open(
            temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, _FILE_MODE, dir_fd=directory
        )
        try:
            with open(fd, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(fd)
        except BaseException:
            os.unlink(temporary, dir_fd=directory)
            raise
        return temporary

    def _replace(self, directory: int, name: str, content: bytes) -> None:
        temporary = self._write(directory, name, content)
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
        os.fsync(directory)
