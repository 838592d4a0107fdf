"""The digest of the open segment.

SHA-256 runs twice over every byte of output: once for the stream, once for the segment. On one core the second
pass halves the throughput of a flood, so past a threshold it moves to a thread that reads the segment back from
the page cache. The thread starts only then, and after the child was spawned; a quiet shim has none.
"""

from __future__ import annotations

import _thread
import posix as os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _hashlib import HASH as Hash
    from typing import Final

# Below this a thread costs more than it saves.
THREAD_AFTER_BYTES: Final = 4_194_304
READ_BACK_BYTES: Final = 262_144
# Waking the thread for less spends more on switching than on hashing.
WAKE_BYTES: Final = 1_048_576


class SegmentDigest:
    """SHA-256 of a growing file, computed here or behind."""

    def __init__(self, blank: Hash) -> None:
        self._blank = blank
        self._hash = blank.copy()
        self._fd = -1
        self._done = 0
        self._size = 0
        self._seen = 0
        self._busy = False
        self._threaded = False

    def begin(self, fd: int) -> None:
        """Start anew for the empty segment open (readable) as `fd`."""
        self._hash = self._blank.copy()
        self._fd = fd
        self._done = self._size = 0

    def wrote(self, view: memoryview | bytes) -> None:
        """Take the bytes that were just written at the end of the segment."""
        self._size += len(view)
        self._seen += len(view)
        if not self._threaded:
            self._hash.update(view)
            self._done = self._size
            if self._seen >= THREAD_AFTER_BYTES:
                self._start()
            return
        if self._busy and self._idle.acquire(False):
            self._busy = False
        if not self._busy and self._size - self._done >= WAKE_BYTES:
            self._wake()

    def finish(self) -> bytes:
        """The digest of the whole segment. Raises OSError when it cannot be read back."""
        if self._busy:
            self._idle.acquire()
            self._busy = False
        if self._done < self._size:
            self._catch_up(self._size)
        return self._hash.digest()

    def _start(self) -> None:
        self._back = memoryview(bytearray(READ_BACK_BYTES))
        self._work = _thread.allocate_lock()
        self._idle = _thread.allocate_lock()
        self._work.acquire()
        self._idle.acquire()
        try:
            _thread.start_new_thread(self._run, ())
        except RuntimeError:
            self._seen = 0  # no thread to be had: stay inline, ask again after as many bytes
            return
        self._threaded = True

    def _wake(self) -> None:
        self._goal = self._size
        self._busy = True
        self._work.release()

    def _run(self) -> None:
        while True:
            self._work.acquire()
            try:
                self._catch_up(self._goal)
            except OSError:
                # The main loop meets the same error in `finish`, where it can answer it.
                pass
            finally:
                self._idle.release()

    def _catch_up(self, goal: int) -> None:
        view = self._back
        while self._done < goal:
            count = os.preadv(self._fd, [view[: min(READ_BACK_BYTES, goal - self._done)]], self._done)
            if count == 0:
                raise OSError("segment is shorter than what was written")
            self._hash.update(view[:count])
            self._done += count
