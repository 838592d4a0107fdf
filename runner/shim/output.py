"""The log writer: copies the child's pipes into segment files as records, and never stops reading.

Rule 1. `end` counts every record that was made, kept or not: offsets are never reused.
Rule 2. What cannot be kept is a hole: the segment is sealed at its last whole record, the next starts behind it.
Rule 3. Stream digests are over what the child wrote, holes included; segment digests over what is on disk.
Rule 4. Output leaves the file system its floor: room that the journal needs is worth more than what a child says.
Rule 5. At the limit acked segments go first. Then `overflow` says: the middle goes (head_tail), the writer waits (block),
        or the newest is not kept (discard).
"""

from __future__ import annotations

import errno
import posix as os

from runner.shim import digest, records, spec, system
from runner.shim.counts import Dropped, Stream

# ruff: noqa: SIM105 - contextlib is more than a shim may import
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

# The disk refused, for now: a hole. Anything else is a mistake of ours and is raised.
NO_ROOM: Final = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG))
# A full disk is asked again this often, not once for each record.
RETRY_MS: Final = 250
# How much room the file system has is asked at most this often: a flood costs one call per MiB, silence none.
FLOOR_ASK_BYTES: Final = 1_048_576
FLOOR_ASK_MS: Final = 1_000
# Size and modes of a terminal, at the beginning of each segment.
PREFACE_BYTES_MAX: Final = 4_096
_OPEN: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW


class Log:
    """The segments of one attempt, written through the descriptor of `log/`."""

    def __init__(
        self,
        dirfd: int,
        attempt: bytes,
        *,
        segment_bytes: int,
        spool_bytes: int,
        warm: system.Warm,
        floor_bytes: int = 0,
    ) -> None:
        self.first = 0
        self.end = 0
        self.gone = False  # the directory was deleted: nothing can be kept any more
        self.segments = 0
        self.chain = records.NO_DIGEST
        self.dropped: Dropped | None = None
        self.streams = {kind: Stream(warm.digest.copy()) for kind in records.OUTPUTS[:2]}
        self._dirfd = dirfd
        self._attempt = attempt
        self._segment_bytes = segment_bytes
        self._spool_bytes = spool_bytes
        self._floor_bytes = floor_bytes
        self._overflow = spec.DISCARD
        self._head_bytes = 0
        self._empty = warm.digest
        self._asked_bytes = FLOOR_ASK_BYTES  # kept since the room was asked for
        self._ask_at = 0
        self._roomy = True
        self._digest = digest.SegmentDigest(warm.digest)
        self._fd = -1
        self._base = 0
        self._size = 0
        self._head = 0
        self._sealed: list[tuple[int, int, bytes]] = []  # base, size, digest
        self._heads = 0  # how many of them belong to the head
        self._below = records.NO_DIGEST  # of the segment before the oldest that is there
        self._spooled = 0
        self._trim = 0
        self._hole = False
        self._retry_at = 0
        self._preface: Callable[[int], bytes] | None = None
        self._slice(warm.buffer)

    def heed(self, wanted: spec.Spec) -> None:
        """What the spec says beyond sizes: floor, what goes at the limit, and whether there are events."""
        self._floor_bytes = wanted.floor_bytes
        self._overflow = wanted.overflow
        # A head that filled the spool would leave the tail no room.
        self._head_bytes = min(wanted.head_bytes, self._spool_bytes // 2)
        if wanted.events:
            self.streams[records.EVENT] = Stream(self._empty.copy())
        if wanted.tty is not None:
            self.streams = {records.PTY: Stream(self._empty.copy())}

    def begin_with(self, preface: Callable[[int], bytes]) -> None:
        """From now on each segment begins with the records that `preface` makes for a time."""
        self._preface = preface
        self._gather += PREFACE_BYTES_MAX

    def copy(self, fd: int, kind: int, unix_ns: int, now_ms: int) -> int:
        """Read once from the pipe `fd` into the log; returns the bytes read, 0 at its end, -1 when it is empty."""
        try:
            count = os.readv(fd, self._slots)
        except BlockingIOError:
            return -1
        if count == 0:
            return 0
        stream = self.streams[kind]
        stream.bytes += count
        sizes: list[int] = []
        left = count
        for slot in self._slots:
            length = min(left, self._payload_max)
            stream.digest.update(slot if length == self._payload_max else slot[:length])
            at = len(sizes) * self._stride
            records.pack_header_into(self._buffer, at, length, kind, unix_ns)
            sizes.append(records.HEADER_BYTES + length)
            left -= length
            if left == 0:
                break
        self._keep(self._buffer, sizes, unix_ns, now_ms)
        return count

    def gather(self, fd: int, unix_ns: int, now_ms: int) -> memoryview | None:
        """Read what the terminal `fd` has, as one record: its bytes (none at its end), None when it has nothing now."""
        slot, count = self._slots[0], 0
        while count < len(slot):
            try:
                got = os.readv(fd, [slot[count:]])
            except BlockingIOError:
                if count == 0:
                    return None
                break
            except OSError as exc:
                if exc.errno != errno.EIO:
                    raise
                break  # nobody has the other end open any more, and all that was written has been read
            count += got
        told = slot[:count]
        if count:
            stream = self.streams[records.PTY]
            stream.bytes += count
            stream.digest.update(told)
            records.pack_header_into(self._buffer, 0, count, records.PTY, unix_ns)
            self._keep(self._buffer, [records.HEADER_BYTES + count], unix_ns, now_ms)
        return told

    def note(self, record: bytes, unix_ns: int, now_ms: int) -> None:
        """Keep one record of ours, of a few bytes."""
        self._keep(memoryview(record), [len(record)], unix_ns, now_ms)

    def full(self) -> bool:
        """Whether the writer has to wait until something was trimmed."""
        if self._overflow != spec.BLOCK or self._hole or self._make_room(self._gather):
            return False
        # Only what is sealed can be given up, however little it is.
        if self._size > self._head:
            self._seal()
        return not self._make_room(self._gather)

    def lift(self) -> None:
        """Keep what still comes, whatever the limit says."""
        self._spool_bytes = 1 << 62

    def limit(self, spool_bytes: int) -> None:
        """Keep no more than this from now on; what is there above it goes when the next record needs room."""
        self._spool_bytes = min(self._spool_bytes, spool_bytes)
        self._head_bytes = min(self._head_bytes, self._spool_bytes // 2)
        self._heads = sum(base < self._head_bytes for base, _size, _digest in self._sealed)

    def finish(self, payload: bytes, unix_ns: int) -> None:
        """Write the exit record, whatever limit and floor say, and seal the log."""
        record = records.pack_record(records.EXIT, payload, unix_ns)
        self.lift()
        self._floor_bytes = 0
        self._hole = False
        self._keep(memoryview(record), [len(record)], unix_ns, self._retry_at)
        self._seal()

    def trim(self, offset: int) -> None:
        """Allow sealed segments below `offset` to be deleted when room is needed."""
        self._trim = max(self._trim, offset)
        if self._hole and self._make_room(self._resume_bytes()):
            self._retry_at = 0

    def sync(self) -> None:
        """Make every kept segment durable, as far as the disk can."""
        for base, _size, _digest in self._sealed:
            try:
                fd = os.open(records.segment_name(base), os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._dirfd)
            except OSError:
                continue
            try:
                os.fdatasync(fd)
            except OSError:
                pass
            finally:
                os.close(fd)
        try:
            os.fsync(self._dirfd)
        except OSError:
            return

    def _slice(self, buffer: bytearray) -> None:
        # A record must fit in a segment, so small segments make small records.
        header = len(records.segment_record(0, records.NO_DIGEST, self._attempt, 0))
        room = self._segment_bytes - header - records.HEADER_BYTES
        self._payload_max = min(records.PAYLOAD_MAX, room)
        self._stride = records.HEADER_BYTES + self._payload_max
        # The most that one read adds: its records, and a header for each segment that they begin.
        self._gather = system.GATHER_RECORDS * (self._stride + header)
        self._buffer = memoryview(buffer)
        self._slots = [
            self._buffer[at * self._stride + records.HEADER_BYTES : (at + 1) * self._stride]
            for at in range(system.GATHER_RECORDS)
        ]

    def _keep(self, view: memoryview, sizes: list[int], unix_ns: int, now_ms: int) -> None:
        at = done = 0
        while done < len(sizes):
            if self._fd < 0 and not self._open_segment(unix_ns, now_ms):
                break
            take, last = self._fitting(sizes, done)
            if last == done:
                self._seal()
                continue
            if not self._above_floor(now_ms, 0):
                self._begin_hole(now_ms + FLOOR_ASK_MS)
                break
            if not self._make_room(take):
                self._begin_hole(0)
                break
            written = self._write(view[at : at + take])
            if written < take:
                done, at = self._cut(view, sizes, done, at, written)
                self._begin_hole(now_ms + RETRY_MS)
                break
            self._account(view[at : at + take])
            at += take
            done = last
        self.end += sum(sizes[done:])

    def _fitting(self, sizes: list[int], done: int) -> tuple[int, int]:
        take = 0
        last = done
        while last < len(sizes):
            size = self._size + take + sizes[last]
            # The first record of a segment always goes in: the exit record may be larger than a small segment.
            if size > self._segment_bytes and not (last == done and self._size == self._head):
                break
            take += sizes[last]
            last += 1
        return take, last

    def _write(self, view: memoryview | bytes) -> int:
        written = 0
        while written < len(view):
            try:
                written += os.write(self._fd, view[written:])
            except OSError as exc:
                if exc.errno not in NO_ROOM:
                    raise
                break
        return written

    def _cut(self, view: memoryview, sizes: list[int], done: int, at: int, written: int) -> tuple[int, int]:
        """Take back the torn record at the end of a short write; the whole ones before it stay."""
        whole = 0
        while whole + sizes[done] <= written:
            whole += sizes[done]
            done += 1
        os.ftruncate(self._fd, self._size + whole)
        if whole:
            self._account(view[at : at + whole])
        return done, at + whole

    def _account(self, view: memoryview | bytes) -> None:
        self._digest.wrote(view)
        self._size += len(view)
        self._spooled += len(view)
        self._asked_bytes += len(view)
        self.end += len(view)

    def _open_segment(self, unix_ns: int, now_ms: int) -> bool:
        if self.gone or now_ms < self._retry_at or (self._hole and not self._make_room(self._resume_bytes())):
            return False
        # Not at the first byte above the floor, for the same reason as above the limit.
        if not self._above_floor(now_ms, self._resume_bytes() if self._hole else 0):
            self._begin_hole(now_ms + FLOOR_ASK_MS)
            return False
        try:
            self._fd = os.open(records.segment_name(self.end), _OPEN, 0o600, dir_fd=self._dirfd)
        except FileNotFoundError:
            self.gone = True
            return False
        except OSError as exc:
            if exc.errno not in NO_ROOM:
                raise
            self._begin_hole(now_ms + RETRY_MS)
            return False
        self._base = self.end
        self._size = self._head = 0
        self._digest.begin(self._fd)
        header = records.segment_record(self._base, self.chain, self._attempt, unix_ns)
        if self._preface is not None:
            header += self._preface(unix_ns)
        if not self._make_room(len(header)) or self._write(header) < len(header):
            self._begin_hole(now_ms + RETRY_MS)
            return False
        self._account(header)
        self._head = len(header)
        self._hole = False
        return True

    def _begin_hole(self, retry_at: int) -> None:
        self._hole = True
        self._retry_at = retry_at
        if self._fd >= 0 and self._size == self._head:
            # A segment without a record says nothing: it gives its offsets back.
            self._digest.finish()
            os.close(self._fd)
            self._fd = -1
            os.unlink(records.segment_name(self._base), dir_fd=self._dirfd)
            self._spooled -= self._size
            self.end = self._base
        else:
            self._seal()
        if retry_at:
            self._drop_trimmed()

    def _seal(self) -> None:
        if self._fd < 0:
            return
        self.chain = self._digest.finish()
        os.close(self._fd)
        self._fd = -1
        if self._base < self._head_bytes and self._heads == len(self._sealed):
            self._heads += 1
        self._sealed.append((self._base, self._size, self.chain))
        self.segments += 1

    def _resume_bytes(self) -> int:
        # Not at the first free byte: a log at its limit would become a row of one-record segments.
        return min(self._segment_bytes, self._spool_bytes // 4)

    def _above_floor(self, now_ms: int, more: int) -> bool:
        """Whether the file system has the floor and `more` free, as it said when it was last asked."""
        if not self._floor_bytes:
            return True
        if self._asked_bytes >= FLOOR_ASK_BYTES or now_ms >= self._ask_at:
            self._asked_bytes = 0
            self._ask_at = now_ms + FLOOR_ASK_MS
            try:
                told = os.fstatvfs(self._dirfd)
            except OSError:
                return self._roomy  # a disk that does not tell is one that refuses the write itself
            self._roomy = told.f_bavail * told.f_frsize >= self._floor_bytes + more
        return self._roomy

    def _make_room(self, size: int) -> bool:
        while self._spooled + size > self._spool_bytes:
            if not (self._drop_oldest() or self._drop_middle()):
                return False
        return True

    def _drop_middle(self) -> bool:
        if self._overflow != spec.HEAD_TAIL or self._heads >= len(self._sealed):
            return False
        before = self._sealed[self._heads - 1][2] if self._heads else self._below
        base, size, own = self._sealed[self._heads]
        self._delete(self._heads)
        if self.dropped is None:
            self.dropped = Dropped(base, before)
        self.dropped.end = base + size
        self.dropped.last = own
        self.dropped.segments += 1
        return True

    def _drop_trimmed(self) -> None:
        while self._drop_oldest():
            pass

    def _drop_oldest(self) -> bool:
        if not self._sealed or self._sealed[0][0] + self._sealed[0][1] > self._trim:
            return False
        self._below = self._sealed[0][2]
        self._delete(0)
        self._heads = max(0, self._heads - 1)
        return True

    def _delete(self, index: int) -> None:
        base, size, _digest = self._sealed.pop(index)
        try:
            os.unlink(records.segment_name(base), dir_fd=self._dirfd)
        except FileNotFoundError:
            pass  # somebody else made the room
        self._spooled -= size
        self.first = self._sealed[0][0] if self._sealed else self._base if self._fd >= 0 else self.end
