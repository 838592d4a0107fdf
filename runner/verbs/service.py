"""`runner service`: keep the daemon running."""

import getpass
import os
import sys
from pathlib import Path
from typing import Any

import click

from runner.render import complain, print_facts, print_json
from runner.verbs.options import ExitCode, as_json

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


@service.command()
@_user
@click.option("--now", is_flag=True, help="Also enable and start it.")
@click.pass_context
def install(ctx: click.Context, user: bool, now: bool) -> None:
    """Write the unit to ~/.config/systemd/user/runner.service; with --now enable and start it.

    --config, --state-dir and --runtime-dir of this very call are kept in the unit. Calling it again changes nothing,
    or brings the unit up to date.

    \b
    Examples:
      runner service install --user --now
      runner --state-dir /data/runner service install --user
    """
    from runner.service import UNIT, lingers, systemctl, unit_path, unit_text, write_unit

    path = unit_path(os.environ)
    written = write_unit(path, unit_text([*program(), *_kept_flags(ctx.obj), "start"]))
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
    from runner.service import UNIT, systemctl, unit_path

    path = unit_path(os.environ)
    if not path.exists():
        click.echo(f"{path} is not there")
        return
    answers = _manager(ctx, needed=False)
    if answers:
        systemctl("disable", *(["--now"] if now else []), UNIT)
    path.unlink()
    if answers:
        systemctl("daemon-reload")
    click.echo(f"{path} removed")


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


def _kept_flags(flags: dict[str, str | None]) -> list[str]:
    kept = {name: flags[name] for name in ("config", "state_dir", "runtime_dir")}
    return [word for name, value in kept.items() if value for word in (f"--{name.replace('_', '-')}", value)]


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
