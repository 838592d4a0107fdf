"""Where lines go: nothing waits, nothing raises, what is not told is counted, and the owner reads the window at any pace."""

import json
import os
import socket
import sys
import threading
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from runner.adapters.journald import JournalSocket
from runner.logsink import (
    EXCERPT_LINES_MAX,
    KEPT_BYTES_MAX,
    KEPT_LINES_MAX,
    REPEATS_BURST,
    REPEATS_TABLE_MAX,
    REPEATS_WINDOW_MS,
    JournalOutlet,
    Repeats,
    Sink,
    StreamOutlet,
)


class Told:
    """An outlet that takes lines, as long as it is open; `fault` is raised by it."""

    def __init__(self) -> None:
        self.lines: list[Mapping[str, Any]] = []
        self.open = True
        self.fault: Exception | None = None

    def tell(self, _level: str, line: Mapping[str, Any], text: str) -> bool:
        """Take it."""
        if self.fault is not None:
            raise self.fault
        if self.open:
            assert json.loads(text) == line
            self.lines.append(line)
        return self.open


class Clock:
    """Milliseconds."""

    def __init__(self) -> None:
        self.now = 1_000_000

    def __call__(self) -> int:
        """As of now."""
        return self.now


def a_sink() -> tuple[Sink, Told, Clock]:
    """With what it stands on."""
    told, clock = Told(), Clock()
    return Sink(told, "info", clock), told, clock


def line(event: str = "session.lost", **fields: Any) -> dict[str, Any]:
    """A warning."""
    return {"event": event, "level": "warning", **fields}


# --- repeats ------------------------------------------------------------------------------------------------------------


def test_repeats_are_told_of_once_a_window() -> None:
    """The first ones are told; the next line of the event, when the window is over, says how many were not."""
    sink, told, clock = a_sink()
    for _ in range(REPEATS_BURST + 7):
        sink.write(line(reason="NO_ROUTE"))
    assert len(told.lines) == REPEATS_BURST and not any("suppressed" in one for one in told.lines)
    clock.now += REPEATS_WINDOW_MS
    sink.write(line(reason="NO_ROUTE"))
    sink.write(line(reason="NO_ROUTE"))
    assert [one.get("suppressed") for one in told.lines[REPEATS_BURST:]] == [7, None]
    assert sink.state()["suppressed"] == 7


def test_a_line_of_its_own_kind_is_never_the_repeat_of_another() -> None:
    """Another level, reason, attempt, or subject where there is no reason: each is told."""
    sink, told, _ = a_sink()
    for _ in range(REPEATS_BURST + 1):
        sink.write(line(reason="A"))
    others = [
        line(reason="B"),
        line(reason="A", attempt="ex_1.1"),
        {**line(reason="A"), "level": "error"},
        line("command.accepted", cmd_id="c1"),
        line("command.accepted", cmd_id="c2"),
        line("session.established", session="s1"),
        line("session.established", session="s2"),
    ]
    for other in others:
        sink.write(other)
    assert told.lines[REPEATS_BURST:] == others
    for number in range(REPEATS_BURST * 2):
        sink.write(line("command.refused", reason="BAD_SIGNATURE", cmd_id=f"c{number}"))
        sink.write(line("command.accepted", cmd_id=f"d{number}"))
    events = [one["event"] for one in told.lines]
    assert (
        events.count("command.refused") == REPEATS_BURST and events.count("command.accepted") == 2 + REPEATS_BURST * 2
    )


@pytest.mark.parametrize("event", ["daemon.started", "alarm.raised"])
def test_alarms_and_the_daemons_own_life_are_always_told(event: str) -> None:
    """However often."""
    sink, told, _ = a_sink()
    for _ in range(REPEATS_BURST * 3):
        sink.write(line(event))
    assert len(told.lines) == REPEATS_BURST * 3


def test_errors_repeat_like_anything_else_and_the_first_is_told() -> None:
    """Whatever the table holds by then."""
    repeats = Repeats()
    for number in range(REPEATS_TABLE_MAX * 3):
        kind = {"event": "journal.broken", "level": "error", "reason": str(number)}
        assert repeats.admits(kind, number)
    assert len(repeats._windows) == REPEATS_TABLE_MAX


def test_what_makes_room_in_the_table_is_still_told_of() -> None:
    """Its count goes to the next line of its event."""
    repeats = Repeats()
    for _ in range(REPEATS_BURST + 5):
        repeats.admits(line(reason="first"), 0)
    for number in range(REPEATS_TABLE_MAX):
        repeats.admits(line("shim.hung", reason=str(number)), 1)
    assert repeats.admits(line(reason="second"), 2) and repeats.owed(line(reason="second")) == 5
    assert repeats.owed(line(reason="second")) == 0


# --- levels -------------------------------------------------------------------------------------------------------------


def test_a_level_for_a_time_falls_back_by_itself() -> None:
    """To the one that was set for good, also when that is changed meanwhile."""
    sink, _, clock = a_sink()
    sink.set_level("debug", 60_000)
    assert (
        sink.wants("debug") and sink.state()["falls_back_in_ms"] == 60_000 and sink.state()["falls_back_to"] == "info"
    )
    clock.now += 59_999
    assert sink.wants("debug")
    clock.now += 1
    assert not sink.wants("debug") and sink.wants("info") and sink.level_now() == ("info", None)
    sink.set_level("debug", 60_000)
    sink.set_level("error", None)
    assert not sink.wants("warning") and sink.level_now() == ("error", None)


# --- outlets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [OSError("gone"), ValueError("I/O operation on closed file"), BrokenPipeError()])
def test_an_outlet_that_fails_ends_nothing(fault: Exception) -> None:
    """The line is in the window, and the next one that is told says how many were not."""
    sink, told, _ = a_sink()
    told.fault = fault
    sink.write(line(number=1))
    sink.write(line(number=2))
    told.fault = None
    sink.write(line(number=3))
    sink.write(line(number=4))
    assert told.lines == [line(number=3, dropped=2), line(number=4)]
    assert len(sink.excerpt(0).lines) == 4 and sink.state()["dropped"] == 2


def test_a_pipe_that_nobody_reads_is_not_waited_for() -> None:
    """Full: lines are dropped at once; read again: whole lines follow, and a torn one ends where it was torn."""
    reader, writer = os.pipe()
    with open(writer, "w") as stream, open(reader, "rb", buffering=0) as pipe:
        sink = Sink(StreamOutlet(stream, human=False))
        for number in range(100):
            sink.write(line("daemon.started", number=number, a="x" * 4000, b="x" * 4000, c="x" * 2000))
        assert sink.state()["dropped"] > 0
        before = pipe.read(1 << 20)
        sink.write(line("daemon.started", number=1000))
        after = pipe.read(1 << 20)
        # The last line is cut in the middle, so the next one begins with its end.
        assert not before.endswith(b"\n") and after.startswith(b"\n")
        assert json.loads(after)["number"] == 1000 and json.loads(after)["dropped"] == sink.state()["dropped"]
        whole = [json.loads(one)["number"] for one in before.splitlines() if one.endswith(b"}")]
        assert whole == list(range(len(whole))) and len(whole) > 3


def test_a_stream_without_a_descriptor_takes_lines_too() -> None:
    """As tests and embedders have them."""
    stream = StringIO()
    assert StreamOutlet(stream, human=True).tell("info", line(note="two words"), "")
    assert stream.getvalue() == 'warning session.lost note="two words"\n'


def test_the_journal_gets_fields_and_its_stream_what_it_cannot_take(tmp_path: Path) -> None:
    """While nobody hears at the socket, the line goes to stderr with its priority in front."""
    stream, journal = StringIO(), JournalSocket(tmp_path / "socket")
    sink = Sink(JournalOutlet(journal, StreamOutlet(stream, human=False)))
    sink.write(line(attempt="ex_1.1", gone=None))
    assert stream.getvalue() == '<4>{"event":"session.lost","level":"warning","attempt":"ex_1.1","gone":null}\n'
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.bind(str(tmp_path / "socket"))
        sink.write({**line("attempt.lost", attempt="ex_1.1", count=3, exception="a\nb"), "timestamp": "t"})
        entry = ear.recv(4096)
    journal.close()
    assert entry == (
        b"MESSAGE=attempt.lost attempt=ex_1.1 count=3\nPRIORITY=4\nSYSLOG_IDENTIFIER=runner\n"
        b"RUNNER_EVENT=attempt.lost\nRUNNER_ATTEMPT=ex_1.1\nRUNNER_COUNT=3\nRUNNER_EXCEPTION\n\x03\0\0\0\0\0\0\0a\nb\n"
    )


# --- the window ---------------------------------------------------------------------------------------------------------


def test_the_window_is_bounded_and_its_numbers_go_on() -> None:
    """Old lines leave it, by count and by size; a reader is told how many it missed."""
    sink = Sink(None)
    for number in range(KEPT_LINES_MAX + 10):
        sink.write(line("daemon.started", number=number))
    first = sink.excerpt(0)
    assert first.dropped == 10 and json.loads(first.lines[0])["number"] == 10
    assert len(first.lines) == EXCERPT_LINES_MAX and first.end == 10 + EXCERPT_LINES_MAX
    for _ in range(1000):
        sink.write(line("daemon.started", value="x" * 4000))
    assert sum(map(len, sink._kept)) == sink._kept_bytes <= KEPT_BYTES_MAX
    sink.write(line("daemon.started", values=["x" * 4000] * 1000))
    assert sink.excerpt(0).lines == () and sink.excerpt(0).dropped == sink.end == KEPT_LINES_MAX + 1011


def test_a_reader_gets_every_line_once() -> None:
    """In its own pieces, the newest few first if it wants; a number of the future gets nothing."""
    sink = Sink(None)
    for number in range(EXCERPT_LINES_MAX + 3):
        sink.write(line("daemon.started", number=number))
    read: list[int] = []
    end = 0
    while found := sink.excerpt(end).lines:
        read += [json.loads(text)["number"] for text in found]
        end += len(found)
    assert read == list(range(EXCERPT_LINES_MAX + 3))
    newest = sink.excerpt(0, last=2)
    assert [json.loads(text)["number"] for text in newest.lines] == read[-2:] and (newest.end, newest.dropped) == (
        end,
        0,
    )
    assert sink.excerpt(0, last=0).lines == () and sink.excerpt(10**6).lines == () and sink.excerpt(10**6).end == end


def test_threads_write_whole_lines() -> None:
    """Each line of each thread is there once."""
    sink, told, _ = a_sink()

    def write(name: int) -> None:
        for number in range(200):
            sink.write(line("daemon.started", thread=name, number=number))

    threads = [threading.Thread(target=write, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted((one["thread"], one["number"]) for one in told.lines) == [
        (t, n) for t in range(4) for n in range(200)
    ]


def test_what_listens_hears_of_lines_until_it_leaves() -> None:
    """After each line that is told."""
    sink = Sink(None)
    heard: list[int] = []
    leave = sink.listen(lambda: heard.append(sink.end))
    sink.write(line())
    leave()
    sink.write(line())
    assert heard == [1]


def test_stderr_is_not_made_to_wait_where_it_is_closed() -> None:
    """A daemon whose stderr somebody closed goes on."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        sink = Sink(StreamOutlet(stream, human=False))
        sink.write(line())
    sink.write(line())
    assert sink.state()["dropped"] == 2 and sys.stderr is not None
