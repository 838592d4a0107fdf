"""A log on its way up, against a plane that follows the protocol's page: every byte once and in order, or in a gap that is true.

Between the two is a connection that may end at any moment with all that is under way. What must hold is stated from the files.

Hand mutants, each tried, and each red:
1. `Uplink.connected` keeps the old cursor.
2. `Uplink.heard` takes an ack for a cursor.
3. `Uplink._read` does not look at the credit.
4. `Uplink._read` does not go past a hole.
5. `Uplink._at_end` says closed although the attempt goes on.
6. `Uplink.heard` forgets to schedule after a `resume`.
7. `Uplink._done` as soon as it is closed, acked or not.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from protocol.errors import RemoteError
from protocol.frames import decode_data
from protocol.limits import DATA_SLICE_BYTES_MAX
from protocol.messages import Ack, Blocked, Gap, LogClosed, LogOpen, Resume
from runner.adapters.uplink import Uplink, UplinkMessage, read_ack
from tests.support.spool import Spool

pytestmark = pytest.mark.slow

NAME = "ex_1.1"
WINDOW = 2 * DATA_SLICE_BYTES_MAX - 12_345
"""A small one, which no number of records fills: the edge of the credit is met often, inside a record."""
ROUNDS_MAX = 400
"""Turns in which everything there is must have come."""


@dataclass
class Plane:
    """The receiver's side: what is durable, and what it says."""

    end: int = 0
    whole: int = 0
    """Where the last record ends that is all there: nothing behind it is durable."""
    credit: int = 0
    complete: bool = False
    jumped: bool = False
    received: dict[int, bytes] = field(default_factory=dict)
    gaps: list[tuple[int, int]] = field(default_factory=list)
    said: list[Resume | Ack] = field(default_factory=list)

    def hear(self, message: UplinkMessage | bytes) -> None:
        """A message or a data frame."""
        match message:
            case bytes():
                self._data(message)
            case LogOpen():
                self.credit, self.jumped = 0, False
                self._resume(message.channel)
            case Gap():
                if message.start > self.end:
                    self._resume(message.channel)
                elif message.end > self.end:
                    self._forget(self.whole)
                    self.gaps.append((self.whole, message.end))
                    self.end = self.whole = message.end
                    self._ack(message.channel)
            case Blocked():
                self.credit = max(self.credit, self.end + 2 * WINDOW)
                self._ack(message.channel)
            case LogClosed():
                self.complete = message.end == self.end
                self._ack(message.channel)

    def _data(self, frame: bytes) -> None:
        data = decode_data(frame)
        if data.offset > self.end:
            if not self.jumped:
                self.jumped = True
                self._resume(data.channel)
        elif data.offset + len(data.data) > self.end:
            assert data.offset in (self.end, self.whole) or self.whole < data.offset < self.end, (
                "where a slice may begin"
            )
            self.jumped = False
            fresh = bytes(data.data)[self.end - data.offset :]
            self.received[self.end] = fresh
            self.end += len(fresh)
            if not data.goes_on:
                self.whole = self.end
            self._ack(data.channel)

    def _forget(self, boundary: int) -> None:
        self.received = {at: data[: boundary - at] for at, data in self.received.items() if at < boundary}

    def go_back(self, boundary: int) -> None:
        """It comes back from a backup: what came behind `boundary` is forgotten."""
        if boundary >= self.end:
            return
        self._forget(boundary)
        self.gaps = [(start, min(end, boundary)) for start, end in self.gaps if start < boundary]
        self.end = self.whole = boundary
        self.complete = False

    def _resume(self, channel: int) -> None:
        self.credit = max(self.credit, self.end + WINDOW)
        self.said.append(Resume(channel=channel, offset=self.whole, credit=self.credit))

    def _ack(self, channel: int) -> None:
        self.credit = max(self.credit, self.end + WINDOW)
        self.said.append(Ack(channel=channel, offset=self.whole, credit=self.credit))


class Road:
    """Both ends, the files, and what is under way between."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.spool = Spool(directory / "log")
        self.plane = Plane()
        self.armed = False
        self.up: list[UplinkMessage | bytes] = []
        self.told: list[Resume | Ack] = []
        self.uplink = Uplink(wake=lambda: None, arm=self._arm, trim=self._trim, failed=self._failed)
        self.connected = False
        self.granted = 0
        """Credit that was heard in this session; none without one."""
        self.uplink.track(NAME, directory)

    def _arm(self, name: str, _end: int) -> None:
        assert name == NAME
        self.armed = True

    def _trim(self, name: str, end: int) -> None:
        assert name == NAME
        assert end == self.uplink.acked(NAME), "what the plane has on its disk is safe, and nothing else"

    def _failed(self, name: str, detail: str) -> None:
        raise AssertionError(f"the log of {name} is whole: {detail}")

    def ring(self) -> None:
        """The shim's bell: once, when it was asked for."""
        if self.armed:
            self.armed = False
            self.uplink.grew(NAME, self.spool.end)

    # --- what may happen ----------------------------------------------------------------------------------------

    def write(self, size: int) -> None:
        """A record of output."""
        self.spool.write(bytes([size % 251]) * size)
        self.ring()

    def roll(self, hole: int) -> None:
        """A new segment, maybe behind a hole."""
        self.spool.roll(hole)
        self.ring()

    def drop(self, at: int) -> None:
        """A segment is deleted."""
        if self.spool.bases:
            self.spool.drop(at)

    def connect(self, _: int) -> None:
        """A new session, after the old one."""
        self.disconnect(0)
        self.connected = True
        self.uplink.connected()

    def disconnect(self, _: int) -> None:
        """All that is under way is lost, in both directions."""
        if self.connected:
            self.connected = False
            self.uplink.disconnected()
        self.granted = 0
        self.up.clear()
        self.told.clear()
        self.plane.said.clear()

    def send(self, count: int) -> None:
        """The writer's turn."""
        for _ in range(count % 8 + 1):
            self.up += self.uplink.messages()
            frame = self.uplink.next_frame()
            if frame is not None:
                data = decode_data(frame)
                assert data.offset + len(data.data) <= self.granted, "beyond the credit, or before the plane said where"
                self.up.append(frame)

    def deliver(self, count: int) -> None:
        """In order, as a connection does."""
        for _ in range(min(count % 8 + 1, len(self.up))):
            self.plane.hear(self.up.pop(0))

    def answer(self, count: int) -> None:
        """What the plane said comes back."""
        for _ in range(min(count % 8 + 1, len(self.plane.said))):
            self.told.append(self.plane.said.pop(0))
            self.granted = max(self.granted, self.told[-1].credit)
            self.uplink.heard(self.told[-1])

    def lose_an_ack(self, _: int) -> None:
        """A later one says more."""
        if len(self.plane.said) > 1 and isinstance(self.plane.said[0], Ack):
            self.plane.said.pop(0)

    def double_an_ack(self, _: int) -> None:
        """It says nothing new."""
        if self.connected and self.told and isinstance(self.told[-1], Ack):
            self.uplink.heard(self.told[-1])

    def go_back(self, at: int) -> None:
        """The plane comes back from a backup; that takes a new session."""
        self.disconnect(0)
        boundaries = self.spool.boundaries()
        self.plane.go_back(boundaries[at % len(boundaries)])

    # --- the end ------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """The attempt ends, the connection holds: everything comes, and then it is quiet."""
        self.write(5)
        self.uplink.finish(NAME)
        self.connect(0)
        for _ in range(ROUNDS_MAX):
            self.send(7)
            self.deliver(7)
            self.answer(7)
            if self.uplink.acked(NAME) is None:
                break
        plane, spool = self.plane, self.spool
        assert plane.complete and plane.end == spool.end, "the whole log"
        assert self.uplink.acked(NAME) is None and read_ack(self.directory) == spool.end
        held = sorted([*plane.gaps, *((at, at + len(data)) for at, data in plane.received.items() if data)])
        assert [start for start, _ in held] == [0, *(end for _, end in held[:-1])], "each byte once, or in a gap"
        log = b"".join(plane.received[start] if start in plane.received else bytes(end - start) for start, end in held)
        for at, record in spool.kept.items():
            covered = any(start <= at < end for start, end in plane.gaps)
            assert (covered and not spool.on_disk(at)) or log[at : at + len(record)] == record, "as it was written"


STEPS: dict[str, Callable[[Road, int], None]] = {
    "write": Road.write,
    "roll": Road.roll,
    "drop": Road.drop,
    "connect": Road.connect,
    "disconnect": Road.disconnect,
    "send": Road.send,
    "deliver": Road.deliver,
    "answer": Road.answer,
    "lose_an_ack": Road.lose_an_ack,
    "double_an_ack": Road.double_an_ack,
    "go_back": Road.go_back,
}
WHOLE = ["connect", "send", "deliver", "answer", "send", "deliver", "answer"]
SIZES = st.sampled_from([0, 1, 7, 40, 60_000])
STEP = st.tuples(st.sampled_from([*STEPS, "send", "deliver", "answer", "write", "write"]), SIZES)


@settings(max_examples=200)
@given(st.lists(STEP | st.just(("whole", 0)), max_size=40))
@example([("write", 40), ("roll", 40), ("whole", 0), ("go_back", 1), ("drop", 0)])
@example([("write", 60_000)] * 5 + [("whole", 0), ("disconnect", 0), ("write", 7), ("whole", 0)])
def test_whatever_happens_the_log_arrives_once_and_in_order(steps: list[tuple[str, int]]) -> None:
    """Growth, rolls, holes, deletions, credit, acks that are lost and doubled, reconnects and a plane from a backup."""
    with tempfile.TemporaryDirectory() as name:
        road = Road(Path(name))
        try:
            for step, size in steps:
                if step == "whole":
                    for part in WHOLE:
                        STEPS[part](road, 7)
                else:
                    STEPS[step](road, size)
            road.finish()
        finally:
            road.uplink.close()


def opened(directory: Path) -> Road:
    """A log of one record whose first credit is granted, and nothing sent yet."""
    road = Road(directory)
    road.write(10)
    road.connect(0)
    road.up += road.uplink.messages()
    road.deliver(7)
    return road


def test_an_ack_for_what_was_never_sent_ends_the_connection(tmp_path: Path) -> None:
    """A plane that claims what it cannot have is not believed."""
    road = opened(tmp_path)
    road.answer(7)
    with pytest.raises(RemoteError):
        road.uplink.heard(Ack(channel=0, offset=10**9, credit=10**9))
    road.uplink.close()


def test_an_ack_that_comes_before_the_resume_says_nothing(tmp_path: Path) -> None:
    """It may be about the log that had this number before."""
    road = opened(tmp_path)
    road.uplink.heard(Ack(channel=0, offset=10**9, credit=10**9))
    assert road.uplink.acked(NAME) == 0 and road.uplink.next_frame() is None
    road.finish()
    road.uplink.close()


def test_what_a_resume_names_is_there_and_not_yet_safe(tmp_path: Path) -> None:
    """Its plane may still lose it with its machine: the runner keeps it until an ack."""
    road = opened(tmp_path)
    road.uplink.heard(Resume(channel=0, offset=road.spool.end, credit=10**9))
    assert road.uplink.acked(NAME) == 0
    road.uplink.heard(Ack(channel=0, offset=road.spool.end, credit=10**9))
    assert road.uplink.acked(NAME) == road.spool.end
    road.uplink.close()
