"""`stop`, `signal` and `rerun`: an execution's end, what is said to it before, and another attempt of it."""

from typing import Final

import click

from controlplane.reach import LIVING, ExitCode, Reach, pass_reach, path_id, secret, without_none
from controlplane.render import complain
from protocol.choices import SignalName
from terminal.options import DURATION, as_json
from terminal.printing import print_json

SIGNAL_WAIT_MS: Final = 15_000
"""A runner that is there answers within milliseconds; a signal that comes later than this surprises whoever sent it."""
_OPEN: Final = ("queued", "sent")


@click.command(short_help="Stop an execution.")
@click.argument("execution_id", metavar="ID")
@click.option(
    "--grace", type=DURATION, metavar="DURATION", help="Between TERM and KILL [default: the execution's own]."
)
@click.option("--runner", metavar="RUNNER", help="At this runner, also when it is not known here that it runs there.")
@click.option("--token", type=click.IntRange(min=1), metavar="N", help="This attempt of it [default: the current one].")
@as_json
@pass_reach
def stop(
    reach: Reach, execution_id: str, grace: int | None, runner: str | None, token: int | None, as_json: bool
) -> None:
    """Order an execution to stop; one that has ended stays as it is.

    What lives on a runner and was not ordered here is left alone until somebody signs its end: name it and its runner
    (`runner-control show RUNNER` lists it).

    \b
    Examples:
      runner-control stop ex_1 --grace 2s
      runner-control stop ex_9 --runner laptop --token 1
    """
    body = without_none({"grace_ms": grace, "runner": runner, "start_token": token})
    with reach.client() as client:
        said = client.post(f"/executions/{path_id(execution_id)}/stop", body)
    if as_json:
        print_json(said)
    else:
        state = "stopping" if said["state"] in LIVING else said["state"]
        click.echo(f"{said['id']} is {state}" + (f" at {said['runner_name']}" if runner is not None else ""))


@click.command(short_help="Run an execution once more.")
@click.argument("execution_id", metavar="ID")
@click.option("--runner", metavar="RUNNER", help="On this runner [default: its own].")
@click.option(
    "--secret",
    "secrets",
    multiple=True,
    metavar="NAME[=@FILE]",
    help="A secret that it had: their values were not kept; may be repeated.",
)
@as_json
@pass_reach
def rerun(reach: Reach, execution_id: str, runner: str | None, secrets: tuple[str, ...], as_json: bool) -> None:
    """Order another attempt of an execution: the same request, under a higher token, in place of the attempt before.

    An attempt that still lives is ended: by its runner, before it begins the new one; on another runner, by a stop, and the
    new one waits until its lease is over. What runs in a worktree stays with its runner.

    \b
    Examples:
      runner-control rerun ex_1
      runner-control rerun ex_1 --runner desktop --secret API_TOKEN=@token.txt
      runner-control logs -f ex_1
    """
    body = without_none({"runner": runner, "secrets": dict(map(secret, secrets))})
    with reach.client() as client:
        said = client.post(f"/executions/{path_id(execution_id)}/attempts", body)
    if as_json:
        print_json(said)
        return
    waits = f" ({said['waits']})" if said["waits"] else ""
    click.echo(f"{said['id']}: attempt {said['start_token']} on {said['runner_name']} is {said['state']}{waits}")


@click.command(short_help="Send an execution a signal.")
@click.argument("execution_id", metavar="ID")
@click.argument("name", metavar="SIGNAL", type=click.Choice([each.value for each in SignalName], case_sensitive=False))
@click.option("--tree", is_flag=True, help="To every process of it, not only to the command itself.")
@click.option("--token", type=click.IntRange(min=1), metavar="N", help="This attempt of it [default: the current one].")
@as_json
@pass_reach
def signal(reach: Reach, execution_id: str, name: str, tree: bool, token: int | None, as_json: bool) -> None:
    """Send a signal to an execution that runs: HUP, INT, USR1, USR2 or WINCH; to end it, use stop.

    It is sent once, whatever dies on the way, and waited for until its runner says whom it reached. A runner whose owner
    does not admit the signal refuses.

    \b
    Examples:
      runner-control signal ex_1 USR1
      runner-control signal ex_1 INT --tree
    """
    body = without_none({"signal": name, "to": "tree" if tree else "child", "start_token": token})
    with reach.client() as client:
        said = client.post(f"/executions/{path_id(execution_id)}/signal", body)
        if said["state"] in _OPEN:
            said = client.get(f"/orders/{path_id(said['cmd_id'])}", wait_ms=SIGNAL_WAIT_MS)
    if as_json:
        print_json(said)
    if said["outcome"] == "done":
        reached = said["result"].get("reached", 0)
        if not as_json:
            click.echo(f"{execution_id}: SIG{name} reached {reached} process{'' if reached == 1 else 'es'}")
        return
    why = " ".join(str(part) for part in (said["reason"], said["detail"]) if part) or f"it is {said['state']}"
    complain(f"SIG{name} for {execution_id}: {why}", f"runner-control show {execution_id}")
    click.get_current_context().exit(ExitCode.FAILED)


VERBS: Final[tuple[click.Command, ...]] = (stop, signal, rerun)
