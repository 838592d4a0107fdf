"""The log on a disk that is full, limited or gone: output is drained, holes are shown, endings are told."""

from __future__ import annotations

import hashlib
import itertools
import os
import resource
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runner.shim import wire
from tests.support.shim import ForkServer, Shim, alive, wait_for

StartShim = Callable[..., Shim]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one mebibyte."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small tmpfs")
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_makes_a_hole_and_stops_nothing(start_shim: StartShim, small_disk: Path) -> None:
    """The child is drained to its end, counted and digested; the records that fit are whole."""
    shim = start_shim(small_disk, argv=["head", "-c", "5000000", "/dev/zero"], segment_bytes=200_000)
    record = shim.run()
    assert (record["verdict"], record["code"]) == ("exited", 0)
    assert record["streams"]["stdout"] == {"bytes": 5_000_000, "sha256": hashlib.sha256(bytes(5_000_000)).hexdigest()}
    log = shim.log()
    assert 0 < len(log.stdout) < 1_048_576
    assert record["log"]["end"] > 5_000_000
    assert shim.exit_file() == record


def test_output_goes_on_when_the_disk_has_room_again(start_shim: StartShim, small_disk: Path) -> None:
    """After the hole the log continues at the offset that is reached, and the exit record is there."""
    ballast = small_disk / "ballast"
    # One for each wait: a reader that opens the same one again may meet the writer it has already heard.
    first, second = small_disk / "first", small_disk / "second"
    os.mkfifo(first)
    os.mkfifo(second)
    shim = start_shim(
        small_disk,
        argv=["sh", "-c", "echo first; read x < first; echo lost; read x < second; echo last"],
        cwd=str(small_disk),
    )
    shim.start()
    shim.wait_log(lambda log: log.stdout == b"first\n", "the first line")
    fill(ballast)
    # The open segment's last page has room: fill it through the log itself, then lose a line.
    shim.controller.send(wire.ARM, struct.pack("<Q", 4_200))
    first.write_text("go\n")
    shim.wait_log(lambda log: b"lost" in log.stdout or log.holes, "the second line")
    ballast.unlink()
    second.write_text("go\n")
    record = shim.exit()
    log = shim.log()
    assert log.stdout.endswith(b"last\n")
    assert log.exit["code"] == 0
    assert record["log"]["end"] == log.end


def fill(path: Path) -> None:
    """Fill the disk with one file."""
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


def test_a_file_size_limit_is_a_full_disk(tmp_path: Path) -> None:
    """EFBIG ends a segment at its last whole record; the log goes on in the next."""
    server = ForkServer()
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    shim = Shim(tmp_path, server, argv=["head", "-c", "1000000", "/dev/zero"])
    try:
        record = shim.run()
        log = shim.log()
        assert record["streams"]["stdout"]["bytes"] == 1_000_000
        assert log.holes
        assert all(size <= 100_000 for _base, size in log.segments)
        assert record["log"] == {"end": log.end, "segments": len(log.segments), "chain": log.chain}
        assert log.exit["code"] == 0
    finally:
        shim.close()
        server.close()


def test_the_spool_limit_makes_a_hole_and_the_exit_record_follows(start_shim: StartShim) -> None:
    """Beyond the limit new output is dropped from the log, never from the counts."""
    shim = start_shim(argv=["head", "-c", "3000000", "/dev/zero"], spool_bytes=1_000_000, segment_bytes=100_000)
    record = shim.run()
    log = shim.log()
    assert record["streams"]["stdout"]["bytes"] == 3_000_000
    assert 700_000 < len(log.stdout) <= 1_000_000
    assert sum(size for _base, size in log.segments[:-1]) <= 1_000_000
    assert len(log.holes) == 1
    assert log.exit["verdict"] == "exited"
    assert record["log"] == {"end": log.end, "segments": len(log.segments), "chain": log.chain}


@pytest.mark.parametrize("spool_bytes", [0, 100, 4_000])
def test_a_tiny_spool_still_holds_the_exit_record(start_shim: StartShim, spool_bytes: int) -> None:
    """The end is told in the log even when no output can be kept."""
    shim = start_shim(argv=["head", "-c", "50000", "/dev/zero"], spool_bytes=spool_bytes, segment_bytes=2_000)
    record = shim.run()
    log = shim.log()
    assert (log.exit["code"], record["streams"]["stdout"]["bytes"]) == (0, 50_000)
    assert len(log.stdout) <= spool_bytes
    assert record["log"] == {"end": log.end, "segments": len(log.segments), "chain": log.chain}


def test_trimmed_segments_make_room(start_shim: StartShim, tmp_path: Path) -> None:
    """Segments below TRIM go, oldest first, only over the limit; the log goes on without a hole."""
    folder = tmp_path / "work"
    folder.mkdir()
    os.mkfifo(folder / "first")
    os.mkfifo(folder / "second")
    shim = start_shim(
        argv=["sh", "-c", "head -c 400000 /dev/zero; read x < first; head -c 400000 /dev/zero; read x < second"],
        cwd=str(folder),
        spool_bytes=500_000,
        segment_bytes=100_000,
    )
    shim.start()
    shim.wait_log(lambda log: len(log.stdout) == 400_000, "the first half")
    before = [base for base, _size in shim.log().segments]
    shim.controller.send(wire.TRIM, struct.pack("<Q", 1 << 40))
    daemon = shim.connect()
    daemon.hello()
    assert struct.unpack_from("<HBQ", daemon.wait(wire.WELCOME))[2] == 0, "nothing is deleted below the limit"
    (folder / "first").write_text("go\n")
    daemon.send(wire.ARM, struct.pack("<Q", 790_000))
    daemon.wait(wire.BELL)
    daemon.hello()
    first = struct.unpack_from("<HBQ", daemon.wait(wire.WELCOME))[2]
    kept = sorted(int(path.stem, 16) for path in (shim.dir / "log").iterdir())
    assert kept[0] == first > 0
    assert not set(before[:2]) & set(kept)
    (folder / "second").write_text("go\n")
    daemon.wait(wire.EXIT)
    daemon.close()
    sizes = [(int(path.stem, 16), path.stat().st_size) for path in sorted((shim.dir / "log").iterdir())]
    assert all(base + size == after for (base, size), (after, _size) in itertools.pairwise(sizes))


def test_a_deleted_directory_ends_the_tree(start_shim: StartShim) -> None:
    """Nobody can find a shim without its directory: it ends its tree and itself, and tells who still listens."""
    shim = start_shim(argv=["sh", "-c", "sleep 60 & sleep 60"], grace_ms=5_000)
    pid = shim.start()
    wait_for(lambda: (shim.dir / "exit.json.tmp").exists(), "the last file that a shim makes before its start")
    shutil.rmtree(shim.dir)
    shim.controller.send(wire.ARM, struct.pack("<Q", 0))  # any event makes it look
    record = shim.exit()
    assert (record["cause"]["kind"], record["verdict"]) == ("shim_failed", "stopped")
    assert "deleted" in record["cause"]["detail"]
    shim.wait_gone()
    assert not alive(pid)


def test_a_deleted_log_directory_ends_the_tree(start_shim: StartShim) -> None:
    """Output that can never be kept again is the shim's failure, not a hole."""
    shim = start_shim(argv=["sh", "-c", "echo a; read x < /dev/null; yes"], segment_bytes=4096, grace_ms=5_000)
    wait_for(lambda: (shim.dir / "exit.json.tmp").exists(), "the last file that a shim makes before its start")
    shutil.rmtree(shim.dir / "log")
    record = shim.run()
    assert (record["cause"]["kind"], record["verdict"]) == ("shim_failed", "stopped")
    assert record["streams"]["stdout"]["bytes"] > 0


def test_a_shim_that_fails_ends_its_tree_and_leaves_a_trace(tmp_path: Path) -> None:
    """A defect inside the loop ends in the ladder, an exit record and a traceback."""
    server = ForkServer()
    folder = tmp_path / "work"
    folder.mkdir()
    os.mkfifo(folder / "fifo")
    script = "sleep 60 & read x < fifo; echo output; sleep 60"
    shim = Shim(tmp_path, server, argv=["sh", "-c", script], cwd=str(folder), grace_ms=5_000)
    try:
        pid = shim.start()
        # A directory where the first segment should be is a failure that no code path expects.
        (shim.dir / "log" / f"{0:016x}.seg").mkdir()
        (folder / "fifo").write_text("go\n")
        record = shim.exit()
        assert (record["cause"]["kind"], record["verdict"]) == ("shim_failed", "stopped")
        assert record["survivors"] == 0
        assert shim.exit_file() == record
        assert not alive(pid)
        assert "FileExistsError" in (shim.dir / "shim.err").read_text()
    finally:
        shim.close()
        server.close()
