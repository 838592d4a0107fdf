"""`runner status`: is the daemon there, and what does it say of itself."""

from typing import TYPE_CHECKING, Any, Final

import click

from protocol.text import show_age, show_duration, show_size
from runner.adapters.control_client import ControlUnavailable, call_control
from runner.render import complain, show_admission, show_level
from runner.verbs.options import CALL_TIMEOUT_S, ExitCode, settings_of, socket_of
from terminal.options import as_json
from terminal.printing import print_facts, print_json

if TYPE_CHECKING:
    from runner.config import Settings

_TITLES: Final = {"url": "control plane"}


@click.command(short_help="Is the daemon there, and how is it connected.")
@as_json
@click.pass_context
def status(ctx: click.Context, as_json: bool) -> None:
    """Say whether the daemon runs and how it is connected. Exit status 0 when it runs, 1 when not.

    Without a daemon it says what is on the disk: who this machine is, and which attempts live on.

    \b
    Examples:
      runner status
      runner status --json | jq .session.state
    """
    settings = settings_of(ctx)
    try:
        said = call_control(socket_of(settings), "status", {}, CALL_TIMEOUT_S)
    except ControlUnavailable as exc:
        _tell_down(settings, exc, as_json=as_json)
        ctx.exit(ExitCode.INTERNAL)
    if as_json:
        print_json({"running": True, **said})
    else:
        print_facts(_facts(said))
    if (theirs := said.get("state_dir", str(settings.state_dir))) != str(settings.state_dir):
        # Two runners of one user must not share a socket directory, where only one of them can answer.
        complain(f"this daemon is of {theirs}, not of {settings.state_dir}", "runner --runtime-dir PATH status")


def _facts(said: dict[str, Any]) -> list[tuple[str, str]]:
    session, outbox, offset = said.get("session") or {}, said.get("outbox") or {}, said.get("clock_offset_ms")
    unanswered = outbox.get("unanswered", 0)
    room = said.get("headroom") or {}
    facts = [
        ("runner", f"{said.get('name')} ({said.get('runner')}) of {said.get('org')}, incarnation {said.get('inc')}"),
        ("key", str(said.get("key_id"))),
        (
            "daemon",
            f"running, pid {said.get('pid')}, up {show_age(int(said.get('uptime_s', 0) * 1000))}, version {said.get('version')}",
        ),
        ("session", _session(session)),
        ("clock", "unknown" if offset is None else f"{show_duration(offset)} from the control plane's"),
        ("admission", show_admission(said.get("admission") or {})),
        ("attempts", f"{said.get('attempts')} living{_of_them(said.get('ptys'))}"),
        ("policy", str(said.get("policy_digest"))),
        ("keyset", f"version {said.get('keyset_version')}"),
        ("reports", f"not all answered, {outbox.get('head')} in all" if unanswered else "all answered"),
        ("logs", f"{show_size(said.get('log_backlog_bytes') or 0)} not yet stored at the control plane"),
    ]
    if room.get("short"):
        facts.append(("headroom", f"new work is refused: {room['short']}, {room.get('detail')}"))
    if (log := said.get("log") or {}).get("falls_back_to"):
        facts.append(("log level", show_level(log)))
    if survivors := said.get("survivors"):
        facts.append(("survivors", f"{survivors} processes of ended attempts cannot be ended"))
    return facts


def _of_them(ptys: int | None) -> str:
    return "" if not ptys else f", {ptys} of them PTYs"


def _session(session: dict[str, Any]) -> str:
    since, reason = session.get("since_ms"), session.get("reason")
    parts = [str(session.get("state")), str(session.get("url") or "")]
    if isinstance(since, int):
        parts.insert(1, f"since {_clock_time(since)}")
    return " ".join(part for part in [*parts, f"({reason})" if reason else ""] if part)


def _clock_time(unix_ms: int) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(unix_ms / 1000, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _tell_down(settings: "Settings", exc: ControlUnavailable, *, as_json: bool) -> None:
    from runner.adapters.attemptfiles import attempt_directories, read_attempt

    found = [read_attempt(directory) for directory in attempt_directories(settings.state_dir)]
    living = [files.name for files in found if files.alive]
    identity = _identity(settings)
    if as_json:
        print_json({"running": False, "detail": exc.detail, "identity": identity, "attempts": living})
        return
    facts = [("daemon", f"not running ({exc.detail})")]
    facts += [(_TITLES.get(name, name), value) for name, value in identity.items() if value is not None]
    facts.append(("attempts", f"{len(living)} living: {' '.join(living)}" if living else "none living"))
    print_facts(facts)
    complain("the daemon is not running", "runner start" if identity["runner"] else "runner enroll JOIN-STRING")


def _identity(settings: "Settings") -> dict[str, str | None]:
    """Who this machine is enrolled as; `runner` is None where it is not, and `problem` says what is wrong with it."""
    from runner.adapters.keystore import Keystore
    from runner.errors import ConfigError, NotEnrolled

    known: dict[str, str | None] = {"runner": None, "name": None, "org": None, "url": None, "problem": None}
    try:
        identity = Keystore(settings.state_dir / "identity").load()
    except NotEnrolled:
        known["problem"] = "not enrolled"
    except ConfigError as exc:
        known["problem"] = str(exc)
    else:
        mine = identity.certificate.value
        known |= {"runner": mine.runner, "name": mine.name, "org": mine.org, "url": identity.url}
    return known
