"""How the control plane's command line prints: tables, JSON, colours only where a terminal takes them, strangers' words made visible."""

import json
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

import click

from protocol.logtext import LogText, Piece, Standard
from protocol.text import visible

PIPED_WIDTH: Final = 10_000
"""Columns of a table that no terminal shows: nothing is cut."""
COLOURS: Final = {"online": "green", "running": "green", "ready": "green", "settled": "green", "offline": "red",
                  "refused": "red", "failed": "red", "cancelled": "yellow", "queued": "yellow"}  # fmt: skip


def print_json(value: Any) -> None:
    """One JSON document for a program; ASCII, so nothing in it can be obeyed by a terminal."""
    click.echo(json.dumps(value, indent=2))


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Names and values, one to a line."""
    width = max((len(name) for name, _ in facts), default=0)
    for name, value in facts:
        click.echo(f"{click.style(name.ljust(width), bold=True)}  {visible(value)}")


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows under titles; the last column is cut at a terminal's edge, never in a pipe."""
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
        table.add_row(*(Text(visible(cell), style=COLOURS.get(cell, "")) for cell in row))
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().removesuffix("\n").split("\n"):
        click.echo(line.rstrip())


def complain(message: str, following: str = "") -> None:
    """An error for a person, and the command that comes next."""
    click.echo(f"{click.style('runner-control:', fg='red')} {visible(message)}", err=True)
    if following:
        click.echo(f"next: {following}", err=True)


def log_text(*, raw: bool) -> LogText:
    """The filter for this process's standard streams: a terminal sees nothing that it could obey, unless `raw`."""
    shown = {Standard.OUT: sys.stdout, Standard.ERR: sys.stderr}
    return LogText(frozenset() if raw else frozenset(to for to, stream in shown.items() if stream.isatty()))


def write_piece(piece: Piece) -> None:
    """Bytes to the stream they belong to, at once."""
    stream = sys.stdout.buffer if piece.to is Standard.OUT else sys.stderr.buffer
    stream.write(piece.data)
    stream.flush()


def moment(unix_ms: object) -> str:
    """A time as this machine's clock would say it."""
    if not isinstance(unix_ms, int):
        return "-"
    return datetime.fromtimestamp(unix_ms / 1000, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def command_line(argv: Sequence[str]) -> str:
    """Arguments as one line that shows where each begins and ends."""
    return shlex.join(argv)
