"""The daemon's own log: reading it (`runner logs --daemon`), and `runner log-level`.

A running daemon is asked; it has the last lines whoever else took them. Without one the journal of its unit is read, where there is a unit.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from runner.adapters.control_client import ControlUnavailable, call_control
from runner.errors import Refused
from runner.loglines import console_text, json_text
from runner.render import complain, show_level
from runner.verbs.options import CALL_TIMEOUT_S, ExitCode, settings_of, socket_of
from terminal.options import DURATION, as_json
from terminal.printing import print_json

if TYPE_CHECKING:
    from runner.config import Settings

WAIT_MS: Final = 5000
"""How long the daemon keeps one question of a follower open."""
LOOK_S: Final = 0.5
"""Between two looks for a daemon that is gone, or that has too many followers."""
LINES_MAX: Final = 2000
"""Lines of the past, if nobody asked for fewer: as many as a running daemon keeps."""
INTERRUPTED: Final = 130
_SYSTEM_UNITS: Final = ("/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")


def show_daemon_log(
    settings: "Settings", *, follow: bool, tail: int | None = None, as_json: bool = False
) -> ExitCode | int:
    """Print the daemon's log to stdout, one line each, as JSON or for people; returns the exit status.

    Following goes on over restarts of the daemon, until ^C. `tail`: only the last so many lines, at most LINES_MAX.
    """
    last = None if tail is None else min(tail, LINES_MAX)
    try:
        try:
            _show(_from_daemon(settings, last, follow=follow), as_json=as_json)
        except ControlUnavailable:
            return _show_journal(last, follow=follow, as_json=as_json)
        except Refused as exc:
            complain(str(exc), "runner status")
            return ExitCode.INTERNAL
    except KeyboardInterrupt:
        return INTERRUPTED
    return ExitCode.OK


def _show(lines: Iterator[Mapping[str, Any]], *, as_json: bool) -> None:
    # A line of another program in the same journal is shown by the same rules: nothing in it can be obeyed.
    text = json_text if as_json else console_text
    for line in lines:
        click.echo(text(line))


def _from_daemon(settings: "Settings", last: int | None, *, follow: bool) -> Iterator[dict[str, Any]]:
    """Lines that the daemon keeps. Raises ControlUnavailable when there never was one to ask."""
    path = socket_of(settings)
    args: dict[str, Any] = {"last": last}
    heard = gone = False
    while True:
        try:
            said = call_control(path, "log", args, CALL_TIMEOUT_S + WAIT_MS / 1000)
        except ControlUnavailable as exc:
            if not heard or not follow:
                raise
            if not gone:
                click.echo(f"[{exc.detail}; waiting for the next one]", err=True)
            gone = True
            time.sleep(LOOK_S)
            continue
        heard, gone = True, False
        if said["dropped"]:
            click.echo(f"[{said['dropped']} lines are no longer kept]", err=True)
        for text in said["lines"]:
            with contextlib.suppress(ValueError, RecursionError):
                yield json.loads(text)
        if not follow and not said["more"]:
            return
        args = {"daemon": said["daemon"], "after": said["end"], "wait_ms": WAIT_MS if follow else 0}
        if not said["lines"] and not said["waited"]:
            time.sleep(LOOK_S)


def _show_journal(last: int | None, *, follow: bool, as_json: bool) -> ExitCode | int:
    from runner.adapters.journald import read_journal
    from runner.service import UNIT

    place = _unit(os.environ)
    if place is None:
        complain(
            "no daemon runs here, and it is no service of systemd: its log went to the stderr of `runner start`",
            "runner start",
        )
        return ExitCode.INTERNAL
    path, user = place
    click.echo(f"[no daemon runs; this is what the journal has of {path}]", err=True)
    try:
        _show(read_journal(UNIT, user=user, lines=LINES_MAX if last is None else last, follow=follow), as_json=as_json)
    except (OSError, TimeoutError) as exc:
        if isinstance(exc, BrokenPipeError):
            raise
        complain(
            f"the journal cannot be read: {exc.strerror or exc}", f"journalctl {'--user ' if user else ''}-u {UNIT}"
        )
        return ExitCode.INTERNAL
    return ExitCode.OK


def _unit(environ: Mapping[str, str]) -> tuple[Path, bool] | None:
    """The unit's file, and whether it is one of this user; None where there is neither."""
    from runner.service import UNIT, unit_path

    mine = unit_path(environ)
    places = [(Path(place) / UNIT, False) for place in _SYSTEM_UNITS]
    if environ.get("LOCAL_RUNNER_SYSTEM") != "1":
        places.insert(0, (mine, True))
    return next((place for place in places if place[0].exists()), None)


@click.command("log-level", short_help="How much the daemon tells in its log; now, without a restart.")
@click.argument("level", required=False, type=click.Choice(["debug", "info", "warning", "error"]), metavar="[LEVEL]")
@click.option("--for", "for_ms", type=DURATION, metavar="DURATION", help="Go back to the level of now after this.")
@as_json
@click.pass_context
def log_level(ctx: click.Context, level: str | None, for_ms: int | None, as_json: bool) -> None:
    """Change what the running daemon logs, or, without LEVEL, say what it does. LEVEL is debug, info, warning or error.

    It holds until the daemon ends, with --for so long. For good: log_level in the settings file.

    \b
    Examples:
      runner log-level debug --for 10m && runner logs --daemon -f
      runner log-level
    """
    if for_ms is not None and (level is None or for_ms == 0):
        raise click.UsageError("--for takes a duration, and goes with a LEVEL")
    try:
        args = {} if level is None else {"level": level, "for_ms": for_ms}
        said = call_control(socket_of(settings_of(ctx)), "log_level", args, CALL_TIMEOUT_S)
    except ControlUnavailable as exc:
        complain(exc.detail, "runner start")
        ctx.exit(ExitCode.INTERNAL)
    except Refused as exc:
        complain(str(exc), "runner log-level --help")
        ctx.exit(ExitCode.INTERNAL)
    if as_json:
        print_json(said)
    else:
        click.echo(show_level(said))
