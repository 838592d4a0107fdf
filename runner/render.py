"""What the operator's command line prints in its own name, words and colours; all else is `terminal.printing`."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Final

from protocol.text import show_age
from terminal import printing

COLOURS: Final = {"ok": "green", "up": "green", "running": "green", "warn": "yellow", "skip": "bright_black",
                  "fail": "red", "down": "red", "lost": "red"}  # fmt: skip

complain = partial(printing.complain, "runner")
print_table = partial(printing.print_table, COLOURS)


def show_admission(admission: Mapping[str, Any]) -> str:
    """Whether new work is taken, and by which verb that is changed."""
    state, left_ms = admission.get("state", "open"), admission.get("stops_in_ms")
    if state == "open":
        return "open"
    stops = f", what still runs is stopped in {show_age(max(left_ms, 0))}" if isinstance(left_ms, int) else ""
    return f"{state}: new work is refused until `runner resume`{stops}"


def show_level(said: Mapping[str, Any]) -> str:
    """What the daemon's log tells, and how long it does."""
    left_ms = said.get("falls_back_in_ms")
    level = str(said.get("level"))
    return f"{level} for {show_age(left_ms)}, then {said.get('falls_back_to')}" if isinstance(left_ms, int) else level
