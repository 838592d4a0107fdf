"""Output beyond its limit, and silence: what is kept, who waits, what goes, and how the end tells it."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import pytest

from runner.shim import records, wire
from tests.support.shim import Shim, split_records, wait_for
from tests.unit.runner.shim.conftest import StartShim

KIB, MIB = 1024, 1024 * 1024


def numbers(kept: bytes) -> list[int]:
    """The whole numbers of a log."""
    return [int(line) for line in kept.split(b"\n") if len(line) == 8]


def flood(start_shim: StartShim, size: int, **spec: object) -> Shim:
    """A child that writes numbered lines of nine bytes, `size` bytes in all."""
    script = f"import sys\nfor i in range({size // 9}): sys.stdout.write('%08d\\n' % i)"
    shim: Shim = start_shim(argv=["python3", "-c", script], segment_bytes=64 * KIB, **spec)
    return shim


def test_head_and_tail_are_kept_and_what_was_between_is_told(start_shim: StartShim) -> None:
    """The first bytes, the newest rest; the digests on both sides of the gap are in the record."""
    shim = flood(start_shim, 4 * MIB, spool_bytes=MIB, head_bytes=200 * KIB, overflow="head_tail")
    record = shim.run()
    log = shim.log()
    kept = numbers(log.stdout)
    assert kept[0] == 0 and kept[-1] == 4 * MIB // 9 - 1
    assert len(log.holes) == 1
    gone = record["log"]["dropped"]
    assert (gone["start"], gone["end"]) == log.holes[0]
    assert log.holes[0][0] >= 200 * KIB, "the head stays"
    assert [(gone["before"], gone["last"])] == [(before.hex(), last.hex()) for before, last in log.joints]
    assert gone["segments"] + len(log.segments) == record["log"]["segments"]
    assert sum(size for _, size in log.segments) <= MIB + 64 * KIB
    assert record["log"]["chain"] == log.chain


def test_what_the_plane_has_goes_first_and_is_no_loss(start_shim: StartShim) -> None:
    """Trimmed segments make the room; nothing is told as dropped."""
    shim = flood(start_shim, 4 * MIB, spool_bytes=MIB, head_bytes=200 * KIB, overflow="head_tail")
    shim.controller.send(wire.TRIM, struct.pack("<Q", 1 << 40))
    record = shim.run()
    assert "dropped" not in record["log"]
    assert shim.log().segments[0][0] > 0


def test_a_writer_that_has_to_wait_waits_and_loses_nothing(start_shim: StartShim) -> None:
    """`block`: reading stops at the limit, goes on when the plane has taken some, and every byte is there once."""
    shim = flood(start_shim, 4 * MIB, spool_bytes=MIB, overflow="block")
    pid = shim.start()
    wait_for(lambda: blocked(pid), "a writer that waits")
    assert spooled(shim) <= MIB
    taken: dict[int, bytes] = {}

    def all_taken() -> bool:
        over = (shim.dir / "exit.json").exists()
        segments = sorted((shim.dir / "log").glob("*.seg"))
        for path in segments if over else segments[:-1]:
            if int(path.stem, 16) not in taken:
                taken[int(path.stem, 16)] = path.read_bytes()
        if taken:
            last = max(taken)
            shim.controller.send(wire.TRIM, struct.pack("<Q", last + len(taken[last])))
        return over

    wait_for(all_taken, "the end")
    whole = b"".join(
        payload for base in sorted(taken) for _, kind, payload in split_records(taken[base]) if kind == records.STDOUT
    )
    assert numbers(whole) == list(range(4 * MIB // 9))
    assert shim.exit()["streams"]["stdout"]["sha256"] == hashlib.sha256(whole).hexdigest()


def test_a_writer_that_waits_can_be_stopped_and_its_last_words_are_kept(start_shim: StartShim) -> None:
    """The ladder needs no room; what was in the pipe at the end is kept beyond the limit."""
    shim = flood(start_shim, 4 * MIB, spool_bytes=MIB, overflow="block")
    pid = shim.start()
    wait_for(lambda: blocked(pid), "a writer that waits")
    shim.stop()
    record = shim.exit()
    assert (record["verdict"], record["survivors"], record["drain"]) == ("stopped", 0, "eof")
    kept = numbers(shim.log().stdout)
    assert kept == list(range(len(kept))), "nothing is missing in front of the end"
    assert len(shim.log().stdout) == record["streams"]["stdout"]["bytes"]


def test_a_lower_limit_counts_from_the_next_record(start_shim: StartShim) -> None:
    """A host that runs short asks every spool to be smaller."""
    shim = flood(start_shim, 4 * MIB, spool_bytes=64 * MIB, head_bytes=100 * KIB, overflow="head_tail")
    shim.controller.send(wire.LIMIT, struct.pack("<Q", MIB))
    record = shim.run()
    assert record["log"]["dropped"]["segments"] > 0
    assert spooled(shim) <= MIB + 64 * KIB


def test_silence_ends_what_was_to_speak(start_shim: StartShim) -> None:
    """Counted from the last output: a slow speaker lives, a silent one ends, and the cause says which limit it was."""
    speaks = start_shim(argv=["sh", "-c", "for i in 1 2 3 4 5; do sleep .2; echo $i; done"], idle_ms=1500)
    silent = start_shim(argv=["sh", "-c", "echo once; sleep 60"], idle_ms=300)
    assert speaks.run()["verdict"] == "exited"
    record = silent.run()
    assert (record["verdict"], record["cause"]["kind"]) == ("timed_out", "idle")
    assert record["duration_ms"] >= 300
    assert silent.log().stdout == b"once\n"


def test_a_writer_that_waits_for_us_is_not_silent(start_shim: StartShim) -> None:
    """It would speak if it could."""
    shim = flood(start_shim, 4 * MIB, spool_bytes=MIB, overflow="block", idle_ms=300)
    pid = shim.start()
    wait_for(lambda: blocked(pid), "a writer that waits")
    with pytest.raises(TimeoutError):
        shim.exit(wait_s=1.0)
    shim.stop()
    assert shim.exit()["verdict"] == "stopped"


def test_events_go_beside_the_output(start_shim: StartShim) -> None:
    """The descriptor is named in the environment, its lines are records and have a digest of their own."""
    script = 'echo out; echo "{\\"a\\":1}" >&$LOCAL_RUNNER_EVENTS_FD; echo err >&2'
    shim = start_shim(argv=["bash", "-c", script], events=True)
    record = shim.run()
    log = shim.log()
    assert (log.stdout, log.stderr, log.streams[records.EVENT]) == (b"out\n", b"err\n", b'{"a":1}\n')
    assert record["streams"]["events"] == {"bytes": 8, "sha256": hashlib.sha256(b'{"a":1}\n').hexdigest()}


def test_without_events_there_is_no_descriptor(start_shim: StartShim) -> None:
    """Whoever did not ask has what every child has."""
    shim = start_shim(argv=["sh", "-c", "ls /proc/self/fd; echo ${LOCAL_RUNNER_EVENTS_FD-none}"])
    assert list(shim.run()["streams"]) == ["stdout", "stderr"]
    assert shim.log().stdout.split() == [b"0", b"1", b"2", b"3", b"none"], "3 is the directory that ls reads"


def blocked(pid: int) -> bool:
    """Whether a process waits for room in a pipe."""
    return "pipe_write" in Path(f"/proc/{pid}/wchan").read_text()


def spooled(shim: Shim) -> int:
    """Bytes of the log on disk."""
    return sum(path.stat().st_size for path in (shim.dir / "log").glob("*.seg"))
