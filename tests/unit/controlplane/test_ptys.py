"""PTYs at the control plane: opened, looked at, typed into and closed, with a runner and viewers on real sockets."""

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest
from websockets.exceptions import ConnectionClosed

from controlplane.limits import PTY_SEEN_STEP_BYTES, PTY_SKIP_BYTES, PTY_UNSEEN_BYTES, TICKET_TTL_MS
from protocol.commands import Command, Kind, PtyAttach, PtyOpen, parse_args
from protocol.envelope import Verified
from protocol.errors import Reason
from protocol.keys import PrivateKey
from protocol.messages import Gap, LogClosed, Resized, Taken, Typed, Viewers
from protocol.receipt import Outcome, StreamDigest
from protocol.records import RecordKind
from protocol.terminals import check_resized, open_typed
from tests.support.control_plane import Running, running
from tests.support.fake_runner import FakeRunner, Line
from tests.support.log_bytes import LogBytes
from tests.support.viewers import Key, Seat, admit, seated

pytestmark = pytest.mark.slow
OPEN = {"runner": "laptop", "argv": ["bash"], "cwd": "/srv", "size": {"rows": 30, "cols": 100}}


class Log(LogBytes):
    """A PTY's: each segment begins with size and modes."""

    size = (30, 100)
    modes = b'{"modes":{},"keypad":false}'

    def roll(self) -> None:
        """Begin the next segment."""
        super().roll()
        self._add(RecordKind.RESIZE, struct.pack("<HH", *self.size))
        self._add(RecordKind.MARKER, self.modes)

    def streams(self) -> dict[str, StreamDigest]:
        """A terminal has one."""
        return {name: digest for name, digest in super().streams().items() if name == "pty"}

    def pty(self, payload: bytes) -> "Log":
        """Output."""
        self.write(payload, RecordKind.PTY)
        return self

    def resize(self, rows: int, cols: int) -> "Log":
        """Another size."""
        self.size = (rows, cols)
        self._add(RecordKind.RESIZE, struct.pack("<HH", rows, cols))
        return self


@dataclass
class Open:
    """A PTY that runs at a fake runner, with its log."""

    cp: Running
    runner: FakeRunner
    line: Line
    command: Verified[Command]
    id: str
    log: Log
    sent: int = 0

    @property
    def attempt(self) -> str:
        """Its attempt."""
        return f"{self.id}.1"

    async def up(self) -> None:
        """Send what of the log was not sent."""
        for piece in self.log.slices(self.sent):
            await self.line.data(self.sent, piece)
            self.sent += len(piece)

    async def print(self, payload: bytes) -> None:
        """Output that reaches the plane."""
        self.log.pty(payload)
        await self.up()

    async def admit(self, key: Key, mode: str = "rw", outcome: Outcome = Outcome.DONE) -> dict[str, Any]:
        """Have a viewer let in by the runner."""
        found: list[dict[str, Any]] = []

        async def ask() -> None:
            found.append(await admit(self.cp.http, self.id, key, mode))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            command = await self.line.command()
            args = parse_args(command.value)
            assert isinstance(args, PtyAttach)
            assert (args.execution_id, args.start_token, args.key, args.mode) == (self.id, 1, key.key.public.x, mode)
            await self.line.report(self.runner.receipt(command, outcome))
        assert found[0]["viewer"] == args.viewer
        return found[0]

    @asynccontextmanager
    async def seat(self, key: Key | None = None, mode: str = "rw") -> AsyncIterator[Seat]:
        """A viewer that is connected and has not begun."""
        key = key or Key()
        ticket = await self.admit(key, mode)
        async with seated(self.cp.port, self.id, ticket, key) as seat:
            yield seat


@asynccontextmanager
async def opened(directory: Path, **more: Any) -> AsyncIterator[Open]:
    """A PTY that runs, and nothing in its log yet."""
    async with running(directory) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            answer = await cp.post("/v1/ptys", OPEN | more)
            assert answer.status_code == 202, answer.text
            command = await line.command()
            assert command.value.kind == Kind.PTY_OPEN
            await line.report(runner.accepted(command))
            pty = Open(cp, runner, line, command, answer.json()["id"], Log(f"{answer.json()['id']}.1"))
            await line.open_log(pty.attempt)
            await pty.up()
            yield pty
            # A client that has not read what it was sent does not see the close, either.
            with anyio.move_on_after(0.05), suppress(ConnectionClosed):
                while True:
                    await line.socket.recv()


async def test_a_pty_is_an_execution_with_a_terminal(tmp_path: Path) -> None:
    """Opened under a key, leased, listed, shown with its size; an ordinary execution is none."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            asked = [await cp.post("/v1/ptys", OPEN | {"argv": []}, key="once") for _ in range(2)]
            assert [answer.status_code for answer in asked] == [202, 202]
            assert asked[0].text == asked[1].text
            made = asked[0].json()
            assert (made["pty"], made["size"], made["state"]) == (True, {"rows": 30, "cols": 100}, "sent")
            command = await line.command()
            args = parse_args(command.value)
            assert isinstance(args, PtyOpen)
            assert (args.execution_id, args.argv, args.size.rows, args.size_policy) == (made["id"], [], 30, "latest")
            assert command.value.lease is not None
            await line.report(runner.accepted(command))
            other = await cp.start()
            assert (await cp.get(f"/v1/ptys/{made['id']}"))["state"] == "running"
            assert [row["id"] for row in (await cp.get("/v1/ptys", runner="laptop"))["ptys"]] == [made["id"]]
            refused = await cp.http.get(f"/v1/ptys/{other['id']}")
            assert (refused.status_code, refused.json()["error"]["reason"]) == (409, "NOT_A_PTY")
            assert not (await cp.get(f"/v1/executions/{other['id']}"))["pty"]
            await line.report(runner.ended(command, code=7))
            assert (await cp.get("/v1/ptys"))["ptys"] == []
            (ended,) = (await cp.get("/v1/ptys", all=True))["ptys"]
            assert (ended["state"], ended["exit_status"]) == ("settled", 7)


async def test_close_is_a_stop_that_overtakes(tmp_path: Path) -> None:
    """On the safety stream, as `pty.close`; also when the execution is stopped, or its lost half asked for."""
    async with opened(tmp_path) as pty:
        answer = await pty.cp.post(f"/v1/ptys/{pty.id}/close", {"grace_ms": 5})
        assert (answer.status_code, answer.json()["stop_requested"]) == (202, True)
        command = await pty.line.command()
        assert (command.value.kind, command.value.seq) == (Kind.PTY_CLOSE, None)
        again = await pty.cp.post(f"/v1/executions/{pty.id}/stop", {})
        assert again.status_code == 202
        await pty.line.beat()
        assert not [message for message in pty.line.heard if message.t == "command"]


async def test_a_pty_runs_again_as_a_pty(tmp_path: Path) -> None:
    """Another attempt is asked for with the same terminal."""
    async with opened(tmp_path) as pty:
        answer = await pty.cp.post(f"/v1/executions/{pty.id}/attempts", {})
        assert answer.status_code == 202, answer.text
        command = await pty.line.command()
        args = parse_args(command.value)
        assert isinstance(args, PtyOpen)
        assert (args.start_token > 1, args.size.cols) == (True, 100)


async def test_a_viewer_sees_and_types(tmp_path: Path) -> None:
    """What was written is replayed, what comes is sent at once, and what is typed reaches the runner as it was signed."""
    async with opened(tmp_path) as pty:
        await pty.print(b"one\r\ntwo\r\n$ ")
        async with pty.seat() as seat:
            begun = await seat.begin()
            assert (begun["attempt"], begun["mode"], begun["rows"], begun["cols"]) == (pty.attempt, "rw", 30, 100)
            assert begun["received"] == 0
            live = await seat.expect("live")
            assert live["offset"] == len(pty.log.data)
            assert seat.screen.endswith(b"two\r\n$ ")
            viewers = await seat.expect("viewers")
            assert viewers["viewers"] == [{"viewer": begun["viewer"], "mode": "rw"}]
            told = await pty.line.expect(Viewers)
            assert (told.attempt, told.viewers) == (pty.attempt, [begun["viewer"]])
            await seat.type(b"ls\r")
            typed = await pty.line.expect(Typed)
            assert (open_typed(typed, seat.key.key.public), typed.offset, typed.viewer) == (b"ls\r", 0, begun["viewer"])
            await pty.line.send(Taken(attempt=pty.attempt, viewer=typed.viewer, received=3, credit=999))
            assert await seat.expect("taken") == {"t": "taken", "received": 3, "credit": 999, "closed": False}
            await pty.print(b"\x1b[1mfile\r\n")
            await seat.shows(b"\x1b[1mfile\r\n")
            assert seat.offset == len(pty.log.data)
            await seat.resize(50, 120)
            resized = await pty.line.expect(Resized)
            check_resized(resized, seat.key.key.public)
            pty.log.resize(50, 120).pty(b"wide")
            await pty.up()
            size = await seat.expect("size")
            assert (size["rows"], size["cols"]) == (50, 120)
            await seat.shows(b"wide")


async def test_queries_are_left_out_of_a_replay_only(tmp_path: Path) -> None:
    """A terminal would answer them into the shell; what is live is passed on as it is."""
    async with opened(tmp_path) as pty:
        await pty.print(b"old\x1b[6n\r\n")
        async with pty.seat() as seat:
            await seat.begin()
            await seat.expect("live")
            assert b"old\r\n" in seat.screen
            await pty.print(b"new\x1b[6n")
            await seat.shows(b"new\x1b[6n")


async def test_an_end_is_told_once_all_is_shown(tmp_path: Path) -> None:
    """`ended` with the settlement comes behind the last byte, then the connection closes; one that comes later sees the same."""
    async with opened(tmp_path) as pty:
        async with pty.seat() as seat:
            await seat.begin()
            await seat.expect("live")
            pty.log.pty(b"logout\r\n")
            await pty.line.report(pty.runner.ended(pty.command, code=3, log=pty.log))
            await pty.up()
            await pty.line.send(LogClosed(channel=1, end=len(pty.log.data)))
            code, heard = await seat.closed()
            assert (code, heard[-1]["t"], heard[-1]["exit_status"]) == (1000, "ended", 3)
            assert heard[-1]["settlement"]["code"] == 3
            assert seat.screen.endswith(b"logout\r\n")
        late = Key(PrivateKey(b"l" * 32))
        ticket = await admit(pty.cp.http, pty.id, late)
        assert ticket["mode"] == "ro"
        async with seated(pty.cp.port, pty.id, ticket, late) as seat:
            await seat.begin()
            code, heard = await seat.closed()
            assert (code, heard[-1]["t"]) == (1000, "ended")
            assert seat.screen.endswith(b"logout\r\n")


async def test_a_ticket_opens_one_connection_in_its_time(tmp_path: Path) -> None:
    """Again, too late, for another PTY, none, or a wrong one: refused, and closed with 1008."""
    async with opened(tmp_path) as pty:
        key = Key()
        ticket = await pty.admit(key)
        async with seated(pty.cp.port, "ex_other", ticket, key) as seat:
            assert await refusal(seat) == "BAD_TICKET"
        ticket = await admit(pty.cp.http, pty.id, key)
        async with seated(pty.cp.port, pty.id, ticket, key) as seat:
            await seat.begin()
        late = await admit(pty.cp.http, pty.id, key)
        pty.cp.boot.ahead_ms += TICKET_TTL_MS
        for bad in (ticket, late, {"ticket": ""}, {"ticket": "x" * 43}, {"ticket": "x" * 200}):
            async with seated(pty.cp.port, pty.id, bad, key) as seat:
                assert await refusal(seat) == "BAD_TICKET"


async def test_a_page_of_another_origin_is_refused(tmp_path: Path) -> None:
    """Whatever ticket it has; our own origin and those on the list are let in, each to the letter."""
    async with opened(tmp_path) as pty:
        key, port = Key(), pty.cp.port
        await pty.admit(key)
        pty.cp.plane.pty_socket.origins = frozenset({"https://dev.example"})
        own = f"http://127.0.0.1:{port}"
        for bad in (
            "https://evil.example",
            "null",
            f"{own}.evil",
            f"https://127.0.0.1:{port}",
            "https://dev.example:444",
        ):
            ticket = await admit(pty.cp.http, pty.id, key)
            async with seated(port, pty.id, ticket, key, bad) as seat:
                assert await refusal(seat) == "FOREIGN_ORIGIN"
        for good in (own, f"http://localhost:{port}", "https://dev.example", None):
            ticket = await admit(pty.cp.http, pty.id, key)
            async with seated(port, pty.id, ticket, key, good) as seat:
                await seat.begin()


async def test_a_viewer_that_was_let_in_needs_its_runner_no_more(tmp_path: Path) -> None:
    """The same key and mode is the same viewer, with another ticket; another mode under its name is refused."""
    async with opened(tmp_path) as pty:
        key = Key()
        first = await pty.admit(key)
        again = await admit(pty.cp.http, pty.id, key)
        named = await admit(pty.cp.http, pty.id, key, viewer=first["viewer"])
        assert first["viewer"] == again["viewer"] == named["viewer"]
        assert len({first["ticket"], again["ticket"], named["ticket"]}) == 3
        body = {"key": key.key.public.x, "mode": "ro", "viewer": first["viewer"]}
        refused = await pty.cp.http.post(f"/v1/ptys/{pty.id}/attach", json=body)
        assert (refused.status_code, refused.json()["error"]["reason"]) == (409, "DUPLICATE_VIEWER")
        reader = await pty.admit(key, "ro")
        assert reader["viewer"] != first["viewer"]


async def test_what_a_runner_refuses_is_told(tmp_path: Path) -> None:
    """With its reason; the next attach asks anew."""
    async with opened(tmp_path) as pty:
        key = Key()
        answers: list[Any] = []

        async def ask() -> None:
            body = {"key": key.key.public.x, "mode": "rw"}
            answers.append(await pty.cp.http.post(f"/v1/ptys/{pty.id}/attach", json=body))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            command = await pty.line.command()
            await pty.line.report(pty.runner.receipt(command, Outcome.REFUSED, reason=Reason.POLICY_DENIED))
        (answer,) = answers
        error = answer.json()["error"]
        assert (answer.status_code, error["reason"], error["detail"]) == (409, "ATTACH_REFUSED", "POLICY_DENIED")
        await pty.admit(key)


async def test_who_may_only_look_types_nothing(tmp_path: Path) -> None:
    """Typing and sizes are refused at once; the runner hears of neither, and does not wait for what such a viewer has seen."""
    async with opened(tmp_path) as pty, pty.seat(mode="ro") as seat:
        await seat.begin()
        await seat.expect("live")
        await seat.type(b"rm -rf\r")
        assert (await seat.expect("taken"))["reason"] == "READ_ONLY"
        await seat.resize(10, 10)
        assert (await seat.expect("taken"))["reason"] == "READ_ONLY"
        told = await pty.line.expect(Viewers)
        assert (told.seen, len(told.viewers)) == (None, 1)
        await pty.line.beat()
        assert not [message for message in pty.line.heard if isinstance(message, Typed | Resized)]


async def test_what_is_typed_while_the_runner_is_away_arrives(tmp_path: Path) -> None:
    """The viewer is told of both; what has no answer goes again on the next session, and who looks on is told anew."""
    async with opened(tmp_path) as pty, pty.seat() as seat:
        await seat.begin()
        await seat.type(b"a")
        first = await pty.line.expect(Typed)
        await pty.line.socket.close()
        await seat.expect("offline")
        await seat.type(b"b")
        async with pty.runner.connect(pty.cp.port) as line:
            await seat.expect("online")
            told = await line.expect(Viewers)
            assert told.viewers == [seat.ticket["viewer"]]
            again, more = await line.expect(Typed), await line.expect(Typed)
            assert (again, more.offset) == (first, 1)
            await line.send(Taken(attempt=pty.attempt, viewer=again.viewer, received=2, credit=9))
            assert (await seat.expect("taken"))["received"] == 2


async def test_a_runner_hears_of_nobody_once_they_are_gone(tmp_path: Path) -> None:
    """Also on a session that begins later: a PTY must not wait for a viewer that left meanwhile."""
    async with opened(tmp_path) as pty:
        async with pty.seat() as seat:
            await seat.begin()
            assert (await pty.line.expect(Viewers)).viewers
        assert (await pty.line.expect(Viewers)) == Viewers(attempt=pty.attempt)
    async with running(tmp_path) as cp, pty.runner.connect(cp.port) as line:
        assert await line.expect(Viewers) == Viewers(attempt=pty.attempt)


async def test_a_viewer_is_sent_what_it_shows(tmp_path: Path) -> None:
    """So much and no more ahead of its `seen`; its runner is told as it follows."""
    async with opened(tmp_path) as pty, pty.seat() as seat:
        await seat.begin()
        await seat.expect("live")
        await pty.line.expect(Viewers)
        block = b"x" * 60_000
        for _ in range(12):
            await pty.print(block)
        while len(seat.screen) < PTY_UNSEEN_BYTES:
            await seat.hear()
        with anyio.move_on_after(0.3):
            await seat.hear()
        assert len(seat.screen) < PTY_UNSEEN_BYTES + 2 * len(block)
        stopped_at = seat.offset
        await seat.seen()
        told = await pty.line.expect(Viewers)
        assert told.seen == stopped_at
        while seat.offset < len(pty.log.data):
            await seat.hear()
        assert seat.screen.count(b"x") == 12 * len(block)
        assert len(block) > PTY_SEEN_STEP_BYTES


async def test_a_viewer_far_behind_is_shown_the_end(tmp_path: Path) -> None:
    """One that shows nothing is skipped to the newest once it goes on; another one beside it is not held up."""
    async with opened(tmp_path) as pty:
        await pty.print(b"begin\r\n")
        async with pty.seat() as slow, pty.seat(Key(PrivateKey(b"f" * 32)), "ro") as fast:
            for seat in (slow, fast):
                await seat.begin()
                await seat.expect("live")
            line = b"y" * 1000 + b"\r\n"
            while len(pty.log.data) < 2 * PTY_SKIP_BYTES + PTY_UNSEEN_BYTES:
                await pty.print(line * 50)
                if pty.log.segments * (1 << 20) < len(pty.log.data):
                    pty.log.roll()
                while fast.offset < len(pty.log.data) - 200:
                    await fast.hear()
                await fast.seen()
            await pty.print(b"the end\r\n")
            await fast.shows(b"the end\r\n")
            assert fast.screen.count(line) == pty.log.data.count(b"\r\n") - 2
            while slow.offset < PTY_UNSEEN_BYTES:
                await slow.hear()
            slow.screen = b""
            await slow.seen()
            skipped = await slow.expect("skipped")
            live = await slow.expect("live")
            assert skipped["offset"] > len(pty.log.data) - 300_000
            assert live["offset"] == len(pty.log.data)
            assert slow.screen.endswith(b"the end\r\n")
            assert len(slow.screen) < 400_000


async def test_a_viewer_that_comes_back_gets_what_it_missed(tmp_path: Path) -> None:
    """From the offset it had, and nothing twice; how much of it was taken is known; its first connection is ended."""
    async with opened(tmp_path) as pty:
        await pty.print(b"before")
        async with pty.seat() as first:
            await first.begin()
            await first.expect("live")
            await first.type(b"xyz")
            viewer = (await pty.line.expect(Typed)).viewer
            await pty.line.send(Taken(attempt=pty.attempt, viewer=viewer, received=3, credit=9))
            await first.expect("taken")
            had = first.offset
            await pty.print(b"missed")
            ticket = await admit(pty.cp.http, pty.id, first.key)
            async with seated(pty.cp.port, pty.id, ticket, first.key) as second:
                begun = await second.begin(start=had)
                assert (begun["offset"], begun["received"]) == (had, 3)
                await second.shows(b"missed")
                assert second.screen == b"missed"
                assert await refusal(first) == "SESSION_REPLACED"
                assert (await second.expect("viewers"))["viewers"] == [{"viewer": viewer, "mode": "rw"}]


@pytest.mark.parametrize(
    ("attach", "shown"), [("none", b""), ("redraw", b"\x1b[?2004h"), ("snapshot", b"in the middle")]
)
async def test_a_viewer_says_how_it_wants_to_begin(tmp_path: Path, attach: str, shown: bytes) -> None:
    """With nothing of what was, with its modes, or with the screen as an emulator has it; then what comes."""
    async with opened(tmp_path) as pty:
        await pty.print(b"gone\x1b[?2004h\x1b[2J\x1b[10;20Hin the middle")
        async with pty.seat() as seat:
            assert (await seat.begin(attach))["offset"] == len(pty.log.data)
            await seat.expect("live")
            assert b"gone" not in seat.screen
            assert shown in seat.screen
            assert bool(shown) == bool(seat.screen)
            await pty.print(b" and more")
            await seat.shows(b" and more")


async def test_a_hole_is_jumped_with_a_new_replay(tmp_path: Path) -> None:
    """What the runner's ring gave up exists nowhere: the viewer is shown what is behind it."""
    async with opened(tmp_path) as pty, pty.seat() as seat:
        await pty.print(b"first\r\n")
        await seat.begin()
        await seat.expect("live")
        before = len(pty.log.data)
        pty.log.pty(b"never sent\r\n")
        pty.log.roll()
        behind = pty.log.data.rindex(b"ex_") - 58
        await pty.line.send(Gap(channel=1, start=before, end=behind))
        pty.sent = behind
        await pty.print(b"half a line\r\nsecond\r\n")
        await seat.expect("skipped")
        await seat.shows(b"second\r\n")
        assert b"never" not in seat.screen


async def test_words_out_of_place_end_a_viewer(tmp_path: Path) -> None:
    """What is no frame, no first word, or said twice is refused, and the connection ends with 1008."""
    async with opened(tmp_path) as pty:
        key = Key()
        await pty.admit(key)
        good = {"t": "begin", "attach": "replay", "from": None, "rows": 24, "cols": 80}
        for first, second, reason in (
            ({"t": "seen", "offset": 0}, None, "UNEXPECTED_MESSAGE"),
            ({"t": "begin", "rows": 0, "cols": 1}, None, "BAD_FRAME"),
            ({"t": "what"}, None, "BAD_FRAME"),
            (good, good, "UNEXPECTED_MESSAGE"),
            (good, {"t": "typed", "offset": -1, "data": "YQ==", "sig": "s" * 86}, "BAD_FRAME"),
        ):
            ticket = await admit(pty.cp.http, pty.id, key)
            async with seated(pty.cp.port, pty.id, ticket, key) as seat:
                await seat.say(first)
                if second is not None:
                    await seat.say(second)
                assert await refusal(seat) == reason


async def refusal(seat: Seat) -> str:
    """Wait until it is refused: why."""
    code, heard = await seat.closed()
    assert (code, heard[-1]["t"]) == (1008, "refused"), (code, heard)
    reason: str = heard[-1]["reason"]
    return reason


async def test_another_runner_takes_nothing(tmp_path: Path) -> None:
    """What it says of a PTY that is not its own reaches no viewer and counts for nothing."""
    async with opened(tmp_path) as pty, pty.seat() as seat:
        await seat.begin()
        await seat.type(b"abc")
        typed = await pty.line.expect(Typed)
        other = await pty.cp.enrol("other", b"o" * 32)
        async with other.connect(pty.cp.port) as line:
            await line.send(Taken(attempt=pty.attempt, viewer=typed.viewer, received=3, credit=3, closed=True))
            await line.beat()
        await pty.line.send(Taken(attempt=pty.attempt, viewer=typed.viewer, received=1, credit=9))
        assert (await seat.expect("taken"))["received"] == 1
