"""What the daemon tells its log: structured lines on stderr, whose event names are all listed here.

Rule 1: an event is `noun.verb_past` from `Event`. Rule 2: nothing that is logged can break a line or move a cursor, whatever
bytes are in it. Rule 3: secrets travel as `Secret` and print as `***`.
"""

import json
import logging
import sys
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final, Generic, TypeVar, cast

if "rich" not in sys.modules:
    # structlog would load it for tracebacks in colour, which a daemon never prints: 3 MiB and 40 ms.
    sys.modules["rich"] = None  # type: ignore[assignment]
    import structlog

    del sys.modules["rich"]
else:
    import structlog
from structlog.typing import EventDict, FilteringBoundLogger, WrappedLogger

from runner.config import LOG_LEVELS

T = TypeVar("T")


class Event(StrEnum):
    """Every event there is; alerts and tests match on the names, so they are added and never renamed."""

    DAEMON_STARTED = "daemon.started"
    DAEMON_STOPPING = "daemon.stopping"
    DAEMON_STOPPED = "daemon.stopped"
    SESSION_ESTABLISHED = "session.established"
    SESSION_LOST = "session.lost"
    COMMAND_ACCEPTED = "command.accepted"
    COMMAND_REFUSED = "command.refused"
    COMMAND_DUPLICATED = "command.duplicated"
    ATTEMPT_PREPARED = "attempt.prepared"
    ATTEMPT_RELEASED = "attempt.released"
    ATTEMPT_SETTLED = "attempt.settled"
    ATTEMPT_ADOPTED = "attempt.adopted"
    ATTEMPT_LOST = "attempt.lost"
    ATTEMPT_STOPPED = "attempt.stopped"
    WORKTREE_CREATED = "worktree.created"
    WORKTREE_REMOVED = "worktree.removed"
    WORKTREE_FAILED = "worktree.failed"
    LEASE_REFUSED = "lease.refused"
    LEASE_LOST = "lease.lost"
    LEASE_ACQUIRED = "lease.acquired"
    LEASE_KEPT = "lease.kept"
    """Renewed beside the session, which did not get to it."""
    LEASE_NEGLECTED = "lease.neglected"
    """As LEASE_KEPT, in vain."""
    ATTEMPT_UNKNOWN = "attempt.unknown"
    ATTEMPT_UNKILLABLE = "attempt.unkillable"
    SHIM_HUNG = "shim.hung"
    ORPHAN_FOUND = "orphan.found"
    ORPHAN_SWEPT = "orphan.swept"
    ORPHAN_UNSEEN = "orphan.unseen"
    """Processes could not be looked at."""
    MACHINE_WOKE = "machine.woke"
    ADMISSION_CHANGED = "admission.changed"
    HEADROOM_FAILED = "headroom.failed"
    STREAM_GAP_FOUND = "stream.gap_found"
    REPORT_REFUSED = "report.refused"
    ALARM_RAISED = "alarm.raised"
    POLICY_LOADED = "policy.loaded"
    POLICY_REFUSED = "policy.refused"
    KEYSET_UPDATED = "keyset.updated"
    IDENTITY_UNKEPT = "identity.unkept"
    """A newer keyset or certificate counts, and could not be stored."""
    INCARNATION_RAISED = "incarnation.raised"
    RECOVERY_FINISHED = "recovery.finished"
    JOURNAL_BROKEN = "journal.broken"
    FORKSERVER_LOST = "forkserver.lost"
    LIBRARY_WARNED = "library.warned"
    LOG_FAILED = "log.failed"
    """A library said something through the standard logging; `logger` names it."""


EVENTS: Final = frozenset(event.value for event in Event)
LEVELS: Final[Mapping[str, int]] = {"debug": 10, "info": 20, "warning": 30, "error": 40}
assert tuple(LEVELS) == LOG_LEVELS
VALUE_CHARS_MAX: Final = 4096
"""One value in a line; longer ones are cut and say so: a log is no place for payloads."""
_PLAIN: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_./:@+-*%,")
_FIRST: Final = ("timestamp", "level", "event")


class Secret(Generic[T]):
    """A value that never prints: `reveal` it where it is used."""

    __slots__ = ("_value",)

    def __init__(self, value: T) -> None:
        self._value = value

    def reveal(self) -> T:
        """The value itself."""
        return self._value

    def __repr__(self) -> str:
        return "***"

    def __reduce__(self) -> str:
        raise TypeError("a secret is not pickled")


def configure(level: str, form: str, *, strict: bool = False) -> None:
    """Send all logging to stderr.

    Args:
        level: one of LEVELS.
        form: json, console, or auto: console when stderr is a terminal.
        strict: an event that is not registered raises ValueError, as tests want it; else its line is marked.
    """
    human = form == "console" or (form == "auto" and sys.stderr.isatty())
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            registered_only if strict else mark_unregistered,
            structlog.processors.format_exc_info,
            render_console if human else render_json,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_Libraries()], level=max(LEVELS[level], logging.WARNING), force=True)


def logger(**fields: Any) -> FilteringBoundLogger:
    """A logger with `fields` in every line; call it as `logger().info(Event.DAEMON_STARTED, pid=1)`."""
    return cast(FilteringBoundLogger, structlog.get_logger(**fields))


def registered_only(_logger: WrappedLogger, _method: str, line: EventDict) -> EventDict:
    """Raise ValueError for an event name that is not in the registry."""
    if str(line.get("event")) not in EVENTS:
        raise ValueError(f"event {line.get('event')!r} is not in runner/logs.py")
    return line


def mark_unregistered(_logger: WrappedLogger, _method: str, line: EventDict) -> EventDict:
    """Mark a line of an unknown event: a wrong name must not take a daemon down."""
    if str(line.get("event")) not in EVENTS:
        line["unregistered"] = True
    return line


def render_json(_logger: WrappedLogger, _method: str, line: EventDict) -> str:
    """One JSON object on one line, in ASCII."""
    return _escaped({_text(key): _plain_value(value) for key, value in line.items()})


def render_console(_logger: WrappedLogger, _method: str, line: EventDict) -> str:
    """For people: time, level, event, then `key=value`; whatever is not plain is quoted and escaped."""
    trace = line.pop("exception", None)
    first = [_word(line.pop(key)) for key in _FIRST if key in line]
    rest = [f"{_word(key)}={_word(value)}" for key, value in line.items()]
    tail = [f"    {_escaped(part)[1:-1]}" for part in str(trace).splitlines()] if trace else []
    return "\n".join([" ".join(first + rest), *tail])


def _word(value: object) -> str:
    value = _plain_value(value)
    if isinstance(value, str):
        return value if value and _PLAIN.issuperset(value) else _escaped(value)
    return _escaped(value)


def _plain_value(value: object) -> Any:
    """`value` as JSON can say it; secrets and foreign objects as their text."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {_text(key): _plain_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain_value(inner) for inner in value]
    return _text(value)


def _text(value: object) -> str:
    text = str(value)
    return text if len(text) <= VALUE_CHARS_MAX else f"{text[:VALUE_CHARS_MAX]}… ({len(text)} characters)"


def _escaped(value: object) -> str:
    # JSON in ASCII escapes everything that a terminal obeys, DEL and the C1 controls among it.
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"))


class _Libraries(logging.Handler):
    """Brings what libraries log into the same lines."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
        except (TypeError, ValueError) as exc:
            text = f"{record.msg} ({exc})"
        write = logger().error if record.levelno >= logging.ERROR else logger().warning
        write(Event.LIBRARY_WARNED, logger=record.name, message=text, exc_info=record.exc_info)


__all__ = [
    "EVENTS",
    "LEVELS",
    "Event",
    "Secret",
    "configure",
    "logger",
    "mark_unregistered",
    "registered_only",
    "render_console",
    "render_json",
]
