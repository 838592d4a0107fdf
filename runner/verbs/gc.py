"""`runner gc`: what is no longer needed of ended executions goes."""

from typing import Any, Final

import click

from protocol.text import show_age, show_size
from runner.adapters.control_client import ControlUnavailable, call_control
from runner.errors import Refused
from runner.render import complain, print_table
from runner.verbs.options import ExitCode, settings_of, socket_of
from terminal.options import as_json
from terminal.printing import print_json

GC_TIMEOUT_S: Final = 12.0
"""The daemon looks at every attempt directory: as long as the control socket gives it."""


@click.command(short_help="Remove the files of executions that ended long ago.")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@as_json
@click.pass_context
def gc(ctx: click.Context, dry_run: bool, as_json: bool) -> None:
    """Remove what ended executions left on this disk, once it is settled and all of its log is stored at the control plane:
    when it is older than keep_days (7) of [spool], and, oldest first, when all of it takes more than host_mib (10240), or
    when the disk has less free than the policy wants. The daemon does the same every ten minutes.

    What runs, is not settled, or not stored there to its end, stays. `runner explain` still tells of what was removed.

    \b
    Examples:
      runner gc --dry-run
      runner gc --json | jq .bytes
    """
    try:
        said = call_control(socket_of(settings_of(ctx)), "gc", {"dry_run": dry_run}, GC_TIMEOUT_S)
    except ControlUnavailable as exc:
        complain(f"{exc.detail}, and only the daemon knows what is settled", "runner start")
        ctx.exit(ExitCode.INTERNAL)
    except Refused as exc:
        complain(str(exc), "runner status")
        ctx.exit(ExitCode.INTERNAL)
    if as_json:
        print_json(said)
    else:
        _tell(said)


def _tell(said: dict[str, Any]) -> None:
    rows = [(one["attempt"], show_size(one["bytes"]), show_age(one["age_ms"]), one["why"]) for one in said["attempts"]]
    if rows:
        print_table(("ATTEMPT", "SIZE", "AGE", "WHY"), rows)
    if (more := said["count"] - len(rows)) > 0:
        click.echo(f"and {more} more")
    left = said["left"]
    done = "would be removed" if said["dry_run"] else "removed"
    click.echo(f"{said['count']} {done}, {show_size(said['bytes'])}; {left['count']} kept, {show_size(left['bytes'])}")
    if said["over_bytes"]:
        complain(
            f"{show_size(said['over_bytes'])} more than host_mib of [spool]: {left['alive']} run, {left['unsettled']} are not"
            f" settled, {left['unacked']} not stored at the control plane to their end",
            "runner status",
        )
