"""What the control plane's command line prints in its own name, colours and time; all else is `terminal.printing`."""

from datetime import UTC, datetime
from functools import partial
from typing import Final

from protocol.text import show_age, show_duration
from terminal import printing

COLOURS: Final = {"online": "green", "running": "green", "ready": "green", "settled": "green", "offline": "red",
                  "refused": "red", "failed": "red", "cancelled": "yellow", "queued": "yellow"}  # fmt: skip

complain = partial(printing.complain, "runner-control")
print_table = partial(printing.print_table, COLOURS)


def moment(unix_ms: object) -> str:
    """A time as this machine's clock would say it."""
    if not isinstance(unix_ms, int):
        return "-"
    return datetime.fromtimestamp(unix_ms / 1000, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def try_again(after_ms: object) -> str:
    """When a refusal that will not last is worth asking again, as the end of a sentence."""
    if not isinstance(after_ms, int):
        return ""
    return f"; try again in {show_duration(after_ms) if after_ms < 1000 else show_age(after_ms)}"
