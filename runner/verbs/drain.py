"""`runner pause`, `runner resume` and `runner drain`: whether this machine takes new work."""

import shutil
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import click

from protocol.text import show_age
from runner.adapters.control_client import ControlUnavailable, call_control
from runner.adapters.wallclock import wall_ms
from runner.errors import Refused
from runner.render import complain
from runner.verbs.options import CALL_TIMEOUT_S, ExitCode, settings_of, socket_of
from terminal.options import DURATION, as_json
from terminal.printing import print_json

if TYPE_CHECKING:
    from runner.config import Settings

LOOK_S: Final = 0.5
"""Between two looks at what still runs; nobody watches more closely."""
EXIT_LOOKS_MAX: Final = 60
"""Half a minute: a daemon that was told to end, and has nothing to wait for, tells the control plane for a few seconds and is gone."""
INTERRUPTED: Final = 130
"""As shells say that a program was ended by ^C."""
_RESUME: Final = "runner resume"


@click.command(short_help="Take no new work; what runs goes on.")
@as_json
@click.pass_context
def pause(ctx: click.Context, as_json: bool) -> None:
    """Take no new work: starts and new worktrees are refused, or wait at the control plane. What runs goes on, and so do
    stops. It holds until `runner resume`, also when the daemon is started anew.

    \b
    Examples:
      runner pause
      runner pause --json
    """
    said = _admit(ctx, {"state": "paused"})
    if as_json:
        print_json(said)
        return
    living = said["attempts"]
    click.echo("paused; " + (f"what runs goes on: {_count(living)}" if living else "nothing runs"))
    click.echo(f"next: {_RESUME}", err=True)


@click.command(short_help="Take new work again.")
@as_json
@click.pass_context
def resume(ctx: click.Context, as_json: bool) -> None:
    """Take new work again, after `runner pause` or `runner drain`.

    \b
    Examples:
      runner resume
      runner resume --json
    """
    said = _admit(ctx, {"state": "open"})
    if as_json:
        print_json(said)
    else:
        click.echo("open for new work")


@click.command(short_help="Take no new work, and wait until nothing runs.")
@click.option("--deadline", type=DURATION, metavar="DURATION", help="Stop what still runs after this [default: never].")
@click.option("--exit", "then_exit", is_flag=True, help="End the daemon when nothing runs any more.")
@as_json
@click.pass_context
def drain(ctx: click.Context, deadline: int | None, then_exit: bool, as_json: bool) -> None:
    """Take no new work, and wait until nothing runs. With --deadline what still runs by then is stopped, as by
    `runner stop`. It holds until `runner resume`, also when the daemon is started anew.

    ^C ends the waiting and not the drain.

    \b
    Examples:
      runner drain --deadline 5m
      runner drain --exit          before this machine is switched off
    """
    settings = settings_of(ctx)
    began_ms = wall_ms()
    said = _admit(ctx, {"state": "draining", "deadline_ms": deadline})
    shown = _Progress(quiet=as_json)
    try:
        while said["attempts"]:
            shown.show(said)
            time.sleep(LOOK_S)
            said = _admit(ctx, {}, "the drain goes on when it is started again")
            if said["state"] != "draining":
                shown.end()
                complain(f"somebody ended the drain: it is {said['state']}", "runner status")
                ctx.exit(ExitCode.INTERNAL)
    except KeyboardInterrupt:
        shown.end()
        click.echo(f"the drain goes on without you; to open the machine again: {_RESUME}", err=True)
        ctx.exit(INTERRUPTED)
    shown.end()
    if then_exit:
        _end_daemon(ctx, settings)
    if as_json:
        print_json({**said, "waited_ms": wall_ms() - began_ms, "daemon_ended": then_exit})
        return
    click.echo("nothing runs any more" + (", and the daemon has ended" if then_exit else ""))
    opens = f"runner start, then {_RESUME}" if then_exit else _RESUME
    click.echo(f"No new work is taken. To open the machine again: {opens}", err=True)


class _Progress:
    """What still runs: one line that is written over at a terminal, a line for each change elsewhere."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._terminal = sys.stderr.isatty()
        self._said = ""

    def show(self, said: dict[str, Any]) -> None:
        names = [str(name) for name in said["living"]]
        left_ms = said["stops_in_ms"]
        more = f" and {said['attempts'] - len(names)} more" if said["attempts"] > len(names) else ""
        text = f"{_count(said['attempts'])}: {' '.join(names)}{more}"
        if self._terminal and isinstance(left_ms, int):
            text += f" (stopped in {show_age(max(left_ms, 0))})"
        if self._quiet or text == self._said:
            return
        if self._terminal:
            click.echo(f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}", err=True, nl=False)
        else:
            click.echo(text, err=True)
        self._said = text

    def end(self) -> None:
        """What comes next begins on a line of its own."""
        if self._terminal and self._said:
            click.echo("\r\x1b[K", err=True, nl=False)
        self._said = ""


def _count(living: int) -> str:
    return "nothing runs" if living == 0 else "1 attempt runs" if living == 1 else f"{living} attempts run"


def _admit(ctx: click.Context, args: dict[str, Any], meanwhile: str = "") -> dict[str, Any]:
    """Ask the daemon; without one there is nobody to say it to, and that is the end here."""
    try:
        return call_control(socket_of(settings_of(ctx)), "admission", args, CALL_TIMEOUT_S)
    except ControlUnavailable as exc:
        complain(f"{exc.detail}; {meanwhile}" if meanwhile else exc.detail, "runner start")
    except Refused as exc:
        complain(str(exc), "runner status")
    ctx.exit(ExitCode.INTERNAL)


def _end_daemon(ctx: click.Context, settings: "Settings") -> None:
    """Tell it, and wait until it is gone."""
    from runner.adapters.attemptfiles import is_locked

    try:
        said = call_control(socket_of(settings), "shutdown", {}, CALL_TIMEOUT_S)
    except ControlUnavailable:
        return  # somebody else ended it
    for _ in range(EXIT_LOOKS_MAX):
        if not is_locked(settings.state_dir / "runner.lock"):
            return
        time.sleep(LOOK_S)
    complain(f"the daemon (pid {said.get('pid')}) does not end", f"kill {said.get('pid')}")
    ctx.exit(ExitCode.INTERNAL)
