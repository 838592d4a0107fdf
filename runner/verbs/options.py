"""What verbs share: the settings, exit codes, and the option that names roots."""

import os
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

if TYPE_CHECKING:
    from runner.config import Settings

SOCKET_NAME: Final = "control.sock"
CALL_TIMEOUT_S: Final = 5.0
"""A living daemon answers within milliseconds; one that takes longer is told apart from one that is down."""


def settings_of(ctx: click.Context) -> "Settings":
    """The settings as flags, environment and file say. Raises ConfigError."""
    from runner.config import load_settings

    return load_settings(ctx.obj, os.environ)


def socket_of(settings: "Settings") -> Path:
    """Where the daemon answers."""
    return settings.runtime_dir / SOCKET_NAME


class ExitCode(IntEnum):
    """What the shell learns."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    CONFIG = 3
    NOT_ENROLLED = 4
    ANOTHER_DAEMON = 5
    UNREACHABLE = 6
    DOCTOR_WARNINGS = 8
    ORPHANS = 8
    DOCTOR_FAILURES = 9


roots_option = click.option(
    "--root",
    "roots",
    multiple=True,
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, resolve_path=True),
    help="A directory below which commands may work; may be repeated [default: your home directory].",
)
