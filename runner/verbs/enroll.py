"""`runner enroll`: make this machine's keys and have them certified by a control plane."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

import click

from protocol.errors import Reason
from runner.errors import AnotherDaemon, Refused, RunnerError
from runner.render import complain
from runner.verbs.options import ExitCode, roots_option, settings_of
from terminal.printing import print_facts

if TYPE_CHECKING:
    from protocol.identity import JoinString
    from runner.adapters.enrolment import MachineFacts
    from runner.adapters.keystore import Keystore

CONTROL: Final = "runner-control"
FACT_CHARS_MAX: Final = 200
"""What the protocol takes of a fact about a machine."""
LIVING_SHOWN: Final = 3
_NEXT_OF_DAEMON: Final = "systemctl --user stop runner   (or end `runner start`)"
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
@click.option(
    "--force", is_flag=True, help="With --replace: although the former control plane was not told everything."
)
@click.pass_context
def enroll(
    ctx: click.Context,
    join: str | None,
    token_file: TextIO | None,
    name: str | None,
    labels: dict[str, str],
    roots: tuple[str, ...],
    replace: bool,
    force: bool,
) -> None:
    """Enrol this machine with the control plane that gave you a join string.

    A join string holds a one-time token. Given as an argument, other users of this machine can see it while the command
    runs: prefer `-`, which reads it from standard input, or --token-file. The machine's keys are made here and never
    leave it. The control plane must prove to be the one whose fingerprint the join string names.

    A policy that says what commands may do here is written with comments, unless there is one.

    With --replace the machine becomes another runner, with new keys. The daemon must be down and nothing may live. Keys,
    journal and logs of the former runner are kept below `former` in the state directory, and nothing of them is sent.

    \b
    Examples:
      runner enroll -                          then paste the join string
      runner-control enroll-token | tail -1 | runner enroll -
      runner enroll --token-file join.txt --root ~/src --label team=web
    """
    wanted = _join_string(join, token_file)
    if force and not replace:
        raise click.UsageError("--force goes with --replace")
    settings = settings_of(ctx)

    from runner.adapters.keystore import Keystore
    from runner.adapters.policyfile import write_default
    from runner.adapters.succession import IDENTITY, NEXT_IDENTITY

    order = {"name": name or _own_name(), "labels": labels, "facts": _facts(), "proxy": settings.proxy}
    with _explained(ctx, replace=replace):
        former = _become(
            settings.state_dir,
            lambda: _asked(wanted, Keystore(settings.state_dir / NEXT_IDENTITY), order),
            replace=replace,
            force=force,
        )
    if not settings.policy_file.exists():
        write_default(settings.policy_file, roots or (str(Path.home()),))
    identity = Keystore(settings.state_dir / IDENTITY).load()
    mine = identity.certificate.value
    facts = [
        ("runner", f"{mine.name} ({mine.runner}) of {mine.org}"),
        ("key", identity.key.key_id),
        ("root", identity.root.fingerprint),
        ("policy", str(settings.policy_file)),
    ]
    print_facts([*facts, ("former", str(former))] if former is not None else facts)
    click.echo("next: runner service install --user --now   (or, in the foreground: runner start)")


def _asked(join: "JoinString", keystore: "Keystore", order: dict[str, Any]) -> None:
    """One exchange with the control plane; its answer is in the keystore then."""
    import anyio

    from runner.adapters.enrolment import enroll as ask

    anyio.run(partial(ask, join, keystore, **order))


def _become(state_dir: Path, ask: Callable[[], None], *, replace: bool, force: bool) -> Path | None:
    """Enrol and take the new identity, with the state directory to ourselves; returns where the former one is kept."""
    from runner.adapters.keystore import Keystore
    from runner.adapters.succession import IDENTITY, carry_through
    from runner.adapters.system import StateLock, make_private

    make_private(state_dir)
    with StateLock(state_dir / "runner.lock"):
        carry_through(state_dir)
        if Keystore(state_dir / IDENTITY).enrolled:
            _refuse_to_replace(state_dir, replace=replace, force=force)
        ask()
        return carry_through(state_dir)


@contextmanager
def _explained(ctx: click.Context, *, replace: bool) -> Iterator[None]:
    """What went wrong, as a sentence, the next step and an exit code."""
    from runner.adapters.enrolment import PlaneUnreachable

    try:
        yield
    except AnotherDaemon as exc:
        complain(str(exc), _NEXT_OF_DAEMON if replace else _NEXT[Reason.PRECONDITION_FAILED])
        ctx.exit(ExitCode.ANOTHER_DAEMON)
    except PlaneUnreachable as exc:
        complain(exc.detail, f"on the control plane's machine: {CONTROL} serve")
        ctx.exit(ExitCode.UNREACHABLE)
    except RunnerError as exc:
        complain(str(exc), exc.following if isinstance(exc, _NotNow) else _NEXT.get(exc.reason, "runner doctor"))
        ctx.exit(ExitCode.INTERNAL)


class _NotNow(Refused):
    """The former identity is not to be given up like this; `following` is what to do before."""

    def __init__(self, detail: str, following: str) -> None:
        self.following = following
        super().__init__(Reason.PRECONDITION_FAILED, detail)


def _refuse_to_replace(state_dir: Path, *, replace: bool, force: bool) -> None:
    """Raises _NotNow where the machine is a runner that is not to be given up."""
    from runner.adapters.succession import owed

    if not replace:
        raise _NotNow("this machine is enrolled already", _NEXT[Reason.PRECONDITION_FAILED])
    left = owed(state_dir)
    if left.living:
        # Under another identity nobody would look after them: they have to end first.
        names = " ".join(left.living[:LIVING_SHOWN])
        raise _NotNow(f"{len(left.living)} attempts live here: {names}", "runner start; runner stop EXECUTION")
    if left.words and not force:
        detail = f"the former control plane has not been told everything: {left.words}"
        raise _NotNow(detail, "runner start   (until `runner status` says all answered), or --replace --force")


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
    from protocol.version import VERSION
    from runner.adapters.enrolment import MachineFacts
    from runner.adapters.system import SystemClock

    system = os.uname()
    return MachineFacts(
        boot_id=SystemClock().boot_id,
        hostname=system.nodename[:FACT_CHARS_MAX],
        platform=f"{system.sysname} {system.release} {system.machine}"[:FACT_CHARS_MAX],
        version=VERSION,
    )


def _own_name() -> str:
    """The host name as an id: other characters become dashes."""
    from protocol.limits import ID_LENGTH_MAX

    short = os.uname().nodename.partition(".")[0]
    return (
        "".join(char if char.isascii() and (char.isalnum() or char in "_-") else "-" for char in short)[:ID_LENGTH_MAX]
        or "runner"
    )
