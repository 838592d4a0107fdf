"""The journal's native form: what is sent is what was meant, whatever bytes are in it, and sending never waits."""

import os
import re
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.adapters import journald
from runner.adapters.journald import (
    FIELD_BYTES_MAX,
    FIELDS_MAX,
    NAME_CHARS_MAX,
    JournalSocket,
    encode,
    is_journal,
    journal_fields,
    line_of,
    read_journal,
)


def decode(entry: bytes) -> list[tuple[str, bytes]]:
    """Fields as journald reads them."""
    fields = []
    while entry:
        line, _, rest = entry.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (size,) = struct.unpack("<Q", rest[:8])
            value, ended, rest = rest[8 : 8 + size], rest[8 + size : 9 + size], rest[9 + size :]
            assert ended == b"\n" and len(value) == size
        fields.append((name.decode("ascii"), value))
        entry = rest
    return fields


@pytest.fixture
def ear(tmp_path: Path) -> Iterator[socket.socket]:
    """A journal that hears."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(str(tmp_path / "socket"))
        heard.settimeout(5)
        yield heard


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[JournalSocket]:
    """What tells it."""
    teller = JournalSocket(tmp_path / "socket")
    yield teller
    teller.close()


@given(st.dictionaries(st.text(), st.text()), st.text())
def test_any_line_arrives_field_by_field(values: dict[str, str], message: str) -> None:
    """Names are valid ones, values are whole, and nothing in a value becomes a field of its own."""
    fields = journal_fields("warning", message, values)
    heard = decode(encode(fields))
    assert [name for name, _ in heard] == [name for name, _ in fields]
    assert [value for _, value in heard] == [value.encode("utf-8", "backslashreplace") for _, value in fields]
    assert dict(heard)["PRIORITY"] == b"4" and dict(heard)["SYSLOG_IDENTIFIER"] == b"runner"
    assert all(re.fullmatch(r"[A-Z][A-Z0-9_]{0,63}", name) for name, _ in heard)
    assert len({name for name, _ in heard}) == len(heard) <= FIELDS_MAX + 3


def test_a_value_with_a_line_end_goes_with_its_length() -> None:
    """As the protocol has it; one without goes plainly."""
    assert encode([("A", "x=y")]) == b"A=x=y\n"
    assert encode([("A", "x\nB=forged")]) == b"A\n\x0a\0\0\0\0\0\0\0x\nB=forged\n"


def test_of_two_names_that_become_one_the_first_counts() -> None:
    """A line's own event is never written over by one of its values."""
    fields = dict(journal_fields("info", "m", {"event": "a.b", "EVENT": "forged", "x y": "1", "x-y": "2"}))
    assert (fields["RUNNER_EVENT"], fields["RUNNER_X_Y"]) == ("a.b", "1")


def test_names_and_sizes_are_bounded() -> None:
    """A long name is cut to what journald takes, a long value at a character, many fields to the first ones."""
    fields = journal_fields("info", "m", {"k" * 100: "é" * FIELD_BYTES_MAX, **{f"n{n}": "" for n in range(100)}})
    assert len(fields) == FIELDS_MAX + 3 and len(fields[3][0]) == NAME_CHARS_MAX
    ((_, value),) = decode(encode([("A", "xé" * FIELD_BYTES_MAX)]))
    assert FIELD_BYTES_MAX - 2 < len(value) <= FIELD_BYTES_MAX and value.decode("utf-8").endswith(("x", "é"))


def test_an_entry_is_one_datagram(ear: socket.socket, journal: JournalSocket) -> None:
    """Sent as it is."""
    assert journal.send(b"MESSAGE=x\n")
    assert ear.recv(100) == b"MESSAGE=x\n"


def test_a_long_entry_goes_as_a_sealed_file(ear: socket.socket, journal: JournalSocket) -> None:
    """What no datagram holds: a descriptor of memory that nobody can change any more."""
    entry = b"MESSAGE=" + b"x" * 1_000_000 + b"\n"
    assert journal.send(entry)
    data, fds, _, _ = socket.recv_fds(ear, 100, 1)
    (fd,) = fds
    with open(fd, "r+b", buffering=0) as file:
        assert data == b"" and os.pread(fd, 2_000_000, 0) == entry
        with pytest.raises(PermissionError):
            file.write(b"y")


def test_a_journal_that_takes_nothing_is_not_waited_for(ear: socket.socket, journal: JournalSocket) -> None:
    """Its queue is full: False, at once; and it is told again when it has room."""
    sent = 0
    while journal.send(b"MESSAGE=x\n"):
        sent += 1
        assert sent < 100_000
    assert sent > 0
    ear.recv(100)
    assert journal.send(b"MESSAGE=y\n")


def test_no_journal_is_an_error_and_a_new_one_is_found(tmp_path: Path, journal: JournalSocket) -> None:
    """Gone while it is started again; then it hears, without a word of ours."""
    with pytest.raises(OSError, match="No such file"):
        journal.send(b"MESSAGE=x\n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as again:
        again.bind(str(tmp_path / "socket"))
        assert journal.send(b"MESSAGE=y\n") and again.recv(100) == b"MESSAGE=y\n"


def test_a_stream_is_the_journals_when_it_is_the_one_that_systemd_named(tmp_path: Path) -> None:
    """By device and inode: a variable is inherited, a descriptor may lead elsewhere by now."""
    with open(tmp_path / "a", "w") as mine, open(tmp_path / "b", "w") as other:
        found = os.fstat(mine.fileno())
        environ = {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}
        assert is_journal(environ, mine.fileno()) and not is_journal(environ, other.fileno())
        assert not is_journal({}, mine.fileno()) and not is_journal({"JOURNAL_STREAM": "x"}, mine.fileno())
        closed = os.dup(other.fileno())
        os.close(closed)
        assert not is_journal(environ, closed)


def test_an_entry_is_read_back_as_a_line() -> None:
    """Ours by its fields, with bytes as journalctl gives them; anybody else's by its message."""
    stamp = {"__REALTIME_TIMESTAMP": "1795296903373414", "_PID": "7"}
    ours = {**stamp, "PRIORITY": "4", "MESSAGE": "m", "RUNNER_EVENT": "session.lost", "RUNNER_REASON": [97, 10, 255]}
    assert line_of(ours) == {
        "timestamp": "2026-11-21T21:35:03.373414Z",
        "level": "warning",
        "event": "session.lost",
        "reason": "a\n\\xff",
    }
    other = line_of({**stamp, "PRIORITY": "99", "SYSLOG_IDENTIFIER": "systemd", "MESSAGE": "Started."})
    assert (other["event"], other["message"], other["level"]) == ("systemd", "Started.", "info")
    assert line_of({"RUNNER_EVENT": None, "MESSAGE": None})["message"] == ""


def test_a_journal_that_cannot_be_read_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no entry is passed over; a `journalctl` that fails, is missing or never ends is an error that says so."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program = tmp_path / "journalctl"

    def read(script: str, *, follow: bool = False) -> list[str]:
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o700)
        return [line["event"] for line in read_journal("u", user=True, lines=3, follow=follow)]

    script = """echo '{"RUNNER_EVENT": "a.b"}'; echo half; echo '[1]'; echo '{"RUNNER_EVENT": "c.d"}'"""
    assert read(script) == read(script, follow=True) == ["a.b", "c.d"]
    assert read("""echo "{\\"RUNNER_EVENT\\": \\"$*\\"}" """) == [
        "--user --no-pager --quiet --all --output=json --unit=u --lines=3"
    ]
    with pytest.raises(OSError, match="journalctl: no permission"):
        read("echo no permission >&2; exit 1")
    monkeypatch.setattr(journald, "READ_TIMEOUT_S", 0.1)
    with pytest.raises(TimeoutError, match="does not answer"):
        read("exec sleep 60")
    program.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError):
        list(read_journal("u", user=False, lines=3, follow=False))


def test_priorities_are_those_of_syslog() -> None:
    """And come back as the same level."""
    for level in ("debug", "info", "warning", "error"):
        assert line_of({"PRIORITY": str(journald.priority(level))})["level"] == level
