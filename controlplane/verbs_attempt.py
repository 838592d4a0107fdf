"""`stop` and `rerun`: an execution's end, and another attempt of it."""

from typing import Final

import click

from controlplane.reach import LIVING, Reach, pass_reach, path_id, secret, without_none
from terminal.options import DURATION, as_json
from terminal.printing import print_json


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


VERBS: Final[tuple[click.Command, ...]] = (stop, rerun)
