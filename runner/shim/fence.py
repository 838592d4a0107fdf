"""The fence of an execution: the daemon's word, in a file, that an attempt under a higher token may exist.

It is read once, right before the spawn. A shim that slept between its preparation and its release finds out here
that its time is over; what cannot be read is no permission.
"""

from __future__ import annotations

import posix as os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

# From the attempt's directory, `$STATE/x/<attempt>/`.
FENCES: Final = b"../../fences/"
# The digits of a u64 and the line's end; one byte more shows a file that is longer.
FENCE_BYTES_MAX: Final = 21
# A pipe in the file's place must not hold the shim up.
_READ: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def refusal(dirfd: int, execution: bytes | None, token: int) -> str:
    """Why the attempt in `dirfd`, which holds `token`, must not start; empty when nothing speaks against it."""
    # Without an execution's name there is nobody who could be its successor.
    if execution is None:
        return ""
    try:
        fd = os.open(FENCES + execution, _READ, dir_fd=dirfd)
    except FileNotFoundError:
        return ""
    except OSError as exc:
        return f"the fence cannot be read: {exc.strerror}"
    try:
        data = os.read(fd, FENCE_BYTES_MAX + 1)
    except OSError as exc:
        return f"the fence cannot be read: {exc.strerror}"
    finally:
        os.close(fd)
    if len(data) > FENCE_BYTES_MAX or data[-1:] != b"\n" or not data[:-1].isdigit():
        return "the fence cannot be read: it is not a token"
    fence = int(data)
    return f"token {token} is fenced by token {fence}" if fence > token else ""
