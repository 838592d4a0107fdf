"""Frames as long as the line bears: what one frame tells of it, and how much a heartbeat has ahead of it on a slow one, in bytes.

Hand mutants, each tried, and each red: no rest is noticed; the mean is over one frame; `WRITE_BYTES` of 64 KiB; no TCP_NOTSENT_LOWAT;
the writer does not stop for what is due between two frames.
"""

import asyncio
import fcntl
import itertools
import socket
import struct
from pathlib import Path

import pytest

from protocol.limits import DATA_HEADER_BYTES, DATA_SLICE_BYTES_MAX, PIECE_BYTES_MIN
from protocol.messages import Beat
from runner.adapters.pace import BUFFERED_BYTES, PACE_BYTES, PIECE_S, Pace
from runner.adapters.websocket import NOTSENT_LOWAT_BYTES, TCP_NOTSENT_LOWAT, PlaneConnection
from runner.core.effects import SendBeat
from tests.support.proxy import Proxy, Way
from tests.support.spool import Spool
from tests.unit.runner.test_link import Dialled, a_plane, linked

LONG = DATA_SLICE_BYTES_MAX
QUICK_S = 0.0001
"""A frame that the buffers take."""
SLOW_BYTES_PER_S = 400_000
BEATS = 12
SIOCOUTQNSD = 0x894B
"""Of Linux: what a TCP socket has not sent yet."""
SKB_BYTES = 64 * 1024
"""The kernel asks whether there is room before each buffer of its own, so it may take one more than the mark."""
WEBSOCKET_HEADER_BYTES = 14


class Line:
    """A line of so many bytes a second behind buffers, on a clock of the test's."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self.pace = Pace()
        self.now_s = 1000.0
        self._buffered = 0.0

    def send(self, size: int) -> None:
        """It waits until the buffers hold it."""
        over = max(0.0, self._buffered + size - BUFFERED_BYTES)
        took_s = QUICK_S + over / self.bytes_per_s
        self._buffered = max(0.0, self._buffered + size - took_s * self.bytes_per_s)
        self.now_s += took_s
        self.pace.left(size, took_s, self.now_s)

    def flood(self, size: int) -> None:
        """So many bytes in frames as long as they may be."""
        while size > 0:
            piece = min(size, self.pace.piece)
            self.send(piece)
            size -= piece

    def rest(self, seconds: float) -> None:
        """Nothing is sent, and the buffers drain."""
        self.now_s += seconds
        self._buffered = max(0.0, self._buffered - seconds * self.bytes_per_s)


def test_a_line_that_is_not_known_yet_gets_long_frames() -> None:
    """Most are quick, and the first wait tells."""
    assert Pace().piece == LONG


@pytest.mark.parametrize("bytes_per_s", [20_000, 200_000, 1_000_000])
def test_frames_are_shortest_on_a_slow_line(bytes_per_s: int) -> None:
    """However many of them leave at once, because a buffer had room for them."""
    line = Line(bytes_per_s)
    line.flood(4 * BUFFERED_BYTES)
    assert line.pace.piece == PIECE_BYTES_MIN


@pytest.mark.parametrize("bytes_per_s", [2_500_000, 4_000_000, 5_500_000])
def test_a_frame_takes_as_long_as_it_should_on_a_line_between(bytes_per_s: int) -> None:
    """Its length is what such a line passes on in PIECE_S."""
    line = Line(bytes_per_s)
    line.flood(64 * BUFFERED_BYTES)
    assert line.pace.piece == pytest.approx(bytes_per_s * PIECE_S, rel=0.1)


def test_every_second_frame_that_waits_tells_of_both() -> None:
    """A hundred times at once and then long, in turn: the pace is all bytes in all time, where a mean of rates sees a quick line."""
    pace, now_s = Pace(), 0.0
    for took_s in [QUICK_S, 0.5] * 50:
        now_s += took_s
        pace.left(LONG, took_s, now_s)
    assert pace.piece == PIECE_BYTES_MIN


def test_frames_grow_again_on_a_line_that_became_quick() -> None:
    """Within what the mean is over, a few times."""
    line = Line(50_000)
    line.flood(4 * BUFFERED_BYTES)
    line.bytes_per_s = 100e6
    line.rest(3)
    line.flood(BUFFERED_BYTES + 12 * PACE_BYTES)
    assert line.pace.piece == LONG


def test_bursts_that_only_fill_buffers_do_not_hide_a_slow_line() -> None:
    """A megabyte in small pieces with rests between them, none of which waited: the next flood still begins short."""
    line = Line(100_000)
    line.flood(4 * BUFFERED_BYTES)
    for _ in range(32):
        line.rest(1)
        line.flood(32 * 1024)
    assert line.pace.piece == PIECE_BYTES_MIN


def test_a_flood_behind_such_bursts_is_seen_at_its_first_wait() -> None:
    """Also where nothing was known of the line."""
    line = Line(100_000)
    for _ in range(32):
        line.rest(1)
        line.flood(32 * 1024)
    line.flood(BUFFERED_BYTES + LONG)
    assert line.pace.piece == PIECE_BYTES_MIN


def test_a_pause_of_the_scheduler_is_no_slow_line() -> None:
    """One frame that took 20 ms among quick ones."""
    line = Line(400e6)
    line.flood(4 * PACE_BYTES)
    line.now_s += 0.02
    line.pace.left(LONG, 0.02, line.now_s)
    assert line.pace.piece == LONG


# --- a real connection ----------------------------------------------------------------------------------------------


def transport_of(dialled: Dialled) -> asyncio.WriteTransport:
    """What the link writes to."""
    connection = dialled.link._connection
    assert connection is not None, "there is a session"
    return connection._connection.transport


def socket_of(dialled: Dialled) -> socket.socket:
    """The runner's end of the connection."""
    found: socket.socket = transport_of(dialled).get_extra_info("socket")
    return found


def unsent(dialled: Dialled) -> int:
    """Bytes that the kernel has and has not sent."""
    (size,) = struct.unpack("i", fcntl.ioctl(socket_of(dialled).fileno(), SIOCOUTQNSD, bytes(4)))
    return int(size)


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Frames that the link began to send: bytes of data, 0 for a message."""
    frames: list[int] = []
    send = PlaneConnection.send

    async def noted(self: PlaneConnection, frame: str | bytes) -> None:
        frames.append(len(frame) if isinstance(frame, bytes) else 0)
        await send(self, frame)

    monkeypatch.setattr(PlaneConnection, "send", noted)
    return frames


@pytest.mark.slow
async def test_a_heartbeat_is_behind_one_frame_and_the_kernels_mark(tmp_path: Path, begun: list[int]) -> None:
    """On a slow line with megabytes to send: what is buffered or begun ahead of it is one short frame, and 64 KiB are unsent."""
    spool = Spool(tmp_path / "ex_1.1" / "log")
    for _ in range(120):
        spool.write(bytes(60_000))
    async with a_plane() as plane, Proxy(plane.port) as proxy, linked(plane, proxy.port) as dialled:
        await plane.online()
        assert socket_of(dialled).getsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT) == NOTSENT_LOWAT_BYTES
        proxy.trickle(SLOW_BYTES_PER_S, Way.UP)
        dialled.link._uplink._wake = dialled.link.wake
        dialled.link._uplink.track("ex_1.1", tmp_path / "ex_1.1")
        # Behind this much the buffers are full and the pace is known.
        await dialled.until(lambda: sum(begun) > 6 * LONG, "a flood")
        ahead, waiting = [], []
        for count in range(1, BEATS + 1):
            before, buffered = len(begun), transport_of(dialled).get_write_buffer_size()
            waiting.append(unsent(dialled))
            dialled.link.beat(SendBeat(hw=0, leases=(), attempts=()))
            await plane.until(lambda n=count: plane._count_of(Beat) == n, "a beat")  # type: ignore[misc]
            since = begun[before:]
            assert 0 in since
            ahead.append(buffered + sum(itertools.takewhile(bool, since)))
            assert max(since) <= PIECE_BYTES_MIN + DATA_HEADER_BYTES
    assert max(ahead) <= PIECE_BYTES_MIN + DATA_HEADER_BYTES + WEBSOCKET_HEADER_BYTES, ahead
    assert max(waiting) <= NOTSENT_LOWAT_BYTES + SKB_BYTES, waiting
    assert max(ahead) > 0, "a line that nothing waits for proves nothing"
