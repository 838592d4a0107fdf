"""What the operator's command line prints in its own name and colours; all else is `terminal.printing`."""

from functools import partial
from typing import Final

from terminal import printing

COLOURS: Final = {"ok": "green", "up": "green", "running": "green", "warn": "yellow", "skip": "bright_black",
                  "fail": "red", "down": "red", "lost": "red"}  # fmt: skip

complain = partial(printing.complain, "runner")
print_table = partial(printing.print_table, COLOURS)
