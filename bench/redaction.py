"""What masking costs: a log on disk read as it would go up, plain and with secrets of several numbers and kinds; MiB/s of one core.

Usage: .venv/bin/python bench/redaction.py [--mib 64] [--json]
"""

import argparse
import base64
import json
import os
import random
import statistics
import string
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from protocol.limits import DATA_SLICE_BYTES_MAX, KIB, MIB, SEGMENT_BYTES
from protocol.records import RecordKind, encode_record
from runner.adapters.redacted import RedactedReader
from runner.adapters.spool import LogReader, Slice, SpoolReader
from runner.core.needles import Needles, needles_of

ROUNDS = 3
SEED = 4
LINE = b"2026-11-21T21:54:00Z INFO  worker-%03d compiled module %06d of the project in %4d ms\n"


def texts() -> Iterator[tuple[str, Callable[[int], bytes]]]:
    """Kinds of output: a name, and so many bytes of it."""
    dice = random.Random(SEED)
    yield (
        "a build's log",
        lambda size: b"".join(LINE % (at % 97, at, dice.randrange(9999)) for at in range(size // len(LINE) + 1))[:size],
    )
    yield "base64", lambda size: base64.b64encode(dice.randbytes(size))[:size]
    yield "noise", dice.randbytes
    yield "y", lambda size: b"y\n" * (size // 2)


def write_log(directory: Path, text: bytes, mib: int, payload: int) -> None:
    """A log of that text, over and over."""
    directory.mkdir()
    end = base = 0
    at = 0
    file = (directory / f"{base:016x}.seg").open("wb")
    while end < mib * MIB:
        record = encode_record(RecordKind.STDOUT, text[at : at + payload] or text[:payload], 1)
        at = at + payload if at + payload < len(text) else 0
        if end - base + len(record) > SEGMENT_BYTES:
            file.close()
            base = end
            file = (directory / f"{base:016x}.seg").open("wb")
        file.write(record)
        end += len(record)
    file.close()


def speed(make: Callable[[], LogReader]) -> float:
    """MiB/s, the median of some rounds."""
    rates = []
    for _ in range(ROUNDS):
        reader, offset = make(), 0
        began = time.process_time()
        while (found := reader.read(offset, DATA_SLICE_BYTES_MAX)) is not None:
            assert isinstance(found, Slice)
            offset = found.end
        rates.append(offset / MIB / (time.process_time() - began))
        reader.close()
    return statistics.median(rates)


def needles(count: int) -> Needles:
    """Of so many random tokens, each in all of its spellings."""
    dice = random.Random(SEED)
    return needles_of(
        ["".join(dice.choices(string.ascii_letters + string.digits, k=32)).encode() for _ in range(count)]
    )


def measured(mib: int) -> list[dict[str, str | int | float]]:
    """One row for each kind of output and size of records."""
    rows: list[dict[str, str | int | float]] = []
    with tempfile.TemporaryDirectory(prefix="runner-bench-", dir=os.environ.get("TMPDIR")) as home:
        for name, make in texts():
            for payload in (64 * KIB, 80):
                log = Path(home) / f"{len(rows)}"
                write_log(log, make(4 * MIB), mib if payload > KIB else max(1, mib // 8), payload)
                row: dict[str, str | int | float] = {"output": name, "record": payload}
                row["plain"] = speed(lambda log=log: SpoolReader(log))  # type: ignore[misc]
                for count in (1, 8, 50):
                    wanted = needles(count)
                    row[f"{count} secrets, {len(wanted.spellings)} needles"] = speed(
                        lambda log=log, wanted=wanted: RedactedReader(log, wanted, ended=True)  # type: ignore[misc]
                    )
                rows.append(row)
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    wanted = parser.parse_args()
    rows = measured(wanted.mib)
    if wanted.json:
        print(json.dumps(rows))
        return
    for row in rows:
        rates = (f"{name} {rate:.0f} MiB/s" for name, rate in row.items() if isinstance(rate, float))
        print(f"{row['output']}, records of {row['record']} bytes: {', '.join(rates)}")


if __name__ == "__main__":
    main()
