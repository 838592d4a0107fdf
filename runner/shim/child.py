"""Starting the child: environment, directory, limits, `posix_spawn`, and the errors that come before it runs.

The shim takes the child's umask, limits and directory upon itself for the length of one call, because
`posix_spawn` can set none of them, and takes its own back afterwards.
"""

from __future__ import annotations

import _stat as stat
import errno
import fcntl
import posix as os
import resource

from runner.shim import system, terminal
from runner.shim.spec import EVENTS_FD
from runner.shim.system import signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from runner.shim.spec import Spec

    _Actions = list[tuple[int, int, str, int, int] | tuple[int, int, int]]

DEFAULT_PATH: Final = b"/usr/local/bin:/usr/bin:/bin"
SHIM_UMASK: Final = 0o077
OOM_SCORE_ADJ: Final = "/proc/self/oom_score_adj"
# A flood gets a larger pipe when it shows; every pipe large from the start would use up the user's pipe budget
# (pipe-user-pages-soft, 64 MiB) with 32 children and shrink everybody else's pipes to two pages.
PIPE_BYTES: Final = (1_048_576, 262_144)


class SpawnError(Exception):
    """The child could not be started; `reason` is a stable code of `exec_failed`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class Child:
    """A started child and our ends: of its pipes, output by descriptor there and stdin (-1: /dev/null), or of its terminal (-1: none)."""

    __slots__ = ("master_fd", "outputs", "pid", "start", "started_ms", "started_ns", "stdin_fd")

    def __init__(
        self, pid: int, outputs: dict[int, int], stdin_fd: int, started_ns: int, started_ms: int, master_fd: int = -1
    ) -> None:
        self.pid = pid
        self.start = system.start_time(pid)
        self.started_ns = started_ns
        self.started_ms = started_ms
        self.outputs = outputs
        self.stdin_fd = stdin_fd
        self.master_fd = master_fd


def spawn(spec: Spec, env: dict[bytes, bytes]) -> Child:
    """Start the child of `spec` with exactly `env`. Raises SpawnError when it never ran."""
    return _spawn_on_pipes(spec, env) if spec.tty is None else _spawn_on_terminal(spec, env)


def _spawn_on_terminal(spec: Spec, env: dict[bytes, bytes]) -> Child:
    assert spec.tty is not None
    try:
        master, slave, name = terminal.open_pair(spec.tty)
    except OSError as exc:
        raise SpawnError("SPAWN_FAILED", f"terminal: {exc.strerror}") from exc
    # The leader of a session that has no terminal yet gets the one that it opens.
    actions: _Actions = [
        (os.POSIX_SPAWN_OPEN, 0, name, os.O_RDWR, 0),
        (os.POSIX_SPAWN_DUP2, 0, 1),
        (os.POSIX_SPAWN_DUP2, 0, 2),
    ]
    try:
        started_ns, started_ms = system.wall_ns(), system.boottime_ms()
        pid = _spawn_within(spec, env, actions)
    except BaseException:
        os.close(master)
        raise
    finally:
        # Until the child has it somebody must: a terminal whose other end was never open tells its end at once.
        os.close(slave)
    return Child(pid, {}, -1, started_ns, started_ms, master)


def _spawn_on_pipes(spec: Spec, env: dict[bytes, bytes]) -> Child:
    ours: dict[int, int] = {}
    theirs: dict[int, int] = {}
    try:
        for target in ((0,) if spec.stdin else ()) + (1, 2) + ((EVENTS_FD,) if spec.events else ()):
            read, write = os.pipe2(os.O_CLOEXEC)
            ours[target], theirs[target] = (write, read) if target == 0 else (read, write)
            os.set_blocking(ours[target], False)
        started_ns, started_ms = system.wall_ns(), system.boottime_ms()
        pid = _spawn_within(spec, env, _onto(theirs))
    except BaseException as exc:
        for fd in (*ours.values(), *theirs.values()):
            os.close(fd)
        if isinstance(exc, OSError):
            raise SpawnError("SPAWN_FAILED", f"pipe: {exc.strerror}") from exc
        raise
    for fd in theirs.values():
        os.close(fd)
    stdin_fd = ours.pop(0, -1)
    return Child(pid, ours, stdin_fd, started_ns, started_ms)


def enlarge_pipe(fd: int) -> None:
    """Give a flooding pipe more room, as much as the kernel allows."""
    for size in PIPE_BYTES:
        try:
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, size)
        except OSError:
            continue
        return


def resolve(argv0: bytes, env: dict[bytes, bytes]) -> bytes:
    """The file that `argv0` names in the child's PATH, seen from the current directory. Raises SpawnError."""
    if b"/" in argv0:
        candidates = [argv0]
    else:
        folders = env.get(b"PATH", DEFAULT_PATH).split(b":")
        candidates = [(folder or b".") + b"/" + argv0 for folder in folders]
    found = ""
    for path in candidates:
        try:
            mode = os.stat(path).st_mode
        except PermissionError:
            found = found or "a folder on the way may not be searched"
            continue
        except (OSError, ValueError):
            continue
        if stat.S_ISREG(mode) and os.access(path, os.X_OK):
            return path
        found = f"{_shown(path)} is no file that may be executed"
    if found:
        raise SpawnError("EXEC_NOT_EXECUTABLE", found)
    raise SpawnError("EXEC_NOT_FOUND", f"{_shown(argv0)} was not found")


def _onto(pipes: dict[int, int]) -> _Actions:
    """What puts the ends of pipes where the child looks for them, and /dev/null where it has no stdin."""
    # In this order no descriptor is overwritten before it was duplicated: ours are 3 or higher.
    actions: _Actions = [(os.POSIX_SPAWN_DUP2, fd, target) for target, fd in pipes.items()]
    if 0 not in pipes:
        actions.append((os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0))
    return actions


def _spawn_within(spec: Spec, env: dict[bytes, bytes], actions: _Actions) -> int:
    try:
        os.chdir(spec.cwd)
    except OSError as exc:
        raise SpawnError("CWD_MISSING", f"{_shown(spec.cwd)}: {exc.strerror}") from exc
    oom = _swap_oom_score("0")
    limits: list[tuple[int, tuple[int, int]]] = []
    os.umask(spec.umask)
    try:
        path = resolve(spec.argv[0] if spec.program is None else spec.program, env)
        lowered = _lower_limits(spec.rlimits, limits)
        pid = _posix_spawn(path, spec.argv, env, actions)
        for number, pair in lowered:
            _limit_child(pid, number, pair)
    finally:
        for number, pair in limits:
            resource.setrlimit(number, pair)
        os.umask(SHIM_UMASK)
        if oom is not None:
            _swap_oom_score(oom)
        os.chdir("/")
    return pid


def _posix_spawn(path: bytes, argv: list[bytes], env: dict[bytes, bytes], actions: _Actions) -> int:
    try:
        return os.posix_spawn(
            path,
            argv,
            env,
            file_actions=actions,
            setsid=True,
            setsigmask=(),
            setsigdef=signals.valid_signals(),
        )
    except OSError as exc:
        text = f"{_shown(path)}: {exc.strerror}"
        if exc.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELIBBAD):
            # The file is there, so it is the interpreter it names that is not.
            raise SpawnError("EXEC_NOT_EXECUTABLE", text + " (its interpreter is missing)") from exc
        if exc.errno in (errno.EACCES, errno.ENOEXEC, errno.EPERM, errno.EISDIR):
            raise SpawnError("EXEC_NOT_EXECUTABLE", text) from exc
        raise SpawnError("SPAWN_FAILED", text) from exc


def _lower_limits(
    wanted: list[tuple[int, int, int]], limits: list[tuple[int, tuple[int, int]]]
) -> list[tuple[int, tuple[int, int]]]:
    """Take the child's limits; what must be undone goes to `limits`, what only the child can take is returned.

    A hard limit below ours could never be raised again, so we take the soft one and the child gets the hard one
    right after it was spawned.
    """
    lowered = []
    for number, soft, hard in wanted:
        try:
            ours = resource.getrlimit(number)
            keep_hard = hard != ours[1] and (hard != -1 and (ours[1] == -1 or hard < ours[1]))
            limits.append((number, ours))
            resource.setrlimit(number, (soft, ours[1] if keep_hard else hard))
        except (OSError, ValueError) as exc:
            raise SpawnError("SPAWN_FAILED", f"rlimit {number} cannot be set to {soft}:{hard}") from exc
        if keep_hard:
            lowered.append((number, (soft, hard)))
    return lowered


def _limit_child(pid: int, number: int, pair: tuple[int, int]) -> None:
    try:
        resource.prlimit(pid, number, pair)
    except (OSError, ValueError):
        return  # it has already ended, or has gained rights of its own


def _swap_oom_score(value: str) -> str | None:
    """Set our `oom_score_adj`; returns the old value when it was another and the kernel agreed."""
    try:
        old = system.read_text(OOM_SCORE_ADJ).strip()
        if old == value:
            return None
        fd = os.open(OOM_SCORE_ADJ, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)
    except OSError:
        return None
    return old


def _shown(path: bytes) -> str:
    return path.decode("utf-8", "backslashreplace")
