"""`runner service`: keep the daemon running."""

import getpass
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from runner.config import DEFAULT_PLACE, PREFIX
from runner.render import complain
from runner.verbs.options import ExitCode
from terminal.options import as_json
from terminal.printing import print_facts, print_json

if TYPE_CHECKING:
    from runner.config import Settings

_KNOWN_TO_SYSTEMD: Final = frozenset({DEFAULT_PLACE, "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"})
"""The manager of a user sets the first variable itself, and by the second it finds its units, this one among them."""

_user = click.option(
    "--user", "user", is_flag=True, required=True, help="As a service of this user; there is no other kind."
)


@click.group()
def service() -> None:
    """Keep the daemon running by systemd.

    \b
    Examples:
      runner service install --user --now
      runner service status --user
    """


@service.command(short_help="Write the unit; --now: enable and start it.")
@_user
@click.option("--now", is_flag=True, help="Also enable and start it.")
@click.pass_context
def install(ctx: click.Context, user: bool, now: bool) -> None:
    """Write the unit to ~/.config/systemd/user/runner.service; with --now enable and start it.

    Places that this very call was given (settings file, state and runtime directory), by flags or by the environment,
    are kept in the unit. Calling it again changes nothing, or brings the unit up to date.

    \b
    Examples:
      runner service install --user --now
      runner --state-dir /data/runner service install --user
    """
    from runner.config import explain_settings
    from runner.service import UNIT, lingers, systemctl, unit_path, unit_text, write_unit

    path = unit_path(os.environ)
    settings, sources = explain_settings(ctx.obj, os.environ)
    written = write_unit(path, unit_text([*program(), *_kept_flags(settings, sources), "start"]))
    click.echo(f"{path} {'written' if written else 'is up to date'}")
    if not _manager(ctx, needed=now):
        return
    systemctl("daemon-reload")
    if now:
        done = systemctl("enable", "--now", UNIT)
        if done.ok and written:
            done = systemctl("restart", UNIT)
        if not done.ok:
            complain(f"the service does not start: {done.text}", f"journalctl --user -u {UNIT}")
            ctx.exit(ExitCode.INTERNAL)
        click.echo(f"{UNIT} is enabled and running")
    else:
        click.echo(f"next: systemctl --user enable --now {UNIT}")
    if not lingers(getpass.getuser()):
        click.echo("It ends when you log out. To keep it: loginctl enable-linger")


@service.command()
@_user
@click.option("--now", is_flag=True, help="Also stop it; executions go on until their own end.")
@click.pass_context
def uninstall(ctx: click.Context, user: bool, now: bool) -> None:
    """Disable the service and remove its unit. Identity, journal and logs stay.

    \b
    Example:
      runner service uninstall --user --now
    """
    from runner.service import UNIT, manager_answers, systemctl, unit_path

    path = unit_path(os.environ)
    if not path.exists():
        click.echo(f"{path} is not there")
        return
    told = manager_answers()
    if told.ok:
        systemctl("disable", *(["--now"] if now else []), UNIT)
    path.unlink()
    if told.ok:
        systemctl("daemon-reload")
    click.echo(f"{path} removed")
    if not told.ok:
        complain(
            f"no service manager of this user answers, so a daemon that runs was not told: {told.text}", "runner status"
        )


@service.command()
@_user
@as_json
@click.pass_context
def status(ctx: click.Context, user: bool, as_json: bool) -> None:
    """Say what is installed and whether it runs. Exit status 0 when it runs, 1 when not.

    \b
    Example:
      runner service status --user --json
    """
    from runner.service import UNIT, lingers, manager_answers, systemctl, unit_path

    path = unit_path(os.environ)
    told = manager_answers()
    shown: dict[str, Any] = {
        "unit": str(path),
        "installed": path.exists(),
        "enabled": told.ok and systemctl("is-enabled", UNIT).ok,
        "active": systemctl("is-active", UNIT).text if told.ok else "unknown",
        "lingers": lingers(getpass.getuser()),
    }
    if as_json:
        print_json(shown)
    else:
        print_facts([(name, {True: "yes", False: "no"}.get(value, str(value))) for name, value in shown.items()])
        if not told.ok:
            complain(f"no service manager of this user answers: {told.text}", "runner start")
    ctx.exit(ExitCode.OK if shown["active"] == "active" else ExitCode.INTERNAL)


def program() -> list[str]:
    """How this very command is started again: the installed one beside this interpreter, or the module."""
    installed = Path(sys.executable).with_name("runner")
    return [str(installed)] if os.access(installed, os.X_OK) else [sys.executable, "-m", "runner.cli"]


def _kept_flags(settings: "Settings", sources: Mapping[str, str]) -> list[str]:
    """Flags that lead the service to the places of this call; what else only this shell knows is said."""
    kept = {"config_file": "--config", "state_dir": "--state-dir", "runtime_dir": "--runtime-dir"}
    lost = [source for key, source in sources.items() if source.startswith(PREFIX) and key not in kept]
    if lost:
        complain(
            f"{' '.join(sorted(lost))}: of this shell alone; the service reads {settings.config_file}",
            f"${{EDITOR:-vi}} {settings.config_file}",
        )
    found = [(flag, str(getattr(settings, key))) for key, flag in kept.items() if sources[key] not in _KNOWN_TO_SYSTEMD]
    return [word for pair in found for word in pair]


def _manager(ctx: click.Context, *, needed: bool) -> bool:
    """Whether systemd can be told; where it is needed and cannot, that is the end."""
    from runner.service import UNIT, manager_answers

    told = manager_answers()
    if not told.ok:
        complain(
            f"no service manager of this user answers: {told.text}",
            f"systemctl --user enable --now {UNIT}   (in a login session), or: runner start",
        )
        if needed:
            ctx.exit(ExitCode.INTERNAL)
    return told.ok
