"""Credit between the two that keep it: the runner's uplink and the plane's channels, with several logs on one connection.

The wire between them holds what the test lets it hold, and may be cut. What must hold is stated from the test's own record of what was
granted and what was written: no frame is beyond a grant that its sender has heard, no grant beyond what came and a window; a log whose
grants do not come keeps no other from its end; once everything flows, every log is complete and exact, whatever happened before.

Hand mutants, each tried, and each red: `Uplink._read` does not look at the channel's credit, or not at the connection's; `Uplink.heard`
forgets to schedule after an ack; `Channels._take` grants nothing more, or a window too much; a channel that is blocked keeps its turn; a
log that ended is forgotten before its end is acked.
"""

import asyncio
import tempfile
from collections import deque
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from controlplane import channels as plane_side
from controlplane.channels import Channels
from controlplane.logstore import Log, LogStore
from controlplane.rows import LogRow
from protocol.frames import decode_data
from protocol.limits import CHANNEL_WINDOW_BYTES_MAX, DATA_SLICE_BYTES_MAX
from protocol.messages import Ack, Blocked, Credit, Gap, LogClosed, LogOpen, Resume, Watch
from runner.adapters import uplink as runner_side
from runner.adapters.uplink import Uplink, UplinkMessage
from tests.support.spool import Spool

LOGS: Final = 3
CONNECTION_BYTES: Final = 9 * DATA_SLICE_BYTES_MAX
"""In the place of CONNECTION_WINDOW_BYTES: more than two channels' windows and less than all, so that the edges of both are met."""
ROUNDS_MAX: Final = 600
"""Exchanges in which all that may flow has flowed."""
WHICH = st.integers(0, LOGS - 1)
FEW = st.integers(1, 12)
SIZES = st.sampled_from([60_000, 700, 1, 0, 30_000, 60_000])
FromPlane = Resume | Ack | Credit | Watch


class Credits(RuleBasedStateMachine):
    """Both ends, a wire, and what was granted on it."""

    def __init__(self) -> None:
        super().__init__()
        self._place = tempfile.TemporaryDirectory()
        self._loop = asyncio.Runner()
        self._before = runner_side.CONNECTION_WINDOW_BYTES, plane_side.CONNECTION_WINDOW_BYTES
        runner_side.CONNECTION_WINDOW_BYTES = plane_side.CONNECTION_WINDOW_BYTES = CONNECTION_BYTES  # type: ignore[misc]
        place = Path(self._place.name)
        self.rows: dict[str, LogRow] = {}
        self.store = LogStore(place / "plane", self.rows.get, self._save)
        self.uplink = Uplink(wake=lambda: None, arm=self._arm, trim=lambda *_: None, failed=self._failed)
        self.names = [f"ex_{n}.1" for n in range(LOGS)]
        self.spools = [Spool(place / name / "log") for name in self.names]
        self.armed: set[str] = set()
        self.ended: set[int] = set()
        self.held: int | None = None
        """The log whose words from the plane do not come through."""
        self.up: deque[UplinkMessage | bytes] = deque()
        self.down: deque[FromPlane] = deque()
        self.kept_back: deque[FromPlane] = deque()
        self.channels: Channels | None = None
        self.granted: dict[int, int] = {}
        """By channel, as the runner has heard in this session."""
        self.granted_all = self.sent_all = self.received_all = 0
        self.of: dict[int, int] = {}
        """Which log has a channel's number."""

    async def _save(self, row: LogRow) -> None:
        self.rows[row.attempt] = row

    def _arm(self, name: str, _end: int) -> None:
        self.armed.add(name)

    def _failed(self, name: str, detail: str) -> None:
        raise AssertionError(f"the log of {name} is whole: {detail}")

    @initialize()
    def begin(self) -> None:
        """All logs are known, and there is a session."""
        for name in self.names:
            self.uplink.track(name, Path(self._place.name) / name)
        self.connect()

    # --- what may happen ------------------------------------------------------------------------------------------

    @rule(which=WHICH, size=SIZES, count=FEW)
    def write(self, which: int, size: int, count: int) -> None:
        """Some records."""
        if which not in self.ended:
            for _ in range(count):
                self.spools[which].write(bytes([size % 251]) * size)
            self._ring(which)

    @rule(which=WHICH, wordless=st.booleans())
    def end(self, which: int, wordless: bool = False) -> None:
        """The attempt is over, maybe long after its last record."""
        if which not in self.ended:
            if not (wordless and self.spools[which].bases):
                self.spools[which].write(b"its end")
            self.ended.add(which)
            self.uplink.finish(self.names[which])

    @rule(which=WHICH, hole=st.sampled_from([1, 100_000]))
    def drop(self, which: int, hole: int) -> None:
        """Something that was never kept: it needs no credit."""
        if which not in self.ended and self.spools[which].bases:
            self.spools[which].roll(hole)
            self._ring(which)

    def _ring(self, which: int) -> None:
        if self.names[which] in self.armed:
            self.armed.discard(self.names[which])
            self.uplink.grew(self.names[which], self.spools[which].end)

    @rule(count=FEW)
    def send(self, count: int) -> None:
        """The runner's writer: messages first, and so many frames."""
        self._say_up()
        for _ in range(count):
            frame = self.uplink.next_frame()
            if frame is None:
                break
            data = decode_data(frame)
            size = len(data.data)
            assert data.offset + size <= self.granted.get(data.channel, -1), "beyond the credit of its channel"
            self.sent_all += size
            assert self.sent_all <= self.granted_all, "beyond the credit of the connection"
            self.up.append(frame)
        self._say_up()

    def _say_up(self) -> None:
        self.up.extend(self.uplink.messages())

    @rule(count=FEW)
    def arrive(self, count: int) -> None:
        """At the plane; it must find nothing to complain of."""
        assert self.channels is not None
        for _ in range(min(count, len(self.up))):
            message = self.up.popleft()
            match message:
                case bytes():
                    self.received_all += len(decode_data(message).data)
                    self.channels.data(message)
                case LogOpen():
                    self.of[message.channel] = self.names.index(message.attempt)
                    self.granted.pop(message.channel, None)
                    self.channels.open(message)
                case Gap():
                    self.channels.gap(message)
                case LogClosed():
                    self.channels.closed(message)
                case Blocked():
                    self.channels.blocked(message)
        assert all(
            said.total <= self.received_all + CONNECTION_BYTES
            if isinstance(said, Credit)
            else said.credit <= self._at_plane(self.of[said.channel]) + CHANNEL_WINDOW_BYTES_MAX
            for said in self.down
            if not isinstance(said, Watch)
        ), "more was granted than has room"

    @rule(count=FEW)
    def answer(self, count: int) -> None:
        """At the runner; what is about the held log waits."""
        for _ in range(min(count, len(self.down))):
            said = self.down.popleft()
            if not isinstance(said, Credit) and self.held is not None and self.of[said.channel] == self.held:
                self.kept_back.append(said)
            else:
                self._hear(said)

    def _hear(self, said: FromPlane) -> None:
        if isinstance(said, Credit):
            self.granted_all = max(self.granted_all, said.total)
        elif not isinstance(said, Watch):
            self.granted[said.channel] = max(self.granted.get(said.channel, 0), said.credit)
        self.uplink.heard(said)

    @rule(which=WHICH)
    def sync(self, which: int) -> None:
        """One log becomes durable as far as it came."""
        log = self._log(which)
        if log.unsynced():
            self._loop.run(log.sync(self._save))
        self.store.give_back(log)

    @rule(which=WHICH)
    def twice(self, which: int) -> None:
        """The last word about a log comes again: it grants nothing new."""
        for said in reversed(self.down):
            if isinstance(said, Ack) and self.of[said.channel] == which:
                self.down.append(said)
                break

    @rule(which=WHICH, on=st.booleans())
    def follow(self, which: int, on: bool) -> None:
        """A reader comes or goes."""
        log = self._log(which)
        if log.followed != on:
            log.follow(1 if on else -1)
        self.store.give_back(log)

    @rule(which=WHICH)
    @precondition(lambda self: self.held is None)
    def hold(self, which: int) -> None:
        """Nothing that is said about a log comes through any more."""
        self.held = which

    @rule()
    @precondition(lambda self: self.held is not None)
    def let_go(self) -> None:
        """What was held comes, in its order."""
        self.held = None
        while self.kept_back:
            self._hear(self.kept_back.popleft())

    @rule()
    def connect(self) -> None:
        """All that is under way is lost, and both begin anew."""
        if self.channels is not None:
            self.uplink.disconnected()
            self.channels.release()
        self.up.clear()
        self.down.clear()
        self.kept_back.clear()
        self.granted.clear()
        self.granted_all, self.sent_all, self.received_all = CONNECTION_BYTES, 0, 0
        self.channels = Channels("rn", self.store, lambda _: "rn", self.down.append)
        self.uplink.connected()

    @rule()
    @precondition(lambda self: self.held is not None)
    def others_go_on(self) -> None:
        """While one log gets no grant, each of the others comes to where it was written to."""
        others = [which for which in range(LOGS) if which != self.held]
        self._flow(lambda: all(self._at_plane(which) == self.spools[which].end for which in others))

    @rule()
    @precondition(lambda self: self.held is None)
    def rest(self) -> None:
        """All that was written is durable, and the runner knows."""
        self._flow(lambda: all(self.uplink.acked(name) in (None, spool.end) for name, spool in self._each()))

    # --- what must hold -------------------------------------------------------------------------------------------

    @invariant()
    def nothing_is_held_beyond_the_window(self) -> None:
        """What is under way is less than was granted for all: a plane that stalls has to hold no more."""
        assert sum(len(each) for each in self.up if isinstance(each, bytes)) <= CONNECTION_BYTES + 16 * len(self.up)

    def _each(self) -> list[tuple[str, Spool]]:
        return list(zip(self.names, self.spools, strict=True))

    def _log(self, which: int) -> Log:
        return self.store.acquire(self.names[which], "rn")

    def _at_plane(self, which: int) -> int:
        log = self._log(which)
        self.store.give_back(log)
        return log.end

    def _flow(self, holds: Any) -> None:
        """Everything moves until something is so; a deadlock is an AssertionError."""
        for _ in range(ROUNDS_MAX):
            if holds():
                return
            self.send(8)
            self.arrive(len(self.up))
            for which in range(LOGS):
                self.sync(which)
            self.answer(len(self.down))
        raise AssertionError("nothing moves any more, and there is more to send")

    def teardown(self) -> None:
        """The world heals: every log ends, is complete, and is what was written."""
        try:
            if self.channels is not None:
                self.let_go()
                for which in range(LOGS):
                    self.end(which)
                self._flow(lambda: all(self.uplink.acked(name) is None for name in self.names))
                for name, spool in self._each():
                    row = self.rows[name]
                    assert (row.end, row.complete) == (spool.end, True), name
                    stored = (Path(self._place.name) / "plane" / f"{name}.log").read_bytes()
                    assert all(stored[at : at + len(record)] == record for at, record in spool.kept.items()), name
        finally:
            runner_side.CONNECTION_WINDOW_BYTES, plane_side.CONNECTION_WINDOW_BYTES = self._before  # type: ignore[misc]
            self.uplink.close()
            self._loop.close()
            self._place.cleanup()


TestCredits = pytest.mark.slow(Credits.TestCase)
TestCredits.settings = settings(max_examples=80, stateful_step_count=40)


def test_a_log_is_not_forgotten_before_its_end_is_acked(tmp_path: Path) -> None:
    """1. All of it is durable at the plane. 2. Its attempt ends. 3. `closed` is lost with the connection. 4. It is said again."""
    spool = Spool(tmp_path / "log")
    spool.write(b"all of it")
    uplink = Uplink(wake=lambda: None, arm=lambda *_: None, trim=lambda *_: None, failed=lambda *_: None)
    uplink.track("ex_1.1", tmp_path)
    uplink.connected()
    assert list(uplink.messages()) == [LogOpen(channel=0, attempt="ex_1.1", first=0)]
    uplink.heard(Resume(channel=0, offset=0, credit=CHANNEL_WINDOW_BYTES_MAX))
    assert uplink.next_frame() is not None and uplink.next_frame() is None
    uplink.heard(Ack(channel=0, offset=spool.end, credit=CHANNEL_WINDOW_BYTES_MAX))
    uplink.finish("ex_1.1", spool.end)
    for _ in range(2):
        assert uplink.next_frame() is None
        assert list(uplink.messages()) == [LogClosed(channel=0, end=spool.end)]
        uplink.connected()
        assert list(uplink.messages()) == [LogOpen(channel=0, attempt="ex_1.1", first=0)]
        uplink.heard(Resume(channel=0, offset=spool.end, credit=CHANNEL_WINDOW_BYTES_MAX))
    assert uplink.next_frame() is None and len(list(uplink.messages())) == 1
    uplink.heard(Ack(channel=0, offset=spool.end, credit=CHANNEL_WINDOW_BYTES_MAX))
    assert uplink.acked("ex_1.1") is None
    uplink.close()
