"""`runner enroll`: make this machine's keys and have them certified by a control plane."""

import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, TextIO

import click

from protocol.errors import Reason
from runner.errors import RunnerError
from runner.render import complain, print_facts
from runner.verbs.options import ExitCode, roots_option, settings_of

if TYPE_CHECKING:
    from protocol.identity import JoinString
    from runner.adapters.enrolment import MachineFacts

CONTROL: Final = "runner-control"
FACT_CHARS_MAX: Final = 200
"""What the protocol takes of a fact about a machine."""
_NEXT: Final = {
    Reason.BAD_JOIN_TOKEN: f"{CONTROL} enroll-token",
    Reason.PRECONDITION_FAILED: "runner enroll --replace JOIN-STRING",
    Reason.BAD_PROOF: f"{CONTROL} enroll-token   (and compare the fingerprints)",
}
JOIN_BYTES_MAX: Final = 1024
"""A join string has a host name of at most 253 characters; more is another file."""


def _labels(_ctx: click.Context, _option: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    labels = {}
    for label in given:
        name, equals, value = label.partition("=")
        if not name or not equals:
            raise click.BadParameter("expected NAME=VALUE")
        labels[name] = value
    return labels


@click.command(short_help="Enrol this machine with a control plane.")
@click.argument("join", metavar="[JOIN-STRING | -]", required=False)
@click.option("--token-file", type=click.File("r"), metavar="FILE", help="Read the join string from FILE.")
@click.option("--name", metavar="NAME", help="What the control plane calls this machine [default: its host name].")
@click.option("--label", "labels", multiple=True, metavar="K=V", callback=_labels, help="A label; may be repeated.")
@roots_option
@click.option("--replace", is_flag=True, help="Enrol again although this machine is enrolled.")
@click.pass_context
def enroll(
    ctx: click.Context,
    join: str | None,
    token_file: TextIO | None,
    name: str | None,
    labels: dict[str, str],
    roots: tuple[str, ...],
    replace: bool,
) -> None:
    """Enrol this machine with the control plane that gave you a join string.

    A join string holds a one-time token. Given as an argument, other users of this machine can see it while the command
    runs: prefer `-`, which reads it from standard input, or --token-file. The machine's keys are made here and never
    leave it. The control plane must prove to be the one whose fingerprint the join string names.

    A policy that says what commands may do here is written with comments, unless there is one.

    \b
    Examples:
      runner enroll -                          then paste the join string
      runner-control enroll-token | tail -1 | runner enroll -
      runner enroll --token-file join.txt --root ~/src --label team=web
    """
    wanted = _join_string(join, token_file)
    settings = settings_of(ctx)
    name = name or _own_name()

    import anyio

    from runner.adapters.enrolment import PlaneUnreachable, enroll
    from runner.adapters.keystore import Keystore
    from runner.adapters.policyfile import write_default

    settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    keystore = Keystore(settings.state_dir / "identity")
    order = partial(
        enroll, wanted, keystore, name=name, labels=labels, facts=_facts(), proxy=settings.proxy, replace=replace
    )
    try:
        certificate = anyio.run(order)
    except PlaneUnreachable as exc:
        complain(exc.detail, f"on the control plane's machine: {CONTROL} serve")
        ctx.exit(ExitCode.UNREACHABLE)
    except RunnerError as exc:
        complain(str(exc), _NEXT.get(exc.reason, "runner doctor"))
        ctx.exit(ExitCode.INTERNAL)
    if not settings.policy_file.exists():
        write_default(settings.policy_file, roots or (str(Path.home()),))
    identity = keystore.load()
    print_facts(
        [
            ("runner", f"{certificate.name} ({certificate.runner}) of {certificate.org}"),
            ("key", identity.key.key_id),
            ("root", identity.root.fingerprint),
            ("policy", str(settings.policy_file)),
        ]
    )
    click.echo("next: runner service install --user --now   (or, in the foreground: runner start)")


def _join_string(join: str | None, token_file: TextIO | None) -> "JoinString":
    from protocol.identity import JoinString

    if (join is None) == (token_file is None):
        raise click.UsageError("give a join string, `-` to read it from standard input, or --token-file FILE")
    if token_file is not None:
        text = token_file.read(JOIN_BYTES_MAX)
    elif join == "-":
        if sys.stdin.isatty():
            click.echo("join string: ", nl=False, err=True)
        text = sys.stdin.readline(JOIN_BYTES_MAX)
    else:
        text = join or ""
    try:
        return JoinString.parse(text)
    except ValueError as exc:
        raise click.UsageError(f"{exc}; runner-control enroll-token makes one") from None


def _facts() -> "MachineFacts":
    from importlib.metadata import version

    from runner.adapters.enrolment import MachineFacts
    from runner.adapters.system import SystemClock

    system = os.uname()
    return MachineFacts(
        boot_id=SystemClock().boot_id,
        hostname=system.nodename[:FACT_CHARS_MAX],
        platform=f"{system.sysname} {system.release} {system.machine}"[:FACT_CHARS_MAX],
        version=version("local-runner"),
    )


def _own_name() -> str:
    """The host name as an id: other characters become dashes."""
    from protocol.limits import ID_LENGTH_MAX

    short = os.uname().nodename.partition(".")[0]
    return (
        "".join(char if char.isascii() and (char.isalnum() or char in "_-") else "-" for char in short)[:ID_LENGTH_MAX]
        or "runner"
    )
