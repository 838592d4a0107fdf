"""`runner logs`: what an execution said, from its files, and whether they are still what it said."""

from pathlib import Path
from typing import Any

import click

from protocol.errors import RemoteError
from runner.render import complain
from runner.verbs.options import ExitCode, settings_of
from terminal.logs import LogPrinter, LogRequest, log_options, print_proof, read_request


@click.command(short_help="Print what an execution wrote.")
@click.argument("wanted", metavar="[ID]", required=False)
@click.option("--daemon", "of_daemon", is_flag=True, help="The daemon's own log; with -f, --tail and --json only.")
@log_options
@click.pass_context
def logs(ctx: click.Context, /, wanted: str | None, of_daemon: bool, **options: Any) -> None:
    """Print what an execution wrote: its stdout to stdout, its stderr to stderr, byte for byte.

    ID is an execution (its newest attempt) or an attempt. No daemon is needed. What is lost is named on stderr:
    [gap: N bytes missing]. At a terminal control characters are shown escaped, unless --raw, and the end is told.

    --tail counts the lines of both streams together, looks back 64 MiB at most, and with -f goes on from there.
    --verify adds streams and segments up again and compares them with what was signed, or with exit.json.

    \b
    Examples:
      runner logs ex_01jx
      runner logs -f --tail 20 --timestamps ex_01jx
      runner logs --since 10m --stream stderr ex_01jx
      runner logs --json ex_01jx.1 | jq -r 'select(.kind == "stdout").data'
      runner logs --export asciicast ex_01jx > ex.cast
      runner logs --verify ex_01jx
      runner logs --daemon -f
    """
    from runner.adapters.attemptfiles import find_attempt
    from runner.adapters.wallclock import wall_ms
    from runner.errors import Refused

    settings = settings_of(ctx)
    if of_daemon:
        _refuse_others(wanted, options)
        from runner.verbs.daemon_logs import show_daemon_log

        ctx.exit(show_daemon_log(settings, follow=options["follow"], tail=options["tail"], as_json=options["as_json"]))
    if wanted is None:
        raise click.UsageError("an ID is missing: runner ps --all lists them (or --daemon)")
    request = read_request(wall_ms(), **options)
    try:
        directory = find_attempt(settings.state_dir, wanted)
    except Refused as exc:
        complain(str(exc), "runner ps --all")
        ctx.exit(ExitCode.INTERNAL)
    if request.verify:
        ctx.exit(ExitCode.OK if _verify(settings.state_dir, directory, as_json=request.as_json) else ExitCode.INTERNAL)
    try:
        _print(directory, request)
    except RemoteError as exc:
        complain(f"the log of {directory.name} is damaged: {exc.detail}", f"runner logs --verify {directory.name}")
        ctx.exit(ExitCode.INTERNAL)
    except KeyboardInterrupt:
        ctx.exit(130)


def _refuse_others(wanted: str | None, options: dict[str, Any]) -> None:
    """The daemon's log has lines and nothing else of what an execution's log has."""
    foreign = [name for name, value in options.items() if name not in ("follow", "tail", "as_json") and value]
    if wanted is not None or foreign:
        raise click.UsageError("--daemon goes with -f, --tail and --json, and with nothing else")


def _print(directory: Path, request: LogRequest) -> None:
    """Print what is wanted. Raises RemoteError when the log is damaged, behind what could be printed."""
    from runner.adapters.attemptfiles import LOG_DIR
    from runner.adapters.logview import Ended, Missing, find_start, view_log

    printer = LogPrinter.of(request)
    start = find_start(directory / LOG_DIR, request.wish)
    printer.begin(start.cuts)
    fate: dict[str, Any] | None = None
    for seen in view_log(directory, start.offset, follow=request.follow):
        if isinstance(seen, Ended):
            fate = {"verdict": "lost"} if seen.exit is None else seen.exit
        elif isinstance(seen, Missing):
            printer.gap(seen.start, seen.end)
        else:
            printer.show(seen)
    printer.finish(fate)


def _verify(state_dir: Path, directory: Path, *, as_json: bool) -> bool:
    """Prove the log and say what was found; whether all of it is proven."""
    from protocol.logproof import claim_of, prove
    from runner.adapters.attemptfiles import LOG_DIR, read_attempt
    from runner.adapters.logproof import signed_word, sums_of

    files = read_attempt(directory)
    signed = signed_word(state_dir, directory.name)
    claim = claim_of(signed or files.exit)
    proof = prove(sums_of(directory / LOG_DIR, directory.name, claim), claim)
    if claim is not None:
        told = claim_of(files.exit)
        if signed is None:
            proof.missing.append(
                "the signature: the journal has no settlement with it any more; compared with exit.json"
            )
        elif told is not None and told != claim:
            proof.wrong.append("exit.json does not say what was signed")
    print_proof(proof, directory.name, as_json=as_json)
    return proof.ok
