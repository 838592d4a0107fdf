"""How a command line prints: tables, JSON, colours only where a terminal takes them, strangers' words made visible."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, Final

import click

from protocol.logtext import LogText, Piece, Standard
from protocol.text import visible

PIPED_WIDTH: Final = 10_000
"""Columns of a table that no terminal shows: nothing is cut."""


def wants_colour(environ: Mapping[str, str]) -> bool | None:
    """False where the user wants no colours (no-color.org), None to let each stream decide by being a terminal."""
    return False if environ.get("NO_COLOR") or environ.get("TERM") == "dumb" else None


def print_json(value: Any) -> None:
    """One JSON document for a program; ASCII, so nothing in it can be obeyed by a terminal."""
    click.echo(json.dumps(value, indent=2))


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Names and values, one to a line."""
    width = max((len(name) for name, _ in facts), default=0)
    for name, value in facts:
        click.echo(f"{click.style(name.ljust(width), bold=True)}  {visible(value)}")


def print_table(colours: Mapping[str, str], titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows under titles, whole cells in their colours; the last column is cut at a terminal's edge, never in a pipe."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for title in titles:
        last = title == titles[-1]
        table.add_column(title, no_wrap=True, overflow="ellipsis" if last else "fold", ratio=1 if last else None)
    for row in rows:
        # Text objects, so that nothing in a cell is taken for markup.
        table.add_row(*(Text(visible(cell), style=colours.get(cell, "")) for cell in row))
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().removesuffix("\n").split("\n"):
        click.echo(line.rstrip())


def complain(command: str, message: str, following: str = "") -> None:
    """An error for a person, in the name of `command`, and the command that comes next."""
    click.echo(f"{click.style(f'{command}:', fg='red')} {visible(message)}", err=True)
    if following:
        click.echo(f"next: {following}", err=True)


def safe_streams(*, raw: bool) -> frozenset[Standard]:
    """The standard streams of this process that a terminal shows and that it must not obey; none with `raw`."""
    shown = {Standard.OUT: sys.stdout, Standard.ERR: sys.stderr}
    return frozenset() if raw else frozenset(to for to, stream in shown.items() if stream.isatty())


def log_text(*, raw: bool) -> LogText:
    """The filter for this process's standard streams: a terminal sees nothing that it could obey, unless `raw`."""
    return LogText(safe_streams(raw=raw))


def write_piece(piece: Piece) -> None:
    """Bytes to the stream they belong to, at once."""
    stream: BinaryIO = sys.stdout.buffer if piece.to is Standard.OUT else sys.stderr.buffer
    stream.write(piece.data)
    stream.flush()


def shell_words(argv: Sequence[str]) -> str:
    """Arguments as one line that shows where each begins and ends."""
    import shlex

    return shlex.join(argv)
