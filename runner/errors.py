"""Operating errors of the runner, by whose doing it was. Adapters map foreign exceptions to these at the edge."""

from protocol.errors import Reason


class RunnerError(Exception):
    """Anything the runner raises on purpose: a stable `reason`, and a `detail` for a person."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}" if detail else str(reason))


class Refused(RunnerError):
    """What was asked for cannot be: the asker's doing, or a state of the world it must know. Nothing was changed."""


class Broken(RunnerError):
    """Something outside failed us: disk, process, socket. Half-made things are undone or named in `detail`."""


class JournalBroken(Broken):
    """The journal cannot be trusted to hold what it was given: the daemon stops admitting and exits; shims live on."""


class ConfigError(Exception):
    """A file, variable or flag is not what it must be: names the place, the key and what was expected."""

    def __init__(self, place: str, key: str, expected: str) -> None:
        self.place = place
        self.key = key
        self.expected = expected
        super().__init__(f"{place}: {key}: expected {expected}" if key else f"{place}: expected {expected}")


class NotEnrolled(Exception):
    """There is no identity in the state directory; `runner enroll` makes one."""


class AnotherDaemon(Exception):
    """Another daemon has `place`, the state directory or the control socket; `pid` is its process id where it could be read."""

    def __init__(self, pid: int | None, place: str = "the state directory") -> None:
        self.pid = pid
        self.place = place
        super().__init__(f"another daemon (pid {pid or 'unknown'}) holds {place}")
