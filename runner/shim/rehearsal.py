"""The fork server's rehearsal: a few attempts of `true`, played on a private stage before the first fork.

The interpreter fills caches as code runs: the type cache, types made ready, bytecode specialised after eight calls.
Filled in a shim each of them is a private copy of a page; filled before the fork they are shared by all. Measured
with 50 idle shims this saves a third of the private memory and of the page faults on the way to the child. When a
rehearsal is not possible nothing but that is lost.
"""

from __future__ import annotations

import _socket
import _struct
import posix as os

from runner.shim import files, guard, records, report, spec, system, wire
from runner.shim.system import signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

# CPython 3.11 specialises code at its eighth call.
ROUNDS: Final = 10
# Memory, so that no disk is waited for.
STAGE: Final = "/dev/shm"  # noqa: S108 - the folder made in it is private and gone before the first request
TURNS_MAX: Final = 40


def rehearse(warm: system.Warm, keep: list[int]) -> None:
    """Play `ROUNDS` attempts on a private stage and clear it away; the descriptors in `keep` stay open."""
    stage = f"{STAGE}/local-runner-{os.getpid()}"
    umask = os.umask(0o077)
    here = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for _ in range(ROUNDS):
            os.mkdir(stage, 0o700)
            try:
                _play(stage, warm)
            finally:
                _clear(stage)
    except OSError:
        pass  # no stage, no rehearsal: shims cost a little more
    finally:
        signals.set_wakeup_fd(-1)
        signals.signal(signals.SIGCHLD, signals.SIG_DFL)
        os.fchdir(here)
        os.umask(umask)
        system.close_all_but(keep)


def _play(stage: str, warm: system.Warm) -> None:
    dirfd = os.open(stage, os.O_RDONLY | os.O_DIRECTORY)
    files.replace(dirfd, "spec.json", files.encode(_spec()).encode())
    report.refuse_used_directory(dirfd)
    ours, theirs = _socket.socketpair()
    actor = guard.Guard(dirfd, theirs.detach(), warm)
    actor.prepare()
    assert actor.log is not None
    assert actor.tree is not None
    read_fd, write_fd = os.pipe()
    os.write(write_fd, b"line\n")
    actor.log.copy(read_fd, records.STDOUT, system.wall_ns(), system.boottime_ms())
    actor.tree.find()
    daemon = _socket.socket(_socket.AF_UNIX)
    daemon.connect(f"{stage}/s")
    daemon.send(wire.pack(wire.HELLO, _struct.pack("<HHQ", 1, 1, 1)))
    ours.send(wire.pack(wire.ARM, _struct.pack("<Q", 0)) + wire.pack(wire.RELEASE, b'{"SECRET":"eA=="}'))
    for _ in range(TURNS_MAX):
        actor.turn()
        if actor.exit_frame:
            break
    # Descriptors are closed by number afterwards; no object may close a number that is somebody else's by then.
    for link in actor.links.by_fd.values():
        link.sock.detach()
    if actor.links.listener is not None:
        actor.links.listener.detach()
    signals.set_wakeup_fd(-1)
    ours.close()
    daemon.close()
    for fd in (dirfd, read_fd, write_fd):
        os.close(fd)


def _spec() -> dict[str, files.Json]:
    return {
        "v": 1,
        "attempt": "ex_0.0",
        "cmd_id": "cmd_0",
        "argv": ["true"],
        "cwd": STAGE,
        "env": {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
        "secret_names": ["SECRET"],
        "cookie": "rehearsal",
        "timeout_ms": 1000,
        "grace_ms": 1000,
        "kill_wait_ms": 1000,
        "umask": 18,
        "rlimits": {},
        "segment_bytes": spec.SEGMENT_BYTES_DEFAULT,
        "spool_bytes": spec.SPOOL_BYTES_DEFAULT,
        "boot_id": "",
        "lease": None,
    }


def _clear(stage: str) -> None:
    for folder in (f"{stage}/log", stage):
        try:
            names = os.listdir(folder)
        except OSError:
            continue
        for name in names:
            if name != "log":
                os.unlink(f"{folder}/{name}")
        os.rmdir(folder)
