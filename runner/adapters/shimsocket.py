"""The socket of a shim, for daemons and for who attaches: it loads nothing of what a daemon needs."""

import os
import socket
from pathlib import Path


def dial(directory: Path) -> socket.socket:
    """Connect to the socket of an attempt, however long the path is. Never waits.

    Raises:
        BlockingIOError: so many wait there that nobody seems to take them: it may be asked again.
        OSError: nobody listens.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.connect(f"/proc/self/fd/{fd}/s")
    except OSError:
        sock.close()
        raise
    finally:
        os.close(fd)
    return sock
