"""What a shim tells about its attempt: `meta.json`, the exit object, and what they are made of."""

from __future__ import annotations

import posix as os

from runner.shim import files, process, records, system, tree

# ruff: noqa: SIM105 - contextlib is more than a shim may import
TYPE_CHECKING = False
if TYPE_CHECKING:
    import resource
    from typing import Final

    from runner.shim.child import Child
    from runner.shim.files import Json
    from runner.shim.machine import Machine
    from runner.shim.output import Log
    from runner.shim.process import Process

META_NAME: Final = "meta.json"
EXIT_NAME: Final = "exit.json"
PROTO_RANGE: Final = (1, 1)
# Evidence of a tree that was not ended: enough to know what it is, and the record stays within what was reserved.
LEFT_MAX: Final = 32
_NAMES: Final = {records.STDOUT: "stdout", records.STDERR: "stderr", records.PTY: "pty", records.EVENT: "events"}


class UsedDirectoryError(Exception):
    """The directory belongs to an attempt that was already released: running it again could do its work twice."""


class Story:
    """The facts of one attempt as they become known."""

    def __init__(self, dirfd: int, boot_id: str) -> None:
        self.pid = os.getpid()
        self.start = system.start_time(self.pid)
        # Until the spec is read the directory's name is what we are called.
        self.attempt = os.readlink(b"/proc/self/fd/%d" % dirfd).rpartition(b"/")[2]
        self.child: Child | None = None
        self.status: int | None = None
        self.ended_ns = 0
        self.ended_ms = 0
        self._dirfd = dirfd
        self._boot_id = boot_id
        self._usage: resource.struct_rusage | None = None
        self._swept: dict[tuple[str, int], set[tuple[int, int]]] = {}
        self._tiers: list[str] = []
        self._remains: list[Json] = []
        self._outlived: list[Json] = []

    def write_meta(self, phase: str) -> None:
        """Put `meta.json` of `phase` in place. Raises OSError."""
        started = self.child
        meta: dict[str, Json] = {
            "v": 1,
            "attempt": _text(self.attempt),
            "boot_id": self._boot_id,
            "phase": phase,
            "proto": list(PROTO_RANGE),
            "shim": {"pid": self.pid, "start": self.start},
            "child": {"pid": started.pid, "start": started.start} if started else None,
            "started_ns": started.started_ns if started else 0,
            "tiers": list(self._tiers),
        }
        files.replace(self._dirfd, META_NAME, files.encode(meta).encode("ascii"))

    def child_ended(self, status: int, usage: resource.struct_rusage) -> None:
        """Keep the child's wait status and resource usage."""
        self.status = status
        self._usage = usage
        self._note_end()

    def asks(self, living: tree.Tree) -> None:
        """Keep which tiers are asked for the processes of this attempt."""
        self._tiers = list(living.tiers)

    def sweep(self, reached: list[Process], signal: int, child_pid: int) -> None:
        """Count the processes other than the child that the ladder signalled, each once for each signal."""
        for each in reached:
            if each.pid != child_pid:
                self._swept.setdefault((each.tier, signal), set()).add((each.pid, each.start))

    def part(self, living: tree.Tree, survivors: int) -> int:
        """Look once more at a tree that did not end whole, keep who stays and who may, and leave it; returns how many stay."""
        if survivors or living.outlived:
            remains = living.remains()
            survivors = len(remains) + living.unseen
            self._remains = [
                {**_identity(each), "state": state, "wchan": wchan, "why": why}
                for each, state, wchan, why in remains[:LEFT_MAX]
            ]
            self._outlived = [_identity(each) for each in list(living.outlived.values())[:LEFT_MAX]]
        living.part()
        return survivors

    def exit_object(self, machine: Machine, log: Log) -> dict[str, Json]:
        """The exit object without `log`."""
        if not self.ended_ms:
            self._note_end()
        status = self.status
        signal = os.WTERMSIG(status) if status is not None and os.WIFSIGNALED(status) else None
        usage = self._usage
        cause = machine.cause
        return {
            "v": 1,
            "attempt": _text(self.attempt),
            "boot_id": self._boot_id,
            "verdict": machine.verdict(signal),
            "code": os.WEXITSTATUS(status) if status is not None and signal is None else None,
            "signal": signal,
            "core": signal is not None and status is not None and os.WCOREDUMP(status),
            "cause": {"kind": cause.kind, "by": cause.by, "reason": cause.reason, "detail": cause.detail},
            "started_ns": self.child.started_ns if self.child else 0,
            "ended_ns": self.ended_ns,
            "duration_ms": self.ended_ms - self.child.started_ms if self.child else 0,
            "rusage": {
                "utime_us": int(usage.ru_utime * 1_000_000) if usage else 0,
                "stime_us": int(usage.ru_stime * 1_000_000) if usage else 0,
                "maxrss_kib": usage.ru_maxrss if usage else 0,
            },
            "streams": {
                _NAMES[kind]: {"bytes": stream.bytes, "sha256": stream.digest.hexdigest()}
                for kind, stream in log.streams.items()
            },
            "drain": machine.drain,
            "swept": [
                {"tier": tier, "signal": number, "count": len(who)} for (tier, number), who in self._swept.items()
            ],
            "survivors": machine.survivors,
            "tiers": list(self._tiers),
            "remains": self._remains,
            "outlived": self._outlived,
        }

    def _note_end(self) -> None:
        self.ended_ns = system.wall_ns()
        self.ended_ms = system.boottime_ms()


def log_end(log: Log) -> dict[str, Json]:
    """Where the log ends, and what of it was dropped for the newest."""
    told: dict[str, Json] = {"end": log.end, "segments": log.segments, "chain": log.chain.hex()}
    gone = log.dropped
    if gone is not None:
        told["dropped"] = {
            "start": gone.start,
            "end": gone.end,
            "segments": gone.segments,
            "before": gone.before.hex(),
            "last": gone.last.hex(),
        }
    return told


def refuse_used_directory(dirfd: int) -> None:
    """Raise UsedDirectoryError when an earlier shim has released or ended the attempt of this directory."""
    # Asked by access and not by trying: exceptions are for what is rare, they touch a lot of memory.
    if os.access(EXIT_NAME, os.F_OK, dir_fd=dirfd, follow_symlinks=False):
        raise UsedDirectoryError("the attempt has ended")
    if not os.access(META_NAME, os.F_OK, dir_fd=dirfd, follow_symlinks=False):
        return
    if files.read_object(dirfd, META_NAME, files.JSON_BYTES_MAX).get("phase") != "ready":
        raise UsedDirectoryError("the attempt was released before")


def make_log_directory(dirfd: int) -> int:
    """Make `log/` and open it; returns the descriptor. Raises OSError."""
    try:
        os.mkdir("log", 0o700, dir_fd=dirfd)
    except FileExistsError:
        pass
    return os.open("log", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=dirfd)


def _identity(each: Process) -> dict[str, Json]:
    return {"pid": each.pid, "start": each.start, "name": process.shown(each.name)}


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
