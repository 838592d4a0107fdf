"""Logs: over the wire into a file, and out again over HTTP."""

import os
import struct
from pathlib import Path
from typing import Any

import anyio
import pytest

from controlplane.channels import Channels
from controlplane.logstore import LogStore
from controlplane.rows import LogRow
from protocol.frames import DataFrame, encode_data
from protocol.limits import CHANNEL_WINDOW_BYTES, CHANNEL_WINDOW_BYTES_MAX, CONNECTION_WINDOW_BYTES
from protocol.messages import Ack, Blocked, Credit, Gap, LogClosed, LogOpen, Resume, Watch
from protocol.records import RecordKind, records
from tests.support.control_plane import Running, running
from tests.support.fake_runner import Line
from tests.support.log_bytes import LogBytes

pytestmark = pytest.mark.slow


async def begun(cp: Running, line: Line) -> tuple[str, LogBytes]:
    """A running execution, and an empty log of its attempt."""
    asked = await cp.start()
    await line.report(line.runner.accepted(await line.command()))
    return asked["id"], LogBytes(f"{asked['id']}.1")


async def stored(cp: Running, execution: str, **params: Any) -> bytes:
    """The log as a client reads it."""
    answer = await cp.http.get(f"/v1/executions/{execution}/log", params=params)
    assert answer.status_code == 200, answer.text
    return answer.content


async def acked(line: Line, offset: int) -> Ack:
    """Wait until the plane has acked up to `offset`."""
    while (ack := await line.expect(Ack)).offset < offset:
        pass
    return ack


async def test_a_log_arrives_byte_for_byte(tmp_path: Path) -> None:
    """Frames, ack, closed, read, digests."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            execution, log = await begun(cp, line)
            for n in range(50):
                log.write(os.urandom(n * 100), RecordKind.STDERR if n % 3 == 0 else RecordKind.STDOUT)
                if n == 20:
                    log.roll()
            await line.upload(log.attempt, log)
            await acked(line, len(log.data))
        assert await stored(cp, execution) == log.data
        answer = await cp.http.get(f"/v1/executions/{execution}/log", params={"offset": len(log.data)})
        assert (answer.content, answer.headers["X-Log-End"]) == (b"", str(len(log.data)))
        shown = await cp.get(f"/v1/executions/{execution}/digests")
        expected = {name: digest.model_dump() for name, digest in log.streams().items()}
        assert shown["streams"] == expected
        assert shown["log"] == {"end": len(log.data), "segments": 2, "chain": log.chain()}
        assert (shown["complete"], shown["chain_ok"], shown["gaps"]) == (True, True, [])
        shown_log = {"end": len(log.data), "complete": True, "short_bytes": 0}
        assert (await cp.get(f"/v1/executions/{execution}"))["log"] == shown_log


async def test_doubles_and_overlaps_change_nothing(tmp_path: Path) -> None:
    """A frame again, and one that reaches back: the file is the log."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            execution, log = await begun(cp, line)
            log.write(b"a" * 100).write(b"b" * 100)
            await line.open_log(log.attempt)
            first = log.slices(0)[0]
            await line.data(0, first)
            await line.data(0, first)
            await line.data(0, log.data)
            await acked(line, len(log.data))
            assert await stored(cp, execution) == log.data


async def test_a_jump_ahead_is_answered_with_one_resume(tmp_path: Path) -> None:
    """What follows the jump is dropped until the runner goes on where it is told."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            execution, log = await begun(cp, line)
            log.write(b"a" * 100)
            await line.open_log(log.attempt)
            for _ in range(3):
                await line.data(1000, b"lost")
            assert (await line.expect(Resume)).offset == 0
            await line.upload(log.attempt, log)
            await acked(line, len(log.data))
            assert not [message for message in line.heard if message.t == "resume"]
            assert await stored(cp, execution) == log.data


async def test_a_log_goes_on_where_it_was_durable(tmp_path: Path) -> None:
    """Another session, then another life of the plane: resume names the end."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            execution, log = await begun(cp, line)
            log.write(b"a" * 5000).write(b"b" * 5000).write(b"c" * 5000)
            slices = log.slices(0)
            await line.open_log(log.attempt)
            await line.data(0, slices[0] + slices[1])
            await acked(line, len(slices[0] + slices[1]))
        async with runner.connect(cp.port) as line:
            resume = await line.open_log(log.attempt, 5)
            assert resume.offset == len(slices[0] + slices[1])
    async with running(tmp_path) as cp, runner.connect(cp.port) as line:
        await line.upload(log.attempt, log)
        await acked(line, len(log.data))
        assert await stored(cp, execution, follow=1) == log.data


async def test_a_gap_is_one_record_and_the_offsets_go_on(tmp_path: Path) -> None:
    """The reader is told what is missing; the chain across a hole proves nothing and fails nothing."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            execution, log = await begun(cp, line)
            log.write(b"head")
            start = len(log.data)
            log.write(b"missing" * 1000)
            log.roll()
            end = len(log.data) - len(log.slices(0)[-1])
            log.write(b"tail")
            await line.open_log(log.attempt)
            await line.data(0, log.data[:start])
            await line.send(Gap(channel=1, start=start, end=end))
            ack = await line.expect(Ack)
            assert ack.credit == end + CHANNEL_WINDOW_BYTES
            await line.data(end, log.data[end:])
            await line.send(LogClosed(channel=1, end=len(log.data)))
            await acked(line, len(log.data))
        data = await stored(cp, execution, follow=1)
        gap = data[start : start + 32]
        assert (gap[4], struct.unpack("<QQ", gap[16:])) == (RecordKind.GAP, (start, end))
        assert data[:start] + data[start + 32 :] == log.data[:start] + log.data[end:]
        inside = await stored(cp, execution, offset=start + 5)
        assert struct.unpack("<QQ", inside[16:32]) == (start + 5, end)
        shown = await cp.get(f"/v1/executions/{execution}/digests")
        assert (shown["gaps"], shown["chain_ok"], shown["complete"]) == ([[start, end]], True, True)
        assert shown["log"]["chain"] == log.chain()


async def test_data_beyond_the_credit_ends_the_session(tmp_path: Path) -> None:
    """4400: credit is a promise."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            _, log = await begun(cp, line)
            assert (await line.open_log(log.attempt)).credit == CHANNEL_WINDOW_BYTES
            await line.data(CHANNEL_WINDOW_BYTES - 3, b"over")
            assert (await line.closed()).code == 4400


@pytest.mark.parametrize("case", ["data", "gap", "closed"])
async def test_a_channel_must_be_open(tmp_path: Path, case: str) -> None:
    """4400 for what has no log."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            if case == "data":
                await line.data(0, b"x", 7)
            else:
                await line.send(Gap(channel=7, start=0, end=1) if case == "gap" else LogClosed(channel=7, end=1))
            assert (await line.closed()).code == 4400


async def test_a_runner_cannot_write_the_log_of_another(tmp_path: Path) -> None:
    """Nor open it."""
    async with running(tmp_path) as cp:
        mine, other = await cp.enrol("laptop", b"1" * 32), await cp.enrol("other", b"2" * 32)
        async with mine.connect(cp.port) as line, other.connect(cp.port) as theirs:
            _, log = await begun(cp, line)
            await theirs.send(LogOpen(channel=1, attempt=log.attempt, first=0))
            assert (await theirs.closed()).code == 4400


async def test_following_gets_everything_as_it_comes(tmp_path: Path) -> None:
    """A follower that is there first, one that joins late, and one that starts behind the head: all get the same bytes."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line, anyio.create_task_group() as tasks:
            execution, log = await begun(cp, line)
            got: dict[str, bytes] = {}
            came = anyio.Event()

            async def follow(name: str, offset: int = 0) -> None:
                got[name] = b""
                url = f"/v1/executions/{execution}/log"
                async with cp.http.stream("GET", url, params={"follow": 1, "offset": offset}) as answer:
                    async for block in answer.aiter_bytes():
                        got[name] += block
                        came.set()

            tasks.start_soon(follow, "early")
            log.write(b"one")
            await line.open_log(log.attempt)
            await line.data(0, log.data)
            with anyio.fail_after(5):
                await came.wait()
            assert got["early"] == log.data
            head = len(log.data)
            tasks.start_soon(follow, "late")
            tasks.start_soon(follow, "behind", head)
            log.write(b"two" * 1000)
            await line.data(head, log.data[head:])
            await line.send(LogClosed(channel=1, end=len(log.data)))
            await acked(line, len(log.data))
        assert got == {"early": log.data, "late": log.data, "behind": log.data[head:]}


async def test_following_ends_where_no_log_will_come(tmp_path: Path) -> None:
    """A refused start, a cancelled one."""
    async with running(tmp_path) as cp, anyio.create_task_group() as tasks:
        await cp.enrol()
        asked = await cp.start()
        ended = anyio.Event()

        async def follow() -> None:
            assert await stored(cp, asked["id"], follow=1) == b""
            ended.set()

        tasks.start_soon(follow)
        await cp.post(f"/v1/executions/{asked['id']}/stop")
        with anyio.fail_after(5):
            await ended.wait()


async def test_an_offset_where_no_record_begins_is_refused(tmp_path: Path) -> None:
    """422, not garbage."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            execution, log = await begun(cp, line)
            log.write(b"abc" * 100)
            await line.upload(log.attempt, log)
            await acked(line, len(log.data))
        for offset in (1, len(log.data) - 1, len(log.data) + 1):
            answer = await cp.http.get(f"/v1/executions/{execution}/log", params={"offset": offset})
            assert (answer.status_code, answer.json()["error"]["reason"]) == (422, "BAD_OFFSET")


async def test_a_changed_byte_breaks_the_chain(tmp_path: Path) -> None:
    """A stored segment that was touched is not what the next one names."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            execution, log = await begun(cp, line)
            log.write(b"first")
            place = len(log.data) - 1
            log.roll()
            log.write(b"second")
            await line.upload(log.attempt, log)
            await acked(line, len(log.data))
        path = tmp_path / "logs" / f"{log.attempt}.log"
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"!")
        shown = await cp.get(f"/v1/executions/{execution}/digests")
        assert not shown["chain_ok"]


def a_store(directory: Path) -> tuple[LogStore, list[LogRow]]:
    """A log store that remembers what it saved."""
    saved: list[LogRow] = []

    async def save(row: LogRow) -> None:
        saved.append(row)

    return LogStore(directory / "logs", lambda _: None, save), saved


async def test_nothing_beyond_the_durable_end_is_acked(tmp_path: Path) -> None:
    """Credit comes at once, the offset with the row; a resting tail is synced by itself."""
    store, saved = a_store(tmp_path)
    said: list[Resume | Ack | Credit | Watch] = []
    channels = Channels("rn", store, lambda _: "rn", said.append)
    async with anyio.create_task_group() as tasks:
        await tasks.start(store.run)
        channels.open(LogOpen(channel=1, attempt="ex.1", first=0))
        offset, block = 0, bytes(60_000)
        while offset < 3 * CHANNEL_WINDOW_BYTES // 2 - 60_000:
            channels.data(encode_data(DataFrame(1, offset, block)))
            offset += len(block)
        acks = [message for message in said if isinstance(message, Ack)]
        assert [ack.offset for ack in acks] == [0] * len(acks)
        assert len(acks) == 2
        with anyio.fail_after(5):
            while not (isinstance(said[-1], Ack) and said[-1].offset == offset):
                await anyio.sleep(0.01)
        assert saved[-1].end == offset
        channels.release()
        tasks.cancel_scope.cancel()
    await store.flush()


async def test_files_are_closed_with_their_channels(tmp_path: Path) -> None:
    """No descriptor stays behind."""
    store, _ = a_store(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    async with anyio.create_task_group() as tasks:
        await tasks.start(store.run)
        channels = Channels("rn", store, lambda _: "rn", lambda _: None)
        for n in range(20):
            channels.open(LogOpen(channel=n, attempt=f"ex{n}.1", first=0))
            channels.data(encode_data(DataFrame(n, 0, b"data")))
        channels.release()
        with anyio.fail_after(5):
            while len(os.listdir("/proc/self/fd")) > before:
                await anyio.sleep(0.01)
        tasks.cancel_scope.cancel()


def test_the_fake_runners_log_is_a_log() -> None:
    """What these tests send is what a shim writes: records, whole and in order."""
    log = LogBytes("ex.1").write(b"x").write(b"y", RecordKind.STDERR)
    assert [record.kind for record in records(log.data, 0)] == [
        RecordKind.SEGMENT,
        RecordKind.STDOUT,
        RecordKind.STDERR,
    ]


# --- credit ---------------------------------------------------------------------------------------------------------


def opened(directory: Path, *names: str) -> tuple[Channels, list[Resume | Ack | Credit | Watch], LogStore]:
    """Channels that were opened in this order, and what they say."""
    store, _ = a_store(directory)
    said: list[Resume | Ack | Credit | Watch] = []
    channels = Channels("rn", store, lambda _: "rn", said.append)
    for number, name in enumerate(names):
        channels.open(LogOpen(channel=number, attempt=name, first=0))
    return channels, said, store


def send(channels: Channels, number: int, offset: int, size: int, *, goes_on: bool = False) -> None:
    """One data frame."""
    channels.data(encode_data(DataFrame(number, offset, bytes(size), goes_on)))


def test_a_window_grows_while_its_sender_is_blocked(tmp_path: Path) -> None:
    """To its largest, and not by a word that a grant has overtaken."""
    channels, said, _ = opened(tmp_path, "ex.1")
    credit, windows = CHANNEL_WINDOW_BYTES, []
    for _ in range(8):
        channels.blocked(Blocked(channel=0, credit=credit))
        assert isinstance(said[-1], Ack)
        credit = said[-1].credit
        windows.append(credit)
    assert windows[0] == 2 * CHANNEL_WINDOW_BYTES and windows[-1] == CHANNEL_WINDOW_BYTES_MAX
    told = len(said)
    channels.blocked(Blocked(channel=0, credit=0))
    assert len(said) == told


def test_all_channels_together_have_a_credit_that_is_renewed_by_halves(tmp_path: Path) -> None:
    """Also what is dropped as a double counts: it had to be held."""
    channels, said, _ = opened(tmp_path, "ex.1")
    for _ in range(CONNECTION_WINDOW_BYTES // 2 // 64_000):
        send(channels, 0, 0, 64_000)
    assert not [each for each in said if isinstance(each, Credit)]
    send(channels, 0, 0, 64_000)
    granted = [each.total for each in said if isinstance(each, Credit)]
    assert len(granted) == 1 and granted[0] > CONNECTION_WINDOW_BYTES + CONNECTION_WINDOW_BYTES // 2


def test_half_a_record_is_neither_durable_nor_where_it_goes_on(tmp_path: Path) -> None:
    """The next session begins at the end of the last whole one; a gap swallows the half."""
    channels, said, store = opened(tmp_path, "ex.1")
    send(channels, 0, 0, 100)
    send(channels, 0, 100, 50, goes_on=True)
    assert store.acquire("ex.1", "rn").row.end == 100
    channels.release()
    again = Channels("rn", store, lambda _: "rn", said.append)
    again.open(LogOpen(channel=0, attempt="ex.1", first=0))
    assert isinstance(said[-1], Resume) and said[-1].offset == 100
    send(again, 0, 100, 80)
    assert store.acquire("ex.1", "rn").row.end == 180
    send(again, 0, 180, 10, goes_on=True)
    again.gap(Gap(channel=0, start=180, end=500))
    assert store.acquire("ex.1", "rn").row.gaps == ((180, 500),)


def test_a_runner_is_told_who_is_followed(tmp_path: Path) -> None:
    """By the first follower and the last one, and of one that was there before."""
    channels, said, store = opened(tmp_path, "ex.1")
    log = store.acquire("ex.1", "rn")
    log.follow(1)
    log.follow(1)
    log.follow(-1)
    assert [each for each in said if isinstance(each, Watch)] == [Watch(channel=0, on=True)]
    channels.open(LogOpen(channel=3, attempt="ex.1", first=0))
    assert said[-1] == Watch(channel=3, on=True)
    log.follow(-1)
    assert said[-1] == Watch(channel=3, on=False)
