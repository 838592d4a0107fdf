"""`worktree`: managed worktrees on a runner's machine."""

import click

from controlplane.client import WAIT_MS_MAX, Json, PlaneClient, PlaneUnreachable
from controlplane.follow import Patience
from controlplane.reach import ExitCode, Reach, pass_reach, path_id, without_none
from controlplane.render import complain, moment, print_table, try_again
from terminal.options import as_json
from terminal.printing import print_json

UNDER_WAY = frozenset({"queued", "creating", "removing"})


@click.group()
def worktree() -> None:
    """Make, list and remove managed worktrees.

    \b
    Example:
      runner-control worktree create laptop --repo /home/me/src --base main
    """


@worktree.command(short_help="Make a worktree.")
@click.argument("runner", metavar="RUNNER")
@click.option("--repo", required=True, metavar="PATH", help="The repository on the runner's machine (absolute).")
@click.option("--base", required=True, metavar="REF", help="The commit to start from: a branch, tag or id.")
@click.option("--branch", metavar="NAME", help="Make this branch; without it HEAD is detached.")
@click.option("--id", "worktree_id", metavar="ID", help="Its id [default: a new one].")
@as_json
@click.pass_context
def create(
    ctx: click.Context, runner: str, repo: str, base: str, branch: str | None, worktree_id: str | None, as_json: bool
) -> None:
    """Make a worktree and wait until it is there; prints its id and path.

    \b
    Example:
      runner-control worktree create laptop --repo /home/me/src --base main --branch agent/one
    """
    body = without_none({"repo": repo, "base": base, "branch": branch, "id": worktree_id})
    reach = ctx.find_object(Reach)
    assert reach is not None, "the group makes it"
    with reach.client() as client:
        made = _settled(client, client.post(f"/runners/{path_id(runner)}/worktrees", body))
    _tell(ctx, made, "ready", f"{made['id']}\t{made['path']}", as_json=as_json)


@worktree.command(short_help="Remove a worktree.")
@click.argument("worktree_id", metavar="ID")
@click.option("--force", is_flag=True, help="Even with changes that are in no commit: they are lost.")
@as_json
@click.pass_context
def remove(ctx: click.Context, worktree_id: str, force: bool, as_json: bool) -> None:
    """Remove a worktree and wait until it is gone. Its branch stays.

    \b
    Example:
      runner-control worktree remove wt_1
    """
    reach = ctx.find_object(Reach)
    assert reach is not None, "the group makes it"
    with reach.client() as client:
        gone = _settled(client, client.post(f"/worktrees/{path_id(worktree_id)}/remove", {"force": force}))
    _tell(ctx, gone, "removed", f"{gone['id']} removed", as_json=as_json)


@worktree.command()
@click.option("--runner", metavar="RUNNER", help="Only of this runner.")
@as_json
@pass_reach
def ls(reach: Reach, runner: str | None, as_json: bool) -> None:
    """List worktrees.

    \b
    Example:
      runner-control worktree ls --runner laptop
    """
    with reach.client() as client:
        found = client.get("/worktrees", runner=runner)
    if as_json:
        print_json(found)
        return
    names = ("id", "runner_name", "state", "branch", "repo", "path")
    rows = [(moment(one["created_ms"]), *(str(one[name] or "-") for name in names)) for one in found["worktrees"]]
    print_table(("CREATED", "ID", "RUNNER", "STATE", "BRANCH", "REPOSITORY", "PATH"), rows)


def _settled(client: PlaneClient, found: Json) -> Json:
    patience = Patience()
    while found["state"] in UNDER_WAY:
        try:
            found = client.get(f"/worktrees/{found['id']}", wait_ms=WAIT_MS_MAX)
            patience.renew()
        except PlaneUnreachable as exc:
            patience.spend(exc)
    return found


def _tell(ctx: click.Context, found: Json, wanted: str, line: str, *, as_json: bool) -> None:
    if as_json:
        print_json(found)
    elif found["state"] == wanted and not found["reason"]:
        click.echo(line)
    if found["state"] != wanted or found["reason"]:
        why = " ".join(str(part) for part in (found["reason"], found["detail"]) if part)
        why += try_again(found["retry_after_ms"])
        complain(f"{found['id']} is {found['state']}: {why}", f"runner-control show {found['id']}")
        ctx.exit(ExitCode.REFUSED)
