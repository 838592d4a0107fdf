"""`attach`: being at a terminal on a runner's machine."""

from typing import Final

import click

from controlplane.reach import Reach, pass_reach, path_id
from terminal.options import attach_options


@click.command(short_help="Be at a terminal on a runner.")
@click.argument("pty_id", metavar="PTY")
@attach_options
@pass_reach
def attach(reach: Reach, pty_id: str, read_only: bool, mode: str) -> None:
    """Be at a terminal: keys go to it, its output comes here, until it ends or you leave with Enter ~. (Enter ~? lists what else
    there is). When the network or the control plane goes, what you type is kept, and the line is made anew.

    Ends with the status of the program, 128 + n when signal n killed it, 0 when you left, 255 when there was no way back to it.

    \b
    Examples:
      runner-control attach ex_01jx
      runner-control attach ex_01jx --read-only --mode snapshot
    """
    # What draws, types and signs is for this verb alone.
    from controlplane.ptyattach import attach_remote

    with reach.client() as client:
        status = attach_remote(client, path_id(pty_id), mode="ro" if read_only else "rw", attach=mode)
    click.get_current_context().exit(status)


VERBS: Final[tuple[click.Command, ...]] = (attach,)
