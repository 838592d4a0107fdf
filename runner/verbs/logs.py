"""`runner logs`: what an execution said, from its files."""

import sys
from typing import Any

import click

from protocol.errors import RemoteError
from runner.render import complain
from runner.verbs.options import ExitCode, settings_of
from terminal.options import SIZE
from terminal.printing import log_text, write_piece


@click.command(short_help="Print what an execution wrote.")
@click.argument("wanted", metavar="ID")
@click.option("--follow", "-f", is_flag=True, help="Go on until it has ended.")
@click.option(
    "--offset", type=SIZE, default=0, metavar="BYTES", help="Begin at the record that holds this offset of the log."
)
@click.option("--raw", is_flag=True, help="Send control characters to the terminal as they are.")
@click.pass_context
def logs(ctx: click.Context, wanted: str, follow: bool, offset: int, raw: bool) -> None:
    """Print what an execution wrote: its stdout to stdout, its stderr to stderr, byte for byte.

    ID is an execution (its newest attempt) or an attempt. No daemon is needed. What is lost is named on stderr:
    [gap: N bytes missing]. At a terminal control characters are shown escaped, unless --raw.

    \b
    Examples:
      runner logs ex_01jx
      runner logs -f ex_01jx
      runner logs --offset 8MiB ex_01jx.1 > out 2> err
    """
    from runner.adapters.attemptfiles import find_attempt
    from runner.adapters.logview import Ended, Missing, view_log
    from runner.errors import Refused

    try:
        directory = find_attempt(settings_of(ctx).state_dir, wanted)
    except Refused as exc:
        complain(str(exc), "runner ps --all")
        ctx.exit(ExitCode.INTERNAL)
    text = log_text(raw=raw)
    ended: Ended | None = None
    try:
        for seen in view_log(directory, offset, follow=follow):
            if isinstance(seen, Ended):
                ended = seen
                continue
            pieces = text.gap(seen.start, seen.end) if isinstance(seen, Missing) else text.show(seen)
            for piece in pieces:
                write_piece(piece)
        for piece in text.finish():
            write_piece(piece)
    except RemoteError as exc:
        complain(f"the log of {directory.name} is damaged: {exc.detail}", "runner doctor")
        ctx.exit(ExitCode.INTERNAL)
    except KeyboardInterrupt:
        ctx.exit(130)
    if ended is not None and sys.stderr.isatty():
        click.echo(f"[{how_it_ended(ended.exit)}]", err=True)


def how_it_ended(exit_record: dict[str, Any] | None) -> str:
    """One line about the end of an attempt."""
    if exit_record is None:
        return "lost: its shim is gone and left no word"
    verdict, cause = str(exit_record.get("verdict")), exit_record.get("cause")
    words = [verdict.replace("_", " ")]
    if exit_record.get("signal") is not None:
        words.append(f"by signal {exit_record['signal']}")
    elif exit_record.get("code") is not None:
        words.append(f"with status {exit_record['code']}")
    if isinstance(cause, dict) and cause.get("kind") not in (None, "none"):
        words.append(f"({cause['kind']} {cause.get('reason') or cause.get('by') or ''}".rstrip() + ")")
    from protocol.text import visible

    return visible(" ".join(words))
