"""`runner orphans`: processes of ours that live although no shim guards them, and ending them."""

from typing import TYPE_CHECKING, Any, Final

import click

from protocol.text import show_age
from runner.adapters.control_client import ControlUnavailable, call_control
from runner.errors import Refused
from runner.render import complain, print_table
from runner.verbs.options import ExitCode, settings_of, socket_of
from terminal.options import as_json
from terminal.printing import print_json

if TYPE_CHECKING:
    from runner.adapters.remains import Remains
    from runner.config import Settings

ORPHANS_TIMEOUT_S: Final = 12.0
"""The daemon looks at every process of this user, and waits for a sweep: as long as the control socket gives it."""
_GUARDED: Final = "guarded"


@click.command(short_help="List and end what lives without its shim.")
@click.option("--kill", is_flag=True, help="End what is settled or unknown, by KILL.")
@as_json
@click.pass_context
def orphans(ctx: click.Context, kill: bool, as_json: bool) -> None:
    """Look at all processes that executions of this runner started, and say which of them nobody guards any more.

    guarded: its shim lives, `runner stop` ends it. unguarded: its shim is gone, and the daemon is about to end it.
    settled, unknown: what is left of an attempt that is over, or that this runner knows nothing of; --kill ends these.
    Without a daemon --kill ends everything that is not guarded. What the policy lets outlive an execution is not listed.

    Exit status 0 when there are no orphans (with --kill: none any more), 8 when there are.

    \b
    Examples:
      runner orphans
      runner orphans --kill
      runner orphans --json | jq '.attempts[] | select(.state != "guarded")'
    """
    settings = settings_of(ctx)
    try:
        said = call_control(socket_of(settings), "orphans", {"kill": kill}, ORPHANS_TIMEOUT_S)
    except ControlUnavailable:
        said = _without_daemon(settings, kill=kill)
        if not as_json:
            complain("the daemon is not running; this is what the processes and files say", "runner start")
    except Refused as exc:
        complain(str(exc), "runner status")
        ctx.exit(ExitCode.INTERNAL)
    swept = said.get("swept")
    left = _left(said["attempts"], swept)
    if as_json:
        print_json({"orphans": left, **said})
    else:
        _tell(said["attempts"], swept)
        if left and swept is None:
            click.echo("next: runner orphans --kill", err=True)
    ctx.exit(ExitCode.ORPHANS if left else ExitCode.OK)


def _left(attempts: list[dict[str, Any]], swept: list[dict[str, Any]] | None) -> int:
    """Attempts of which something lives that nobody guards."""
    gone = {one["attempt"] for one in swept or () if one.get("done") and not one.get("remaining")}
    return sum(1 for one in attempts if one["state"] != _GUARDED and one["attempt"] not in gone)


def _tell(attempts: list[dict[str, Any]], swept: list[dict[str, Any]] | None) -> None:
    rows = [
        (one["attempt"], one["state"], str(each["pid"]), show_age(each["age_ms"]), each["name"])
        for one in attempts
        for each in one["processes"]
    ]
    if rows:
        print_table(("ATTEMPT", "STATE", "PID", "AGE", "PROCESS"), rows)
    else:
        click.echo("no process of this runner's executions lives")
    for one in swept or ():
        if not one.get("done"):
            click.echo(f"{one['attempt']}: the sweep goes on")
            continue
        click.echo(
            f"{one['attempt']}: found {one['found']}, signalled {one['signalled']}, remaining {one['remaining']}"
        )
        for line in one["remains"]:
            complain(f"could not be ended: {line}")


def _without_daemon(settings: "Settings", *, kill: bool) -> dict[str, Any]:
    from runner.adapters.remains import GUARDED, UNGUARDED, told_sweep
    from runner.adapters.system import StateLock

    remains = _remains(settings)
    if not kill:
        return {"attempts": [one.told(GUARDED if one.guarded else UNGUARDED) for one in remains.strays()]}
    # Nobody may start a daemon meanwhile: it would settle what we are ending.
    with StateLock(settings.state_dir / "runner.lock"):
        strays = remains.strays()
        swept = [told_sweep(one.name, remains.sweep(one.name)) for one in strays if not one.guarded]
    return {"attempts": [one.told(GUARDED if one.guarded else UNGUARDED) for one in strays], "swept": swept}


def _remains(settings: "Settings") -> "Remains":
    """What the files and processes say. Raises NotEnrolled: without a name of ours nothing is ours."""
    from runner.adapters import cgroups
    from runner.adapters.attemptdir import Place
    from runner.adapters.keystore import Keystore
    from runner.adapters.policyfile import load_policy
    from runner.adapters.remains import Remains
    from runner.adapters.succession import IDENTITY
    from runner.adapters.system import SystemClock

    place = Place(
        state_dir=settings.state_dir,
        runner=Keystore(settings.state_dir / IDENTITY).load().certificate.value.runner,
        boot_id=SystemClock().boot_id,
        # What was delegated to the daemon is not what was delegated to this shell.
        cgroups=None if settings.cgroup == cgroups.AUTO else cgroups.base(settings.cgroup),
    )
    policy, _problem = load_policy(settings.policy_file, [str(settings.state_dir / "worktrees")])
    remains = Remains(place, lambda: policy.outlive)
    remains.recall()
    return remains
