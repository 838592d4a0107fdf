"""The command line of the reference control plane: run one, and ask one by its REST interface."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from controlplane import (
    verbs_attach,
    verbs_attempt,
    verbs_execution,
    verbs_logs,
    verbs_pty,
    verbs_statement,
    verbs_worktree,
)
from controlplane.reach import (
    DEFAULT_URL,
    ExitCode,
    Front,
    Reach,
    data_dir,
    page_origins,
    pairs,
    pass_reach,
    plane_url,
    without_none,
)
from controlplane.render import complain, moment, print_table
from terminal.options import as_json
from terminal.printing import print_facts, print_json, wants_colour

if TYPE_CHECKING:
    from controlplane.server import Announcement

DEFAULT_LISTEN: Final = "127.0.0.1:7410"
_MARKS: Final = {True: "online", False: "offline"}


def _version(ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted:
        from protocol.messages import PROTOCOL_VERSION
        from protocol.version import VERSION

        click.echo(f"runner-control {VERSION} (protocol {PROTOCOL_VERSION})")
        ctx.exit()


@click.group(cls=Front, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--url",
    envvar="LOCAL_RUNNER_CONTROL_URL",
    metavar="URL",
    default=DEFAULT_URL,
    show_default=True,
    callback=plane_url,
    help="The control plane.",
)
@click.option(
    "--token-file",
    envvar="LOCAL_RUNNER_CONTROL_TOKEN_FILE",
    metavar="FILE",
    help="Its admin token [default: ~/.local/state/runner-control/admin.token].",
)
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Print versions and exit."
)
@click.pass_context
def cli(ctx: click.Context, url: str, token_file: str | None) -> None:
    """Run a control plane on this machine, and order work from it.

    \b
    A first day:
      runner-control serve                              prints a join string for `runner enroll`
      runner-control runners                            who is enrolled, who is online
      runner-control exec laptop --cwd /src -- make     run it there, see it here
      runner-control worktree create laptop --repo /src --base main
      runner-control receipts EXECUTION                 what the runner signed

    Exit codes: 0 ok, 1 refused, 2 usage, 3 no token, 5 another control plane has the data directory, 6 no control plane
    answers; `exec` ends with the command's own status, 128 + n when signal n killed it, 125 when we failed.
    """
    ctx.color = wants_colour(os.environ)
    ctx.obj = Reach(url, token_file)


@cli.command(short_help="Run the control plane in the foreground.")
@click.option(
    "--db",
    type=click.Path(dir_okay=False, resolve_path=True),
    metavar="PATH",
    help="The SQLite file; its directory holds keys and logs too [default: ~/.local/state/runner-control/control.db].",
)
@click.option("--listen", default=DEFAULT_LISTEN, show_default=True, metavar="HOST:PORT", help="Where to listen.")
@click.option("--allow-remote", is_flag=True, help="Allow an address that other machines reach, without TLS.")
@click.option(
    "--origin",
    "origins",
    multiple=True,
    metavar="ORIGIN",
    callback=page_origins,
    help="Pages of this origin may show PTYs, beside our own: https://HOST[:PORT]; may be repeated.",
)
@click.option(
    "--log-format",
    type=click.Choice(["auto", "json", "console"]),
    default="auto",
    show_default=True,
    help="How its log is written to stderr; auto: console at a terminal, json elsewhere.",
)
@click.pass_context
def serve(
    ctx: click.Context, db: str | None, listen: str, allow_remote: bool, origins: tuple[str, ...], log_format: str
) -> None:
    """Run the control plane in the foreground, until SIGTERM or SIGINT.

    The first start makes its keys and prints the root's fingerprint and a join string for the first runner.

    \b
    Examples:
      runner-control serve
      runner-control serve --db ./demo/plane.db --listen 127.0.0.1:0
    """
    from controlplane.errors import AnotherPlane, StartRefused

    host, port = _address(listen)
    path = Path(db) if db else data_dir() / "control.db"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if log_format == "auto":
        log_format = "console" if sys.stderr.isatty() else "json"
    try:
        from controlplane.server import serve as run  # failpoints that are armed wrongly refuse the start

        place = (path.parent, path, host, port)
        run(*place, allow_remote=allow_remote, log_format=log_format, announce=_announce, origins=origins)
    except AnotherPlane as exc:
        complain(str(exc), "runner-control runners   (it may be running already), or serve --db PATH elsewhere")
        ctx.exit(ExitCode.ANOTHER_PLANE)
    except StartRefused as exc:
        complain(str(exc), "runner-control serve --help")
        ctx.exit(ExitCode.REFUSED)


def _address(listen: str) -> tuple[str, int]:
    host, colon, port = listen.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise click.BadParameter("expected HOST:PORT", param_hint="--listen")
    return host.strip("[]"), int(port)


def _announce(said: "Announcement") -> None:
    place = f"[{said.host}]" if ":" in said.host else said.host
    facts = [
        ("control plane", f"http://{place}:{said.port}"),
        ("data", str(said.data_dir)),
        ("root", said.root_fingerprint),
    ]
    print_facts(facts)
    if said.join is not None:
        click.echo(
            f"\n{click.style('Enrol a runner with:', fg='green', bold=True)} echo '{said.join}' | runner enroll -"
        )
    else:
        click.echo("Another runner: runner-control enroll-token")


@cli.command("enroll-token", short_help="Make a join string for one more runner.")
@click.option("--name", metavar="NAME", help="The only name it may enrol.")
@click.option("--label", "labels", multiple=True, metavar="K=V", help="A label the runner gets; may be repeated.")
@as_json
@pass_reach
def enroll_token(reach: Reach, name: str | None, labels: tuple[str, ...], as_json: bool) -> None:
    """Make a join string: good once, for ten minutes. The last line is the join string alone.

    \b
    Examples:
      runner-control enroll-token --name laptop
      runner-control enroll-token | tail -1 | ssh laptop runner enroll -
    """
    with reach.client() as client:
        made = client.post("/join-tokens", without_none({"name": name, "labels": pairs(labels, "--label")}))
    if as_json:
        print_json(made)
        return
    click.echo(f"good once, until {moment(made['expires_ms'])}; on the machine to enrol: runner enroll -", err=True)
    click.echo(made["join"])


@cli.command()
@as_json
@pass_reach
def runners(reach: Reach, as_json: bool) -> None:
    """List the enrolled runners.

    \b
    Example:
      runner-control runners --json | jq '.runners[] | select(.online)'
    """
    with reach.client() as client:
        found = client.get("/runners")
    if as_json:
        print_json(found)
        return
    print_table(
        ("NAME", "ID", "SESSION", "SEEN", "ATTEMPTS", "VERSION", "HOST", "LABELS"),
        [_runner(one) for one in found["runners"]],
    )


def _runner(one: dict[str, Any]) -> tuple[str, ...]:
    labels = " ".join(f"{name}={value}" for name, value in one["labels"].items())
    known = (str(one[name] or "-") for name in ("version", "hostname"))
    return (
        one["name"],
        one["id"],
        _MARKS[one["online"]] if one["admission"] in ("", "open") else one["admission"],
        moment(one["last_seen_ms"]),
        str(one["attempts"]),
        *known,
        labels,
    )


for verb in (
    *verbs_execution.VERBS,
    *verbs_logs.VERBS,
    *verbs_attempt.VERBS,
    *verbs_attach.VERBS,
    verbs_pty.pty,
    verbs_worktree.worktree,
    *verbs_statement.VERBS,
):
    cli.add_command(verb)


@cli.command(short_help="List what runners told and refused.")
@click.option("--runner", metavar="RUNNER", help="Only of this runner.")
@click.option(
    "--limit", type=click.IntRange(1, 500), metavar="N", default=50, show_default=True, help="At most so many."
)
@as_json
@pass_reach
def events(reach: Reach, runner: str | None, limit: int, as_json: bool) -> None:
    """List what runners told and what they refused, newest first.

    \b
    Example:
      runner-control events --runner laptop --limit 10
    """
    with reach.client() as client:
        found = client.get("/events", runner=runner, limit=limit)
    if as_json:
        print_json(found)
        return
    columns = ("runner", "kind", "reason", "detail")
    rows = [(moment(one["at_ms"]), *(str(one[name] or "-") for name in columns)) for one in found["events"]]
    print_table(("AT", "RUNNER", "KIND", "REASON", "DETAIL"), rows)


def main() -> None:
    """Entry point of the `runner-control` command."""
    # No other package gets to look into what is validated here; and to search all that is installed for one takes a while.
    os.environ["PYDANTIC_DISABLE_PLUGINS"] = "__all__"
    cli(prog_name="runner-control")


if __name__ == "__main__":
    main()
