"""The attempt's JSON files: reading, writing, replacing whole.

The C scanner reads JSON without the `json` package, a small writer makes it. Every path is relative to the
directory's descriptor, so a renamed or replaced parent cannot send a write elsewhere.
"""

from __future__ import annotations

import posix as os
from _json import encode_basestring_ascii, make_scanner

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

SPEC_BYTES_MAX: Final = 262_144
JSON_BYTES_MAX: Final = 65_536
ERROR_BYTES_MAX: Final = 65_536
# Room for an exit record with all the evidence it may hold; reserving it lets a full disk still take the record.
EXIT_RESERVED_BYTES: Final = 16_384
_READ: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
_WRITE: Final = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


class FileError(ValueError):
    """A file of the attempt that cannot be used; the text says which and why."""


class _Scanner:
    """What `_json.make_scanner` asks of its context."""

    strict = True
    object_hook = None
    parse_float = float
    parse_int = int

    def __init__(self) -> None:
        self.memo: dict[str, str] = {}

    @staticmethod
    def parse_constant(name: str) -> float:
        """Refuse NaN and the infinities."""
        raise ValueError(f"{name} is not JSON")

    @staticmethod
    def object_pairs_hook(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
        """Refuse an object that names a key twice."""
        made = dict(pairs)
        if len(made) != len(pairs):
            raise ValueError("a key is named twice")
        return made


def decode(data: bytes) -> Json:
    """One JSON value. Raises ValueError for anything else."""
    text = data.decode("utf-8").strip(" \t\r\n")
    try:
        value, end = make_scanner(_Scanner())(text, 0)  # type: ignore[arg-type]  # it asks for the attributes only
    except StopIteration:
        raise ValueError("not JSON") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if end != len(text):
        raise ValueError("text after the value")
    made: Json = value
    return made


def encode(value: Json) -> str:
    """`value` as ASCII JSON."""
    if value is None:
        return "null"
    if value is True:
        return "true"
    if value is False:
        return "false"
    if isinstance(value, str):
        return encode_basestring_ascii(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{encode_basestring_ascii(k)}:{encode(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join([encode(item) for item in value]) + "]"
    return repr(value)


def read_object(dirfd: int, name: str, bytes_max: int) -> dict[str, Json]:
    """The JSON object in file `name`. Raises FileError when it is too large, not an object or not of version 1."""
    try:
        fd = os.open(name, _READ, dir_fd=dirfd)
    except OSError as exc:
        raise FileError(f"{name}: {exc.strerror}") from exc
    try:
        size = os.fstat(fd).st_size
        if size > bytes_max:
            raise FileError(f"{name}: {size} bytes, at most {bytes_max} are read")
        data = os.read(fd, bytes_max)
    finally:
        os.close(fd)
    try:
        value = decode(data)
    except ValueError as exc:
        raise FileError(f"{name}: {exc}") from exc
    if not isinstance(value, dict):
        raise FileError(f"{name}: not an object")
    version = value.get("v")
    if version is not True and version == 1:
        return value
    raise FileError(f"{name}: version {version!r} is not known")


def replace(dirfd: int, name: str, data: bytes) -> None:
    """Put `data` in place of file `name` by rename: a reader sees the old or the new, whole. Raises OSError."""
    temporary = name + ".tmp"
    fd = os.open(temporary, _WRITE | os.O_TRUNC, 0o600, dir_fd=dirfd)
    try:
        write_all(fd, data)
    finally:
        os.close(fd)
    os.rename(temporary, name, src_dir_fd=dirfd, dst_dir_fd=dirfd)


def reserve(dirfd: int, name: str) -> None:
    """Set disk aside for `name`, as far as the file system can."""
    try:
        fd = os.open(name + ".tmp", _WRITE, 0o600, dir_fd=dirfd)
    except OSError:
        return
    try:
        os.posix_fallocate(fd, 0, EXIT_RESERVED_BYTES)
    except OSError:
        return
    finally:
        os.close(fd)


def replace_durably(dirfd: int, name: str, data: bytes) -> None:
    """As `replace`, over the bytes that `reserve` set aside, with the file and its directory synced. Raises OSError."""
    temporary = name + ".tmp"
    fd = os.open(temporary, _WRITE, 0o600, dir_fd=dirfd)
    try:
        write_all(fd, data)
        os.ftruncate(fd, len(data))
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(temporary, name, src_dir_fd=dirfd, dst_dir_fd=dirfd)
    os.fsync(dirfd)


def write_all(fd: int, data: bytes) -> None:
    """Write every byte. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def note_failure(dirfd: int, exc: BaseException) -> None:
    """Append the traceback of `exc` to `shim.err`, within its bound; a failure to do so is not told to anybody."""
    lines = ["Traceback (innermost last):\n"]
    trace = exc.__traceback__
    while trace is not None and len(lines) < 64:
        code = trace.tb_frame.f_code
        lines.append(f"  {code.co_filename}:{trace.tb_lineno} in {code.co_name}\n")
        trace = trace.tb_next
    lines.append(f"{type(exc).__name__}: {exc}\n")
    data = "".join(lines).encode("utf-8", "backslashreplace")
    try:
        fd = os.open("shim.err", _WRITE | os.O_APPEND, 0o600, dir_fd=dirfd)
    except OSError:
        return
    try:
        room = ERROR_BYTES_MAX - os.fstat(fd).st_size
        if room > 0:
            write_all(fd, data[:room])
    except OSError:
        return
    finally:
        os.close(fd)
