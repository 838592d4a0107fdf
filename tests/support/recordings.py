"""What real programs write to a real terminal, recorded as the log of a PTY."""

import json
import os
import random
import select
import shutil
import struct
import time
from collections.abc import Iterable
from pathlib import Path

import ptyprocess
import pytest

from protocol.records import Record, RecordKind

ROWS, COLS = 24, 80
REST_S = 0.12
"""A program that wrote nothing for so long waits for a key."""
ANSWER_S = 10.0


def record(argv: list[str], keys: Iterable[bytes], home: Path, *, rows: int = ROWS, cols: int = COLS) -> bytes:
    """What `argv` writes while `keys` are typed, one behind the other, each when it is at rest."""
    if shutil.which(argv[0]) is None:
        pytest.skip(f"{argv[0]} is not installed")
    env = {
        "TERM": "xterm-256color", "PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8", "TMUX_TMPDIR": str(home),
    }  # fmt: skip
    child = ptyprocess.PtyProcess.spawn(argv, cwd=str(home), env=env, dimensions=(rows, cols))
    said = bytearray()
    try:
        _read(child, said)
        for key in keys:
            child.write(key)
            _read(child, said)
    finally:
        child.close(force=True)
    return bytes(said)


def _read(child: ptyprocess.PtyProcess, said: bytearray) -> None:
    deadline, begun = time.monotonic() + ANSWER_S, len(said)
    while time.monotonic() < deadline:
        if not select.select([child.fd], [], [], ANSWER_S if len(said) == begun else REST_S)[0]:
            return
        try:
            said += child.read(65536)
        except EOFError:
            return


def as_log(
    data: bytes,
    seed: int = 1,
    *,
    start: int = 0,
    rows: int = ROWS,
    cols: int = COLS,
    modes: dict[str, bool] | None = None,
) -> list[Record]:
    """A log of these bytes: one segment from `start` on, in records of any length."""
    cuts = random.Random(seed)
    marker = json.dumps({"modes": modes or {}, "keypad": False}).encode()
    found = [Record(start, RecordKind.SEGMENT, 0, bytes(48))]
    found.append(Record(found[-1].end, RecordKind.RESIZE, 0, struct.pack("<HH", rows, cols)))
    found.append(Record(found[-1].end, RecordKind.MARKER, 0, marker))
    at = 0
    while at < len(data):
        length = cuts.choice((1, 7, 100, 4000))
        found.append(Record(found[-1].end, RecordKind.PTY, 0, data[at : at + length]))
        at += length
    return found
