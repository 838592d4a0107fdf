"""Whose turn it is on the way up: what is followed, then the rest, fairly; short frames on a slow line; nothing beyond any credit."""

from collections import Counter
from pathlib import Path

import pytest

from protocol.frames import decode_data
from protocol.limits import (
    CHANNEL_WINDOW_BYTES,
    CONNECTION_WINDOW_BYTES,
    DATA_SLICE_BYTES_MAX,
    PIECE_BYTES_MIN,
)
from protocol.messages import Ack, Blocked, Credit, Gap, LogClosed, LogOpen, Resume, Watch
from runner.adapters.uplink import Uplink, UplinkMessage
from tests.support.spool import Spool

RECORD = 60_000
PLENTY = 1 << 40


class Line:
    """An uplink with a session, and logs of so many records each."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.uplink = Uplink(wake=lambda: None, arm=lambda *_: None, trim=lambda *_: None, failed=self._failed)
        self.uplink.connected()
        self.opened = 0
        self.said: list[UplinkMessage] = []

    def _failed(self, name: str, detail: str) -> None:
        raise AssertionError(f"{name}: {detail}")

    def log(self, count: int, size: int = RECORD, credit: int = PLENTY, *, pty: bool = False) -> int:
        """A log with this much in it; its channel."""
        directory = self.directory / f"ex_{self.opened}.1"
        spool = Spool(directory / "log")
        for _ in range(count):
            spool.write(bytes(size))
        self.uplink.track(directory.name, directory, interactive=pty)
        opened = [message for message in self.uplink.messages() if isinstance(message, LogOpen)]
        self.opened += 1
        self.uplink.heard(Resume(channel=opened[0].channel, offset=0, credit=credit))
        return opened[0].channel

    def frames(self, count: int = 1_000_000) -> list[tuple[int, int]]:
        """The next frames: channel and bytes."""
        sent: list[tuple[int, int]] = []
        while len(sent) < count:
            frame = self.uplink.next_frame()
            if frame is not None:
                data = decode_data(frame)
                sent.append((data.channel, len(data.data)))
            elif said := list(self.uplink.messages()):
                self.said += said
            else:
                break
        return sent


@pytest.fixture
def line(tmp_path: Path) -> Line:
    """A session without logs."""
    return Line(tmp_path)


def test_what_is_followed_goes_before_all_that_is_not(line: Line) -> None:
    """From the next frame on, until nobody follows it any more."""
    rest, followed = line.log(20), line.log(20)
    assert {channel for channel, _ in line.frames(4)} == {rest, followed}
    line.uplink.heard(Watch(channel=followed, on=True))
    assert {channel for channel, _ in line.frames(8)} == {followed}
    line.uplink.heard(Watch(channel=followed, on=False))
    assert {channel for channel, _ in line.frames(6)} == {rest, followed}


def test_a_pty_that_is_looked_at_goes_before_everything(line: Line) -> None:
    """Before what is followed, too; while nobody looks at it, it is as any other log. Two of them share."""
    rest, followed, looked_at, unseen = line.log(20), line.log(20), line.log(4, pty=True), line.log(20, pty=True)
    line.uplink.heard(Watch(channel=followed, on=True))
    assert {channel for channel, _ in line.frames(4)} == {followed}
    line.uplink.heard(Watch(channel=looked_at, on=True))
    assert {channel for channel, _ in line.frames(4)} == {looked_at}
    assert {channel for channel, _ in line.frames(16)} == {followed}, "when it has nothing to say the others go on"
    assert {channel for channel, _ in line.frames(8)} == {rest, unseen}
    line.uplink.heard(Watch(channel=unseen, on=True))
    line.uplink.heard(Watch(channel=rest, on=True))
    assert {channel for channel, _ in line.frames(4)} == {unseen}
    line.uplink.heard(Watch(channel=unseen, on=False))
    assert {channel for channel, _ in line.frames(4)} == {rest}


def test_logs_of_one_class_share_the_line_by_bytes(line: Line) -> None:
    """Large records have no more of it than small ones."""
    large, small = line.log(40, 60_000), line.log(4_000, 600)
    sent: Counter[int] = Counter()
    for channel, size in line.frames(60):
        sent[channel] += size
    assert sent[large] == pytest.approx(sent[small], rel=0.2)


def test_frames_are_short_on_a_slow_line_and_long_on_a_quick_one(line: Line) -> None:
    """A record that is longer goes in pieces, which arrive as one."""
    line.log(40)
    for _ in range(20):
        line.uplink.paced(10_000, 0.1)
    assert {size for _, size in line.frames(3)} == {PIECE_BYTES_MIN}
    for _ in range(60):
        line.uplink.paced(60_000, 0.0001)
    assert max(size for _, size in line.frames(3)) > PIECE_BYTES_MIN


def test_nothing_is_sent_beyond_the_credit_of_its_channel(line: Line) -> None:
    """To the last byte of it; then the plane is told once, and what it grants is used."""
    channel = line.log(10, credit=CHANNEL_WINDOW_BYTES)
    assert sum(size for _, size in line.frames()) == CHANNEL_WINDOW_BYTES
    assert line.said == [Blocked(channel=channel, credit=CHANNEL_WINDOW_BYTES)]
    assert line.frames() == [] and len(line.said) == 1
    line.uplink.heard(Ack(channel=channel, offset=0, credit=CHANNEL_WINDOW_BYTES + 1000))
    assert line.frames() == [(channel, 1000)]


def test_what_the_disk_did_not_take_at_the_end_is_a_gap(line: Line) -> None:
    """Up to where the shim says that it ended: or somebody would wait for it."""
    channel = line.log(1, size=100)
    line.uplink.finish("ex_0.1", end=5000)
    (_, sent) = line.frames()[0]
    assert line.said == [Gap(channel=channel, start=sent, end=5000), LogClosed(channel=channel, end=5000)]


def test_nothing_is_sent_beyond_the_credit_of_the_connection(line: Line) -> None:
    """All logs together; a stalled one stalls no other behind it, and a new session begins anew."""
    blocked = line.log(2, credit=100)
    for _ in range(3):
        line.log(60)
    sent = line.frames()
    assert sum(size for _, size in sent) == CONNECTION_WINDOW_BYTES
    assert sum(size for channel, size in sent if channel == blocked) == 100
    line.uplink.heard(Credit(total=CONNECTION_WINDOW_BYTES + DATA_SLICE_BYTES_MAX))
    assert sum(size for _, size in line.frames()) == DATA_SLICE_BYTES_MAX
    line.uplink.disconnected()
    line.uplink.connected()
    assert line.frames() == []
