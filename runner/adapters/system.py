"""The machine: its clocks and entropy, its processes' identities, the lock on the state directory, and systemd's ear."""

import contextlib
import fcntl
import os
import resource
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from runner.core.inputs import Now
from runner.errors import AnotherDaemon, ConfigError

BOOT_ID_FILE: Final = Path("/proc/sys/kernel/random/boot_id")
PID_BYTES_MAX: Final = 32
LOCK_TRIES: Final = 5
LOCK_PAUSE_S: Final = 0.02
"""`runner doctor` holds the lock for microseconds to see whether it is held: that is no other daemon."""
_STAT_BYTES_MAX: Final = 4096
"""/proc/PID/stat has about 350 bytes."""
_START_FIELD: Final = 22
_FIRST_FIELD_BEHIND_NAME: Final = 3
_LOCK_MODE: Final = 0o600


class SystemClock:
    """The port `Clock`: wall time, CLOCK_BOOTTIME (goes on while the machine sleeps) and the kernel's random bytes."""

    def __init__(self) -> None:
        self._boot_id = BOOT_ID_FILE.read_text("ascii").strip()

    def now(self) -> Now:
        """Read both clocks, in milliseconds."""
        return Now(time.time_ns() // 1_000_000, time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000)

    def entropy(self, count: int) -> bytes:
        """`count` random bytes."""
        return os.urandom(count)

    @property
    def boot_id(self) -> str:
        """This boot, as the kernel names it."""
        return self._boot_id


def process_start(pid: int) -> int | None:
    """When a process began: field 22 of /proc/PID/stat, in clock ticks since boot. None when there is no such process."""
    try:
        fd = os.open(f"/proc/{pid:d}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        # The process may end between the two calls.
        text = os.read(fd, _STAT_BYTES_MAX)
    except ProcessLookupError:
        return None
    finally:
        os.close(fd)
    # The name, in parentheses, may itself hold spaces and parentheses: count from the last one.
    behind = text[text.rindex(b")") + 2 :].split()
    return int(behind[_START_FIELD - _FIRST_FIELD_BEHIND_NAME])


class StateLock:
    """At most one daemon per state directory: an flock on `<state>/runner.lock`, which tells the pid of its holder."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    def acquire(self) -> None:
        """Take it, or raise AnotherDaemon (ConfigError when the file cannot be made)."""
        assert self._fd is None, "a lock is taken once"
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, _LOCK_MODE)
        except OSError as exc:
            raise ConfigError(str(self._path), "", f"a file that can be written ({exc.strerror})") from exc
        try:
            _lock(fd)
            os.ftruncate(fd, 0)
            os.pwrite(fd, b"%d\n" % os.getpid(), 0)
        except BlockingIOError:
            holder = _pid(os.pread(fd, PID_BYTES_MAX, 0))
            os.close(fd)
            raise AnotherDaemon(holder, str(self._path.parent)) from None
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd

    def release(self) -> None:
        """Give it back. The file stays: who removes it may remove another's lock."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _lock(fd: int) -> None:
    """Take it. Raises BlockingIOError when somebody holds it for longer than a look takes."""
    for _ in range(LOCK_TRIES - 1):
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(LOCK_PAUSE_S)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _pid(content: bytes) -> int | None:
    text = content.strip()
    return int(text) if text.isdigit() else None


def make_private(directory: Path) -> None:
    """Make a directory that is its owner's alone, unless it is there. Raises ConfigError where none can be."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(str(directory), "", f"a directory that can be made ({exc.strerror})") from exc


def raise_fd_limit() -> int:
    """Lift the soft limit of open files to the hard one; returns it. Children get the old one back from their shim."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # Where the hard limit is infinite the kernel's own maximum is less, and the soft one stays.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def sd_notify(state: str) -> bool:
    """Tell systemd (`READY=1`, `STOPPING=1`, `STATUS=…`). False when nobody listens, which is never an error."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as ear:
        try:
            ear.connect(address)
            ear.sendall(state.encode())
        except OSError:
            return False
    return True
