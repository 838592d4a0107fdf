"""`runner ps` and `runner stop`: what runs here, and ending it."""

from typing import TYPE_CHECKING, Any

import click

from protocol.text import show_age, show_size
from runner.adapters.control_client import ControlUnavailable, call_control
from runner.adapters.wallclock import wall_ms
from runner.errors import Refused
from runner.render import complain, print_table, show_admission
from runner.verbs.options import CALL_TIMEOUT_S, ExitCode, settings_of, socket_of
from terminal.options import DURATION, as_json
from terminal.printing import print_json, shell_words

if TYPE_CHECKING:
    from runner.adapters.attemptfiles import AttemptFiles
    from runner.config import Settings


@click.command(short_help="List the attempts on this machine.")
@click.option("--all", "-a", "everything", is_flag=True, help="Also attempts that have ended.")
@as_json
@click.pass_context
def ps(ctx: click.Context, everything: bool, as_json: bool) -> None:
    """List the attempts on this machine: those that live, or all that are still known.

    A PTY has a TTY: the columns and rows that it was opened with. Without a daemon the list comes from the attempts' own
    files, which say less.

    \b
    Examples:
      runner ps
      runner ps --all --json
    """
    settings = settings_of(ctx)
    try:
        said = call_control(socket_of(settings), "ps", {"all": everything}, CALL_TIMEOUT_S)
    except ControlUnavailable:
        said = {"attempts": _from_files(settings, everything=everything), "omitted": 0}
        if not as_json:
            complain("the daemon is not running; this is what the files say", "runner start")
    if as_json:
        print_json(said)
    else:
        now_ms = wall_ms()
        rows = [_row(one, now_ms) for one in said["attempts"]]
        titles: tuple[str, ...] = ("ATTEMPT", "STATE", "PID", "AGE", "ENDED", "LOG", "COMMAND")
        if any(one.get("terminal") for one in said["attempts"]):
            titles = (*titles[:3], "TTY", *titles[3:])
            sizes = [str(one.get("terminal") or "-") for one in said["attempts"]]
            rows = [(*row[:3], size, *row[3:]) for row, size in zip(rows, sizes, strict=True)]
        print_table(titles, rows)
        if omitted := said.get("omitted"):
            click.echo(f"{omitted} older ones are left out", err=True)
        if (admission := said.get("admission") or {}).get("state", "open") != "open":
            click.echo(show_admission(admission), err=True)


def _row(attempt: dict[str, Any], now_ms: int) -> tuple[str, ...]:
    started, ended = attempt.get("started_ms"), attempt.get("ended_ms")
    verdict, exit_status = attempt.get("verdict"), attempt.get("exit_status")
    return (
        str(attempt.get("attempt")),
        str(attempt.get("state")),
        str(attempt.get("pid") or "-"),
        show_age((ended or now_ms) - started) if isinstance(started, int) and started else "-",
        "-" if not verdict else f"{verdict} {'' if exit_status is None else exit_status}".rstrip(),
        "-" if attempt.get("log_end") is None else show_size(attempt["log_end"]),
        shell_words(attempt.get("argv") or ()),
    )


def _from_files(settings: "Settings", *, everything: bool) -> list[dict[str, Any]]:
    from runner.adapters.attemptfiles import attempt_directories, read_attempt

    found = [read_attempt(directory) for directory in attempt_directories(settings.state_dir)]
    return [_told(files) for files in found if everything or files.alive]


def _told(files: "AttemptFiles") -> dict[str, Any]:
    from runner.adapters.attemptfiles import shown_size, written_end

    execution_id, _dot, token = files.name.rpartition(".")
    ended = files.exit or {}
    log = ended.get("log")
    ended_ns = ended.get("ended_ns")
    return {
        "attempt": files.name,
        "execution_id": execution_id,
        "start_token": int(token),
        "state": files.state,
        "argv": list(files.argv),
        "cwd": files.cwd,
        "terminal": shown_size(files),
        "pid": files.child_pid,
        "started_ms": files.started_ms,
        "ended_ms": ended_ns // 1_000_000 if isinstance(ended_ns, int) else None,
        "verdict": ended.get("verdict"),
        "exit_status": shell_status(ended) if ended else None,
        "log_end": log.get("end") if isinstance(log, dict) else written_end(files.directory),
        "acked": None,
        "lease": None,
    }


def shell_status(ended: dict[str, Any]) -> int:
    """An exit record as a shell would say it; 125 is our failure."""
    from protocol.receipt import INFRA_STATUS

    code, signal = ended.get("code"), ended.get("signal")
    if ended.get("verdict") == "never_started":
        return INFRA_STATUS
    if isinstance(signal, int):
        return 128 + signal
    return code if isinstance(code, int) else INFRA_STATUS


@click.command(short_help="Stop an execution.")
@click.argument("execution_id", metavar="EXECUTION")
@click.option("--grace", type=DURATION, metavar="DURATION", help="Between TERM and KILL [default: the command's own].")
@as_json
@click.pass_context
def stop(ctx: click.Context, execution_id: str, grace: int | None, as_json: bool) -> None:
    """Stop an execution: TERM to all of its processes, then KILL; a PTY is hung up first. The control plane is told that
    it was stopped here, once it can be. The stop is ordered when this returns; `runner logs -f` shows the end.

    \b
    Examples:
      runner stop ex_01jx
      runner stop ex_01jx --grace 500ms
    """
    settings = settings_of(ctx)
    args = {"execution_id": execution_id, "grace_ms": grace}
    try:
        said = call_control(socket_of(settings), "stop", args, CALL_TIMEOUT_S)
    except ControlUnavailable as exc:
        said = _without_daemon(ctx, settings, execution_id, exc)
    except Refused as exc:
        complain(str(exc), "runner ps --all")
        ctx.exit(ExitCode.INTERNAL)
    if as_json:
        print_json(said)
    else:
        click.echo(f"{said.get('attempt')} {said.get('state')}")
        if said.get("state") != "ended":
            click.echo(f"next: runner logs -f {said.get('attempt')}", err=True)


def _without_daemon(
    ctx: click.Context, settings: "Settings", execution_id: str, exc: ControlUnavailable
) -> dict[str, Any]:
    """What the files say of an attempt that has ended; one that lives needs the daemon, and that is the end here."""
    from runner.adapters.attemptfiles import find_attempt, read_attempt

    try:
        files = read_attempt(find_attempt(settings.state_dir, execution_id))
    except Refused as refused:
        complain(str(refused), "runner ps --all")
        ctx.exit(ExitCode.INTERNAL)
    if files.exit is None:
        complain(f"{files.name} is {files.state}, and only the daemon can stop it: {exc.detail}", "runner start")
        ctx.exit(ExitCode.INTERNAL)
    return {"attempt": files.name, "state": "ended"}
