"""`pty`: terminals on runners' machines, which outlive whoever looks at them."""

import shutil
import time
from typing import Any, Final

import click

from controlplane.client import WAIT_MS_MAX, Json
from controlplane.follow import FINAL_STATES, print_log
from controlplane.reach import LIVING, Reach, pairs, pass_reach, path_id, secret, without_none
from controlplane.render import complain, moment, print_table
from protocol.choices import Background, SizePolicy
from protocol.limits import TERMINAL_CELLS_MAX
from terminal.logs import LogPrinter, read_request
from terminal.options import DURATION, as_json
from terminal.printing import print_json, shell_words

LIST_MAX: Final = 500
"""PTYs in one listing: what a control plane gives at most."""
_CELLS: Final = click.IntRange(1, TERMINAL_CELLS_MAX)


@click.group()
def pty() -> None:
    """Open, list, record and end terminals on runners' machines.

    \b
    Example:
      runner-control pty open laptop --cwd /home/me/src
    """


@pty.command("open", short_help="Open a terminal on a runner, and attach to it.")
@click.argument("runner", metavar="RUNNER")
@click.argument("argv", metavar="[CMD [ARG]...]", nargs=-1, type=click.UNPROCESSED)
@click.option("--worktree", metavar="ID", help="Begin in this managed worktree.")
@click.option("--subdir", metavar="DIR", help="In this directory of the worktree.")
@click.option("--cwd", metavar="DIR", help="Begin in this directory of the runner's machine (absolute).")
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
@click.option("--rows", type=_CELLS, metavar="N", help="Rows [default: this terminal's].")
@click.option("--cols", type=_CELLS, metavar="N", help="Columns [default: this terminal's].")
@click.option(
    "--size-policy",
    type=click.Choice([each.value for each in SizePolicy]),
    default=SizePolicy.LATEST.value,
    show_default=True,
    help="Whose size counts: of who told one last, the smallest of all, or this one for good.",
)
@click.option(
    "--background",
    type=click.Choice([each.value for each in Background]),
    default=Background.SWEEP.value,
    show_default=True,
    help="What becomes of processes that outlive the shell.",
)
@click.option("--timeout", type=DURATION, metavar="DURATION", help="End it after this long.")
@click.option("--grace", type=DURATION, metavar="DURATION", help="Between HUP and KILL when it is closed.")
@click.option("--idle-timeout", type=DURATION, metavar="DURATION", help="End it when it printed nothing for this long.")
@click.option("--read-only", is_flag=True, help="Attach to look on, and not to type.")
@click.option("--detach", "-d", is_flag=True, help="Only open it, and print its id.")
@as_json
@click.pass_context
def open_pty(
    ctx: click.Context,
    /,
    runner: str,
    argv: tuple[str, ...],
    read_only: bool,
    detach: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Open a terminal on a runner's machine and be it: what you type, what it shows, its exit status.

    Without CMD it is the login shell of the runner's user. It lives on when you leave (`~.` at the start of a line), when the network
    is gone and when the runner is restarted: `runner-control attach ID` is back in it.

    \b
    Examples:
      runner-control pty open laptop --cwd /home/me/src
      runner-control pty open laptop --worktree wt_1 -- vim README.md
      runner-control pty open laptop --cwd /tmp --detach -- make -j4
    """
    reach = ctx.find_object(Reach)
    assert reach is not None, "the group makes it"
    body = _body(path_id(runner), argv, **options)
    with reach.client() as client:
        made = client.post("/ptys", body)
        if detach or as_json:
            print_json(made) if as_json else click.echo(made["id"])
            return
        # What draws and types is for those that attach.
        from controlplane.ptyattach import attach_remote

        if made["waits"]:
            click.echo(f"{made['id']} waits: {made['waits']}", err=True)
        status = attach_remote(client, made["id"], mode="ro" if read_only else "rw", attach="replay")
        _explain(client.get(f"/ptys/{made['id']}"))
    ctx.exit(status)


def _body(
    runner: str,
    argv: tuple[str, ...],
    *,
    worktree: str | None,
    subdir: str | None,
    cwd: str | None,
    env: tuple[str, ...],
    secrets: tuple[str, ...],
    rows: int | None,
    cols: int | None,
    size_policy: str,
    background: str,
    timeout: int | None,
    grace: int | None,
    idle_timeout: int | None,
) -> Json:
    if (worktree is None) == (cwd is None):
        raise click.UsageError("say where: --worktree ID (a managed worktree) or --cwd DIR (a directory of the runner)")
    if cwd is not None and not cwd.startswith("/"):
        raise click.BadParameter("expected an absolute path of the runner's machine", param_hint="--cwd")
    if subdir is not None and worktree is None:
        raise click.UsageError("--subdir goes with --worktree")
    here = shutil.get_terminal_size()
    size = {"rows": rows or _within(here.lines), "cols": cols or _within(here.columns)}
    return without_none(
        {
            "runner": runner,
            "argv": list(argv),
            "cwd": cwd,
            "worktree": worktree,
            "subdir": subdir,
            "env": pairs(env, "--env"),
            "secrets": dict(map(secret, secrets)),
            "size": size,
            "size_policy": size_policy,
            "background": background,
            "timeout_ms": timeout,
            "grace_ms": grace,
            "idle_timeout_ms": idle_timeout,
        }
    )


def _within(cells: int) -> int:
    return max(1, min(cells, TERMINAL_CELLS_MAX))


def _explain(found: Json) -> None:
    """A word on stderr where the end was not the command's own doing."""
    if found["state"] not in FINAL_STATES or found["verdict"] in ("exited", "signalled"):
        return
    cause = (found["settlement"] or {}).get("cause") or {}
    why = " ".join(str(part) for part in (found["reason"] or cause.get("reason"), found["detail"]) if part)
    words = str(found["verdict"] or found["state"]).replace("_", " ")
    complain(f"{found['id']} {words}{': ' if why else ''}{why}", f"runner-control show {found['id']}")


@pty.command("ls", short_help="List terminals.")
@click.argument("runner", metavar="[RUNNER]", required=False)
@click.option("--all", "-a", "everything", is_flag=True, help="Also those that have ended.")
@as_json
@pass_reach
def ls(reach: Reach, runner: str | None, everything: bool, as_json: bool) -> None:
    """List terminals, newest first: those that live, or the newest 500 of all.

    \b
    Examples:
      runner-control pty ls
      runner-control pty ls laptop --all --json
    """
    with reach.client() as client:
        found = client.get("/ptys", runner=runner, all=int(everything), limit=LIST_MAX)
    if as_json:
        print_json(found)
        return
    print_table(("ID", "RUNNER", "STATE", "STATUS", "SIZE", "OPENED", "LOG", "COMMAND"), list(map(_row, found["ptys"])))


def _row(one: Json) -> tuple[str, ...]:
    status = "-" if one["exit_status"] is None else str(one["exit_status"])
    closing = "closing" if one["stop_requested"] and one["state"] in LIVING else one["state"]
    return (
        one["id"],
        one["runner_name"],
        closing,
        one["waits"] or one["reason"] or status,
        f"{one['size']['cols']}x{one['size']['rows']}",
        moment(one["created_ms"]),
        str(one["log"]["end"]),
        shell_words(one["argv"]) if one["argv"] else "(login shell)",
    )


@pty.command("kill", short_help="End a terminal.")
@click.argument("pty_id", metavar="ID")
@click.option("--grace", type=DURATION, metavar="DURATION", help="Between HUP and KILL [default: its own].")
@as_json
@pass_reach
def kill(reach: Reach, pty_id: str, grace: int | None, as_json: bool) -> None:
    """Hang a terminal up, and end what stays behind; wait until it is over, for half a minute at most.

    \b
    Example:
      runner-control pty kill ex_1 --grace 2s
    """
    path = f"/ptys/{path_id(pty_id)}"
    with reach.client() as client:
        said = client.post(f"{path}/close", without_none({"grace_ms": grace}))
        if said["state"] not in FINAL_STATES:
            said = client.get(f"/executions/{pty_id}", wait_ms=WAIT_MS_MAX)
    if as_json:
        print_json(said)
    else:
        click.echo(f"{said['id']} is {'closing' if said['state'] in LIVING else said['state']}")


@pty.command("record", short_help="Print a terminal as a recording.")
@click.argument("pty_id", metavar="ID")
@click.option("--follow", "-f", is_flag=True, help="Go on until it has ended.")
@pass_reach
def record(reach: Reach, pty_id: str, follow: bool) -> None:
    """Print what a terminal showed, with its times and sizes, as asciicast v3: what players of recordings take.

    \b
    Examples:
      runner-control pty record ex_1 > ex.cast
      runner-control pty record --follow ex_1 > ex.cast
    """
    request = read_request(
        time.time_ns() // 1_000_000,
        follow=follow,
        since=None,
        tail=None,
        offset=None,
        stream=None,
        timestamps=False,
        raw=False,
        as_json=False,
        export="asciicast",
        verify=False,
    )
    with reach.client() as client:
        client.get(f"/ptys/{path_id(pty_id)}")
        print_log(client, pty_id, request.wish, LogPrinter.of(request), follow=follow)
