"""What the daemon tells its log: structured lines, whose event names are all listed here.

Rule 1: an event is `noun.verb_past` from `Event`. Rule 2: secrets travel as `Secret` and print as `***`.
"""

import logging
import os
import sys
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

from runner.adapters.journald import JournalSocket, is_journal
from runner.loglines import VALUE_CHARS_MAX, console_text, json_text
from runner.logsink import LEVELS, JournalOutlet, Outlet, Sink, StreamOutlet

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
    """A library said something through the standard logging; `logger` names it."""
    LOG_FAILED = "log.failed"
    LOG_LEVEL_CHANGED = "log.level_changed"
    LOG_MASKED = "log.masked"
    """Nothing of a log is shown at the control plane, since nobody knows what must not be."""
    SPOOL_PRUNED = "spool.pruned"
    SPOOL_LIMITED = "spool.limited"
    """Living logs together are above the host's bound: the largest have to be smaller."""
    SPOOL_FAILED = "spool.failed"
    OWNER_ASKED = "owner.asked"
    """A question on the control socket."""


EVENTS: Final = frozenset(event.value for event in Event)


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


def configure(level: str, form: str, *, strict: bool = False) -> Sink:
    """Send all logging to stderr, or to the journal that stderr leads to; returns what changes the level and is read from.

    Args:
        level: one of LEVELS.
        form: json, console, or auto: the journal's own under systemd, console when stderr is a terminal, else json.
        strict: an event that is not registered raises ValueError, as tests want it; else its line is marked.
    """
    sink = Sink(_outlet(form), level)

    def at_level(_logger: WrappedLogger, method: str, line: EventDict) -> EventDict:
        # Not by structlog's own filter, which is fixed for a logger at its first line.
        if not sink.wants(method):
            raise structlog.DropEvent
        return line

    writer = _Writer(sink)
    structlog.configure(
        processors=[
            at_level,
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            registered_only if strict else mark_unregistered,
            structlog.processors.format_exc_info,
            lambda _logger, _method, line: ((line,), {}),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS["debug"]),
        logger_factory=lambda *_args: writer,
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_Libraries()], level=logging.WARNING, force=True)
    return sink


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
    return json_text(line)


def render_console(_logger: WrappedLogger, _method: str, line: EventDict) -> str:
    """For people: time, level, event, then `key=value`; whatever is not plain is quoted and escaped."""
    return console_text(line)


class _Writer:
    """What structlog takes for the place where lines are written."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def msg(self, line: EventDict) -> None:
        """One line, at any level."""
        self._sink.write(line)

    debug = info = warning = error = critical = msg


def _outlet(form: str) -> Outlet:
    if form == "auto" and is_journal(os.environ):
        return JournalOutlet(JournalSocket(), StreamOutlet(sys.stderr, human=False))
    return StreamOutlet(sys.stderr, human=form == "console" or (form == "auto" and sys.stderr.isatty()))


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
    "VALUE_CHARS_MAX",
    "Event",
    "Secret",
    "configure",
    "logger",
    "mark_unregistered",
    "registered_only",
    "render_console",
    "render_json",
]
