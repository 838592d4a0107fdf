"""Options that both command lines take: a duration, a size, how to attach, nothing but `--json`."""

from collections.abc import Callable
from typing import Any, Final

import click

from protocol.text import duration_ms, size_bytes


class Parsed(click.ParamType[int]):
    """An option's value that a function of `protocol.text` reads."""

    def __init__(self, name: str, read: Callable[[str], int]) -> None:
        self.name = name
        self._read = read

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number that was typed."""
        try:
            return value if isinstance(value, int) else self._read(value)
        except ValueError as exc:
            self.fail(str(exc), param, ctx)


DURATION: Final = Parsed("duration", duration_ms)
SIZE: Final = Parsed("size", size_bytes)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")

ATTACH_MODES: Final = ("replay", "redraw", "snapshot", "none")


def attach_options(verb: Callable[..., None]) -> Callable[..., None]:
    """`--read-only` and `--mode` of a verb that attaches to a PTY."""
    mode = click.option(
        "--mode",
        type=click.Choice(ATTACH_MODES),
        default="replay",
        show_default=True,
        help="What is shown first: the newest of the log, what the program draws anew, the screen drawn once, or nothing.",
    )
    return click.option("--read-only", is_flag=True, help="Only look on.")(mode(verb))
