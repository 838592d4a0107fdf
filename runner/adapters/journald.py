"""systemd's journal: lines told to it as fields, and read back of it by `journalctl`.

Telling never waits: a journal that takes nothing now is told nothing (False), one that is not there raises OSError, and the caller
has another place for the line. systemd says in `JOURNAL_STREAM` that a stream is the journal's: it is compared, since a variable
is inherited by programs whose stderr somebody has led elsewhere.
"""

import errno
import fcntl
import json
import os
import re
import socket
import struct
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

SOCKET: Final = Path("/run/systemd/journal/socket")
FIELDS_MAX: Final = 32
"""Fields of one line beside the journal's own: no event of ours has half as many."""
NAME_CHARS_MAX: Final = 64
"""journald drops fields with longer names."""
FIELD_BYTES_MAX: Final = 16 * 1024
"""One value; the log cuts texts at a quarter of that in characters, so only what is nested meets this bound."""
READ_TIMEOUT_S: Final = 30.0
"""`journalctl` over a journal of years on a slow disk."""
ENTRY_BYTES_MAX: Final = 4 * 1024 * 1024
"""One entry as `journalctl -o json` prints it: more than any line of ours can become, fields of journald's own included."""
_PRIORITIES: Final[Mapping[str, int]] = {"debug": 7, "info": 6, "warning": 4, "error": 3}
_LEVELS: Final = ("error", "error", "error", "error", "warning", "info", "info", "debug")
"""By syslog's priority: others write into our unit's journal too, systemd itself before all."""
_PREFIX: Final = "RUNNER_"
_FOREIGN: Final = re.compile(r"[^A-Z0-9_]")
_LENGTH: Final = struct.Struct("<Q")
_TOO_BIG: Final = (errno.EMSGSIZE, errno.ENOBUFS)
_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def is_journal(environ: Mapping[str, str], fd: int = 2) -> bool:
    """Whether `fd` is the stream that systemd gave us for the journal."""
    try:
        found = os.fstat(fd)
    except OSError:
        return False
    return environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def priority(level: str) -> int:
    """The priority of syslog that a level of ours is."""
    return _PRIORITIES.get(level, _PRIORITIES["info"])


def journal_fields(level: str, message: str, values: Mapping[str, str]) -> list[tuple[str, str]]:
    """One line's fields. `values` become RUNNER_NAME in their order, as many as FIELDS_MAX; names are made valid."""
    fields = {"MESSAGE": message, "PRIORITY": str(priority(level)), "SYSLOG_IDENTIFIER": "runner"}
    for key, value in list(values.items())[:FIELDS_MAX]:
        name = _FOREIGN.sub("_", f"{_PREFIX}{key.upper()}")[:NAME_CHARS_MAX]
        fields.setdefault(name, value)
    return list(fields.items())


def encode(fields: Sequence[tuple[str, str]]) -> bytes:
    """The journal's native form: `NAME=value`, or name, length and value where the value holds a line's end."""
    parts: list[bytes] = []
    for name, text in fields:
        value = text.encode("utf-8", "backslashreplace")
        if len(value) > FIELD_BYTES_MAX:
            value = value[:FIELD_BYTES_MAX].decode("utf-8", "ignore").encode("utf-8")
        key = name.encode("ascii")
        if b"\n" in value:
            parts += [key, b"\n", _LENGTH.pack(len(value)), value, b"\n"]
        else:
            parts += [key, b"=", value, b"\n"]
    return b"".join(parts)


class JournalSocket:
    """Where journald takes entries. It is addressed anew for each, so that one that was started again is found."""

    def __init__(self, path: Path = SOCKET) -> None:
        self._path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)

    def send(self, entry: bytes) -> bool:
        """Tell one entry; False when the journal takes none at the moment. Raises OSError when there is no journal."""
        try:
            self._socket.sendmsg([entry], (), socket.MSG_DONTWAIT, self._path)
        except BlockingIOError:
            return False
        except OSError as exc:
            if exc.errno not in _TOO_BIG:
                raise
            return self._send_file(entry)
        return True

    def close(self) -> None:
        """Give the socket back."""
        self._socket.close()

    def _send_file(self, entry: bytes) -> bool:
        """What is too long for a datagram goes as a sealed file in memory."""
        fd = os.memfd_create("runner-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with open(fd, "wb", buffering=0, closefd=False) as file:
                file.write(entry)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))]
            self._socket.sendmsg([b""], rights, socket.MSG_DONTWAIT, self._path)
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
        return True


def read_journal(unit: str, *, user: bool, lines: int, follow: bool) -> Iterator[dict[str, Any]]:
    """Lines of a unit, oldest first, in the form of our log: timestamp, level, event and the rest.

    Raises:
        OSError: there is no `journalctl`, or it failed; the error says what it said.
        TimeoutError: it took longer than READ_TIMEOUT_S; following has no end of its own.
    """
    argv = ["journalctl", *(["--user"] if user else []), "--no-pager", "--quiet", "--all", "--output=json"]
    argv += [f"--unit={unit}", f"--lines={lines}"]
    if not follow:
        try:
            done = subprocess.run(
                argv, capture_output=True, timeout=READ_TIMEOUT_S, stdin=subprocess.DEVNULL, check=False
            )
        except subprocess.TimeoutExpired:
            raise TimeoutError(errno.ETIMEDOUT, "journalctl does not answer") from None
        if done.returncode != 0:
            raise OSError(errno.EIO, f"journalctl: {done.stderr.decode('utf-8', 'replace').strip()[:300]}")
        yield from _lines(done.stdout.splitlines())
        return
    with subprocess.Popen([*argv, "--follow"], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None, "it was asked for"
        try:
            yield from _lines(iter(lambda: process.stdout.readline(ENTRY_BYTES_MAX), b""))  # type: ignore[union-attr]
        finally:
            process.terminate()


def _lines(entries: Iterator[bytes] | list[bytes]) -> Iterator[dict[str, Any]]:
    for text in entries:
        try:
            entry = json.loads(text)
        except (ValueError, RecursionError):
            continue  # half an entry that was longer than the bound
        if isinstance(entry, dict):
            yield line_of(entry)


def line_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A journal's entry as a line of our log. Who else wrote there has a MESSAGE alone, which is then the event."""
    from datetime import UTC, datetime

    stamp = str(entry.get("__REALTIME_TIMESTAMP", ""))
    urgency = str(entry.get("PRIORITY", ""))
    line: dict[str, Any] = {}
    if stamp.isdigit() and len(stamp) <= 17:
        line["timestamp"] = datetime.fromtimestamp(int(stamp) / 1_000_000, UTC).isoformat().replace("+00:00", "Z")
    line["level"] = _LEVELS[int(urgency)] if urgency in "01234567" and urgency else "info"
    event = entry.get(f"{_PREFIX}EVENT")
    if event is None:
        return {**line, "event": _text(entry.get("SYSLOG_IDENTIFIER")), "message": _text(entry.get("MESSAGE"))}
    line["event"] = _text(event)
    for name, value in entry.items():
        if name.startswith(_PREFIX) and name != f"{_PREFIX}EVENT":
            line[name.removeprefix(_PREFIX).lower()] = _text(value)
    return line


def _text(value: object) -> str:
    """A field as text: journalctl gives numbers of bytes where a value is not printable, and null where it is too long."""
    if isinstance(value, list) and all(type(byte) is int and 0 <= byte < 256 for byte in value):
        return bytes(value).decode("utf-8", "backslashreplace")
    return "" if value is None else str(value)
