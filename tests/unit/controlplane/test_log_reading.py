"""Where the control plane begins a reading, and what it says of a log that is not what was signed."""

import os
import random
from pathlib import Path

import anyio
import pytest

from controlplane import logseek
from controlplane.logread import gap_record
from controlplane.logseek import find_start
from controlplane.rows import LogRow
from controlplane.views import log_view
from protocol.logselect import Cut, Selection, Wish, read_cuts
from protocol.logtext import Standard
from protocol.messages import Ack, LogClosed
from protocol.records import (
    NO_SEGMENT,
    Record,
    RecordKind,
    SegmentHeader,
    encode_record,
    encode_segment_header,
    records,
)
from tests.support.control_plane import Running, running
from tests.support.fake_runner import Line
from tests.support.log_bytes import LogBytes

ATTEMPT = "ex_1.1"
READS_MAX = 16
"""Of a block each, or of what may be a header: for the last two of forty segments."""


class Stored:
    """A stored log of many segments, record n at the time n, with holes between some."""

    def __init__(self, directory: Path, segments: int, *, hole_behind: tuple[int, ...] = ()) -> None:
        self.path = directory / f"{ATTEMPT}.log"
        self.log: list[Record] = []
        gaps: list[tuple[int, int]] = []
        data = b""
        for n in range(segments):
            header = encode_segment_header(SegmentHeader(len(data), NO_SEGMENT, ATTEMPT))
            for kind, payload in (
                (RecordKind.SEGMENT, header),
                (RecordKind.STDOUT, b"%d out\n%d " % (n, n)),
                (RecordKind.STDERR, b"%s says %d\n" % (ATTEMPT.encode(), n)),
            ):
                raw = encode_record(kind, payload, len(self.log))
                self.log.append(Record(len(data), kind, len(self.log), payload))
                data += raw
            if n in hole_behind:
                gaps.append((len(data), len(data) + 1000))
                data += bytes(1000)
        self.path.write_bytes(data)
        self.row = LogRow(attempt=ATTEMPT, runner_id="rn_1", end=len(data), gaps=tuple(gaps))

    def shown(self, wish: Wish) -> list[tuple[int, bytes]]:
        """What a reader that begins there sees."""
        start = find_start(self.row, self.path, wish)
        assert start.offset == self.row.end or start.offset in {
            *(record.offset for record in self.log), *(gap[0] for gap in self.row.gaps), *(gap[1] for gap in self.row.gaps)
        }, "a reading begins at a record or a hole"  # fmt: skip
        selection = Selection(wish, start.cuts)
        taken = [selection.take(record) for record in self.log if record.offset >= start.offset]
        return [
            (record.kind, record.payload)
            for record in taken
            if record is not None and record.kind != RecordKind.SEGMENT
        ]

    def wanted(self, wish: Wish) -> list[tuple[int, bytes]]:
        """The same by reading everything."""
        selection = Selection(wish)
        taken = map(selection.take, self.log)
        return [(one.kind, one.payload) for one in taken if one is not None and one.kind != RecordKind.SEGMENT]


@pytest.fixture(params=[(), (0, 4, 8)], ids=["whole", "holes"])
def stored(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stored:
    """Blocks are smaller than segments, and points in time are looked for by halves."""
    monkeypatch.setattr(logseek, "DIGEST_BLOCK_BYTES", 100)
    monkeypatch.setattr(logseek, "HALVE_ABOVE_BYTES", 150)
    return Stored(tmp_path, 12, hole_behind=request.param)


def test_the_last_lines_are_found(stored: Stored) -> None:
    """Of both streams and of one; a line goes on over segments."""
    assert stored.shown(Wish(tail=0)) == []
    assert stored.shown(Wish(tail=2)) == [(1, b"11 "), (2, b"ex_1.1 says 11\n")]
    assert stored.shown(Wish(tail=3))[0] == (1, b"10 ")
    assert stored.shown(Wish(tail=2, stream=Standard.OUT))[:1] == [(1, b"10 ")]
    assert stored.shown(Wish(tail=1000)) == stored.wanted(Wish())


def test_little_is_read_for_the_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever blocks end: one that ends within what opens a segment does not hide it."""
    stored = Stored(tmp_path, 40)
    read: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, at: (read.append(size), pread(fd, size, at))[1])
    for block_bytes in range(70, 130):
        monkeypatch.setattr(logseek, "DIGEST_BLOCK_BYTES", block_bytes)
        read.clear()
        find_start(stored.row, stored.path, Wish(tail=1, stream=Standard.ERR))
        assert len(read) <= READS_MAX


def test_a_point_in_time_is_found(stored: Stored) -> None:
    """Each record's own, one before all, and one behind."""
    for since_ns in range(len(stored.log) + 2):
        assert stored.shown(Wish(since_ns=since_ns)) == stored.wanted(Wish(since_ns=since_ns))


def test_the_record_that_holds_an_offset_is_found(stored: Stored) -> None:
    """Whatever offset is asked for, holes and the end included."""
    for offset in [*range(0, stored.row.end, 7), stored.row.end, stored.row.end + 5]:
        assert stored.shown(Wish(offset=offset)) == stored.wanted(Wish(offset=offset))


def test_the_look_back_ends(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody makes the control plane read a gigabyte for the last lines of it."""
    monkeypatch.setattr(logseek, "LOOK_BACK_BYTES", 300)
    start = find_start(stored.row, stored.path, Wish(tail=1000))
    assert stored.row.end - 1300 - 300 <= start.offset < stored.row.end


def test_noise_stops_no_search(tmp_path: Path) -> None:
    """What is stored is no log: a beginning is found anyway, somewhere within."""
    path = tmp_path / "noise"
    path.write_bytes(random.Random(1).randbytes(300_000) + ATTEMPT.encode() * 100)
    row = LogRow(attempt=ATTEMPT, runner_id="rn_1", end=path.stat().st_size)
    for wish in (Wish(tail=3), Wish(since_ns=5), Wish(offset=1234)):
        assert 0 <= find_start(row, path, wish).offset <= row.end
    assert find_start(LogRow(attempt=ATTEMPT, runner_id="rn_1"), tmp_path / "none", Wish(tail=3)).offset == 0


def test_a_log_that_was_closed_short_is_not_complete() -> None:
    """Of what its runner signed a part never came."""
    row = LogRow(attempt=ATTEMPT, runner_id="rn_1", end=70, complete=True)
    signed = {"log": {"end": 100, "segments": 1, "chain": ""}}
    assert log_view(row, signed).model_dump() == {"end": 70, "complete": False, "short_bytes": 30}
    assert log_view(row, None).complete and log_view(row, {"log": None}).complete
    assert log_view(None, signed).model_dump() == {"end": 0, "complete": False, "short_bytes": 0}


async def ended(cp: Running, line: Line, *, unsent: int = 0) -> tuple[str, LogBytes]:
    """An execution that has ended, and its log, whose last bytes its runner does not send."""
    await cp.start()
    command = await line.command()
    await line.report(line.runner.accepted(command))
    execution = command.value.args["execution_id"]
    log = LogBytes(f"{execution}.1")
    for n in range(3):
        log.write(b"line %d\n" % n).write(b"error %d\n" % n, RecordKind.STDERR).roll()
    await line.open_log(log.attempt)
    sent = len(log.data) - unsent
    await line.data(0, log.data[:sent])
    await line.send(LogClosed(channel=1, end=sent))
    while (await line.expect(Ack)).offset < sent:
        pass
    await line.report(line.runner.ended(command, log=log))
    return execution, log


@pytest.mark.slow
async def test_a_reading_begins_where_it_is_wished_for(tmp_path: Path) -> None:
    """Over HTTP: the headers say where, and what to leave out; nonsense is refused."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            execution, log = await ended(cp, line)
            url = f"/v1/executions/{execution}/log"
            answer = await cp.http.get(url, params={"tail": 1, "stream": "stdout"})
            start = int(answer.headers["X-Log-Start"])
            assert answer.content == log.data[start:] and start > 0
            assert read_cuts(answer.headers["X-Log-Cuts"])[RecordKind.STDOUT] == Cut(start, len(b"line 1\n"))
            near = await cp.http.get(url, params={"near": start + 3, "follow": 1})
            assert (near.content, near.headers["X-Log-Start"]) == (log.data[start:], str(start))
            since = await cp.http.get(url, params={"since_ms": 10**12})
            assert (since.content, since.headers["X-Log-Start"]) == (b"", str(len(log.data)))
            for params in ({"tail": -1}, {"stream": "pty", "tail": 1}, {"since_ms": "x"}, {"near": 2**60}):
                assert (await cp.http.get(url, params=params)).status_code == 422


@pytest.mark.slow
async def test_what_is_stored_is_compared_with_what_was_signed(tmp_path: Path) -> None:
    """A whole log is proven; a flipped byte, a file that was cut, and a log that its runner closed short are seen."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            whole, log = await ended(cp, line)
            proven = await cp.get(f"/v1/executions/{whole}/digests")
            assert (proven["complete"], proven["chain_ok"], proven["proof"]["wrong"]) == (True, True, [])
            path = tmp_path / "logs" / f"{log.attempt}.log"
            kept = path.read_bytes()
            for damaged, words in (
                (kept[:-1] + b"!", "is of another attempt"),
                (kept.replace(b"line 1", b"lime 1"), "stdout is not what was signed"),
                (kept[:-30], "is not there any more"),
                (kept[: len(log.slices(0)[0])], "is not there any more"),
                (b"", "is not there any more"),
            ):
                path.write_bytes(damaged)
                found = await cp.get(f"/v1/executions/{whole}/digests")
                assert (found["proof"]["ok"], found["chain_ok"]) == (False, False)
                assert words in " ".join(found["proof"]["wrong"]), found

            last = len(log.slices(0)[-1])
            execution, short = await ended(cp, line, unsent=last)
            shown = (await cp.get(f"/v1/executions/{execution}"))["log"]
            assert shown == {"end": len(short.data) - last, "complete": False, "short_bytes": last}
            found = await cp.get(f"/v1/executions/{execution}/digests")
            assert (found["complete"], found["chain_ok"], found["proof"]["ok"]) == (False, False, False)
            assert "cut short" in found["proof"]["wrong"][0]


@pytest.mark.slow
async def test_a_follower_that_has_more_than_the_control_plane_waits(tmp_path: Path) -> None:
    """What was shown and not durable is gone with a crash, and comes again: it is not shown twice, nor refused."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line, anyio.create_task_group() as tasks:
            await cp.start()
            command = await line.command()
            await line.report(line.runner.accepted(command))
            execution = command.value.args["execution_id"]
            log = LogBytes(f"{execution}.1").write(b"one").write(b"two")
            reached, rest = len(log.data) - len(log.slices(0)[-1]), log.slices(0)[-1]
            got: list[bytes] = []
            began = anyio.Event()

            async def follow() -> None:
                params = {"follow": 1, "offset": reached}
                async with cp.http.stream("GET", f"/v1/executions/{execution}/log", params=params) as answer:
                    assert answer.status_code == 200
                    began.set()
                    got.append(await answer.aread())

            tasks.start_soon(follow)
            with anyio.fail_after(5):
                await began.wait()
            await line.upload(log.attempt, log)
        assert got == [rest]
        beyond = {"follow": 1, "offset": len(log.data) + 1}
        assert (await cp.http.get(f"/v1/executions/{execution}/log", params=beyond)).status_code == 422


def test_a_hole_has_no_place_of_its_own() -> None:
    """What stands for it names its bounds."""
    (record,) = records(gap_record(5, 9), 0)
    assert record.kind == RecordKind.GAP and record.unix_ns == 0
