"""`runner attach`: being at a PTY of this machine, straight at the shim that holds it."""

import os
import re
from typing import TYPE_CHECKING, Final

import click

from runner.render import complain, print_table
from runner.verbs.options import ExitCode, settings_of
from terminal.options import attach_options

if TYPE_CHECKING:
    from pathlib import Path

    from runner.config import Settings

_NAME_CHARS_MAX: Final = 34


@click.command(short_help="Be at a PTY of this machine.")
@click.argument("wanted", metavar="[PTY]", required=False)
@attach_options
@click.pass_context
def attach(ctx: click.Context, wanted: str | None, read_only: bool, mode: str) -> None:
    """Be at a PTY of this machine: keys go to it, its output comes here, until it ends or you leave with Enter ~. (Enter ~?
    lists what else there is).

    PTY is an execution or an attempt; without it, the only PTY that lives here. Neither daemon nor control plane is needed.
    Ends with the status of the program, 128 + n when signal n killed it, 0 when you left, 255 when there was no way to it.

    \b
    Examples:
      runner attach
      runner attach ex_01jx --read-only
    """
    from runner.errors import Refused

    settings = settings_of(ctx)
    try:
        directory = _find(settings, wanted)
    except Refused as exc:
        complain(str(exc), "runner ps")
        ctx.exit(ExitCode.INTERNAL)
    if directory is None:
        ctx.exit(ExitCode.INTERNAL)
    ctx.exit(_attach(directory, mode, writes=not read_only))


def _find(settings: "Settings", wanted: str | None) -> "Path | None":
    """The directory of the PTY; None when that was not told. Raises Refused."""
    from protocol.errors import Reason
    from runner.adapters.attemptfiles import find_attempt, living_ptys, read_attempt
    from runner.errors import Refused

    if wanted is not None:
        directory = find_attempt(settings.state_dir, wanted)
        if read_attempt(directory).terminal is None:
            raise Refused(Reason.UNKNOWN_TARGET, f"{directory.name} has no terminal: runner logs -f {directory.name}")
        return directory
    found = living_ptys(settings.state_dir)
    if not found:
        raise Refused(Reason.UNKNOWN_TARGET, "no PTY lives on this machine")
    if len(found) == 1:
        return found[0].directory
    from terminal.printing import shell_words

    print_table(("PTY", "COMMAND"), [(each.attempt, shell_words(each.argv)) for each in found])
    complain("there is more than one", f"runner attach {found[-1].attempt}")
    return None


def _attach(directory: "Path", mode: str, *, writes: bool) -> int:
    import asyncio

    from protocol.groups import ungrouped
    from runner.adapters.ptyline import ShimDialer
    from runner.adapters.wallclock import wall_ms
    from runner.verbs.attempts import shell_status
    from terminal.attach import FAILED, attach, say_how_it_ended
    from terminal.raw import RawTerminal

    dialer = ShimDialer(directory, _viewer(), shell_status, writes=writes)
    with ungrouped():
        finish = asyncio.run(attach(dialer, RawTerminal(), mode, gen=wall_ms(), writes=writes))
    if finish.complaint:
        complain(finish.complaint, f"runner logs {directory.name}")
        return FAILED
    say_how_it_ended(finish, directory.name, f"runner attach {directory.name}")
    return finish.status


def _viewer() -> str:
    """A name that is the same whenever this terminal comes back: the shim keeps a count under each that it ever heard."""
    try:
        name = os.ttyname(0)
    except OSError:
        name = str(os.getpid())
    return f"here{re.sub('[^A-Za-z0-9]+', '-', name.removeprefix('/dev'))[-_NAME_CHARS_MAX:]}"
