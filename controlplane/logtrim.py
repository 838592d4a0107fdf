"""What of a stored log is given up: the beginning of a PTY's that has grown long, whole segments of it, whose room goes back to the disk.

The file stays as long as it was, with a hole at its beginning; readers are shown a gap there, and a proof names it as missing. The
row that names the gap is durable before a byte goes.
"""

import ctypes
import os
from pathlib import Path
from typing import Final

from controlplane import logseek
from controlplane.limits import PTY_LOG_BYTES
from controlplane.rows import LogRow

_KEEP_SIZE: Final = 1
_PUNCH_HOLE: Final = 2
_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)


def cut_of(row: LogRow, path: Path) -> int:
    """Where the segment begins that holds the first byte to be kept. Blocking. Raises OSError."""
    return logseek.segment_of(row, path, max(0, row.end - PTY_LOG_BYTES))


def punch(path: Path, end: int) -> bool:
    """Give the room of everything before `end` back; False where the file system cannot: then the bytes stay, unread. Blocking.

    Raises OSError when the file cannot be opened.
    """
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        return bool(_libc.fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, 0, end) == 0)
    finally:
        os.close(fd)
