"""`exec` and `ps`: executions, as a person at a shell wants them."""

import os
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import click

from controlplane.client import Json, PlaneClient, PlaneRefused, PlaneUnreachable
from controlplane.follow import (
    Left,
    follow_log,
    stop_aside,
    stop_at_interrupt,
    tell_on_stderr,
    wait_for_end,
)
from controlplane.reach import (
    LIVING,
    ExitCode,
    Reach,
    explain,
    pairs,
    pass_reach,
    path_id,
    secret,
    without_none,
)
from controlplane.render import complain, moment, print_table, try_again
from protocol.choices import Overflow
from protocol.errors import RemoteError
from protocol.logevents import WithEvents
from terminal.options import DURATION, as_json
from terminal.printing import log_text, print_json, shell_words, write_piece

if TYPE_CHECKING:
    from controlplane.feeder import Feeder

LIST_MAX: Final = 500
"""Executions in one listing: what a control plane gives at most."""


@click.command("exec", short_help="Run a command on a runner.")
@click.argument("runner", metavar="RUNNER")
@click.argument("argv", metavar="CMD [ARG]...", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--worktree", metavar="ID", help="Run in this managed worktree.")
@click.option("--subdir", metavar="DIR", help="In this directory of the worktree.")
@click.option("--cwd", metavar="DIR", help="Run in this directory of the runner's machine (absolute).")
@click.option(
    "--env", "-e", "env", multiple=True, metavar="K=V", help="Set a variable; may be repeated. Not for secrets."
)
@click.option(
    "--secret",
    "secrets",
    multiple=True,
    metavar="NAME[=@FILE]",
    help="Pass a secret, from a file or from this environment; may be repeated.",
)
@click.option("--timeout", type=DURATION, metavar="DURATION", help="End it after this long.")
@click.option("--grace", type=DURATION, metavar="DURATION", help="Between TERM and KILL when it is stopped.")
@click.option("--idle-timeout", type=DURATION, metavar="DURATION", help="End it when it printed nothing for this long.")
@click.option(
    "--overflow",
    type=click.Choice([each.value for each in Overflow]),
    default=Overflow.HEAD_TAIL.value,
    show_default=True,
    help="At the limit of its log: keep its beginning and its newest, let it wait, or keep no more.",
)
@click.option("--stdin", "-i", "interactive", is_flag=True, help="Pass on what comes on stdin, and its end.")
@click.option("--detach", "-d", is_flag=True, help="Only order it, and print its id.")
@as_json
@click.pass_context
def execute(
    ctx: click.Context,
    /,
    runner: str,
    argv: tuple[str, ...],
    interactive: bool,
    detach: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Run a command on a runner and be it: its output, its exit status.

    stdout and stderr stay apart and come byte for byte. ^C stops the execution and waits for its end; ^C again
    leaves. When whoever reads the output leaves, as `head` does, it is stopped too (status 141). A control plane that
    restarts meanwhile is waited for. The exit status is the command's own, 128 + n when signal n killed it, 125 when we failed
    (the reason is on stderr). With --json nothing is streamed: the execution is printed at its end, whose output
    `runner-control logs` gives.

    A secret is sealed to the runner's key and becomes a variable of the command alone. `--secret NAME` takes it from
    your environment, `--secret NAME=@FILE` from a file, without the newline at its end.

    \b
    Examples:
      runner-control exec laptop --cwd /home/me/src -- make -j4 test
      runner-control exec laptop --worktree wt_1 --timeout 10m -- pytest -q > out.txt
      runner-control exec laptop --cwd /tmp --secret API_TOKEN=@token.txt --env MODE=ci -- ./deploy
      runner-control exec laptop --cwd /tmp --detach -- sleep 600
      tar c src | runner-control exec -i laptop --cwd /tmp -- tar x
    """
    feeder = _feeder(interactive=interactive, detach=detach)
    body = _body(argv, **options) | ({} if feeder is None else {"stdin": {"key": feeder.public_key}})
    reach = ctx.find_object(Reach)
    assert reach is not None, "the group makes it"
    with reach.client() as client:
        try:
            ordered = client.post(f"/runners/{path_id(runner)}/executions", body)
            if detach:
                print_json(ordered) if as_json else click.echo(ordered["id"])
                return
            if ordered["waits"]:
                tell_on_stderr(f"{ordered['id']} waits: {ordered['waits']}")
            ended = _be(client, ordered, feeder, quiet=as_json)
        except Left:
            complain("left; it goes on until it has stopped", f"runner-control logs -f {ordered['id']}")
            ctx.exit(ExitCode.INTERRUPTED)
        except BrokenPipeError:
            if detach:
                raise
            _stop_unread(client, ordered)
            ctx.exit(ExitCode.UNREAD)
        except (PlaneRefused, PlaneUnreachable, RemoteError) as exc:
            explain(exc)
            if as_json:
                print_json({"error": {"reason": getattr(exc, "reason", "UNREACHABLE"), "detail": str(exc)}})
            ctx.exit(ExitCode.FAILED)
    if as_json:
        print_json(ended)
    ctx.exit(_status(ended))


def _feeder(*, interactive: bool, detach: bool) -> "Feeder | None":
    if interactive and detach:
        raise click.UsageError("--stdin and --detach: somebody has to stay and write")
    if not interactive:
        return None
    # Keys and messages are for this alone, and take as long to load as all the rest.
    from controlplane.feeder import Feeder

    return Feeder()


def _body(
    argv: tuple[str, ...],
    *,
    worktree: str | None,
    subdir: str | None,
    cwd: str | None,
    env: tuple[str, ...],
    secrets: tuple[str, ...],
    timeout: int | None,
    grace: int | None,
    idle_timeout: int | None,
    overflow: str,
) -> Json:
    if (worktree is None) == (cwd is None):
        raise click.UsageError("say where: --worktree ID (a managed worktree) or --cwd DIR (a directory of the runner)")
    if cwd is not None and not cwd.startswith("/"):
        raise click.BadParameter("expected an absolute path of the runner's machine", param_hint="--cwd")
    if subdir is not None and worktree is None:
        raise click.UsageError("--subdir goes with --worktree")
    return without_none(
        {
            "argv": list(argv),
            "cwd": cwd,
            "worktree": worktree,
            "subdir": subdir,
            "env": pairs(env, "--env"),
            "secrets": dict(map(secret, secrets)),
            "timeout_ms": timeout,
            "grace_ms": grace,
            "idle_timeout_ms": idle_timeout,
            "overflow": overflow,
            "events": True,
        }
    )


def _be(client: PlaneClient, ordered: Json, feeder: "Feeder | None", *, quiet: bool) -> Json:
    """Follow the attempt to its end; ^C stops it. What somebody else has run again later is not ours."""
    execution_id, attempt = ordered["id"], ordered["start_token"]
    if feeder is not None:
        feeder.begin(client.url, client.token, ordered)
    stop = partial(stop_aside, client.url, client.token, execution_id, attempt, tell_on_stderr)
    with stop_at_interrupt(stop, tell_on_stderr):
        if not quiet:
            text = WithEvents(log_text(raw=True), bars=sys.stderr.isatty())
            follow_log(client, execution_id, 0, text, write_piece, attempt)
        return wait_for_end(client, execution_id, attempt)


def _stop_unread(client: PlaneClient, ordered: Json) -> None:
    """Whoever read the output has left: end the execution, as a broken pipe ends a command of this machine."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    # What is still buffered for the reader would fail once more when this process ends.
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    execution_id = ordered["id"]
    complain(f"nobody reads its output any more: stopping {execution_id}", f"runner-control show {execution_id}")
    stop_aside(client.url, client.token, execution_id, ordered["start_token"], tell_on_stderr)


def _status(ended: Json) -> int:
    """The exit status, with a word on stderr where it is not the command's own doing."""
    if ended["state"] in LIVING:
        complain(f"{ended['id']}: a later attempt took its place", f"runner-control logs -f {ended['id']}")
        return ExitCode.FAILED
    settlement = ended["settlement"] or {}
    verdict, cause = settlement.get("verdict"), settlement.get("cause") or {}
    if verdict in ("exited", "signalled"):
        return int(ended["exit_status"])
    why = " ".join(
        str(part) for part in (ended["reason"] or cause.get("reason"), ended["detail"] or cause.get("detail")) if part
    )
    words = str(ended["verdict"] or ended["state"]).replace("_", " ")
    again = try_again(ended["retry_after_ms"])
    complain(f"{ended['id']} {words}{': ' if why else ''}{why}{again}", f"runner-control show {ended['id']}")
    status = ended["exit_status"]
    return ExitCode.FAILED if status is None else int(status)


@click.command(short_help="List executions.")
@click.option("--all", "-a", "everything", is_flag=True, help="Also executions that have ended.")
@click.option("--runner", metavar="RUNNER", help="Only of this runner.")
@as_json
@pass_reach
def ps(reach: Reach, everything: bool, runner: str | None, as_json: bool) -> None:
    """List executions, newest first: those under way, or the newest 500 of all.

    \b
    Examples:
      runner-control ps
      runner-control ps --all --runner laptop --json
    """
    with reach.client() as client:
        states: tuple[str | None, ...] = (None,) if everything else LIVING
        answers = [client.get("/executions", runner=runner, state=state, limit=LIST_MAX) for state in states]
    found = [one for answer in answers for one in answer["executions"]]
    found.sort(key=lambda one: (-one["created_ms"], one["id"]))
    if as_json:
        print_json({"executions": found})
    else:
        print_table(("ID", "RUNNER", "STATE", "STATUS", "CREATED", "LOG", "COMMAND"), list(map(_row, found)))


def _row(one: Json) -> tuple[str, ...]:
    status = "-" if one["exit_status"] is None else str(one["exit_status"])
    stopping = "stopping" if one["stop_requested"] and one["state"] in LIVING else one["state"]
    return (
        one["id"],
        one["runner_name"],
        stopping,
        one["waits"] or one["reason"] or status,
        moment(one["created_ms"]),
        str(one["log"]["end"]),
        shell_words(one["argv"]),
    )


VERBS: Final[tuple[click.Command, ...]] = (execute, ps)
