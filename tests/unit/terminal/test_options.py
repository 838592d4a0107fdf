"""Options that both command lines take."""

import click
import pytest
from click.testing import CliRunner

from terminal.options import DURATION, SIZE, as_json


@click.command()
@click.option("--grace", type=DURATION, default=7)
@click.option("--offset", type=SIZE, default=0)
@as_json
def verb(grace: int, offset: int, as_json: bool) -> None:
    """Say what was understood."""
    click.echo(f"{grace} {offset} {as_json}")


@pytest.mark.parametrize(
    ("args", "said"),
    [((), "7 0 False"), (("--grace", "1m30s", "--offset", "2KiB", "--json"), "90000 2048 True")],
)
def test_durations_and_sizes_are_read_as_they_are_typed(args: tuple[str, ...], said: str) -> None:
    """Numbers that are defaults stay what they are."""
    assert CliRunner().invoke(verb, args).stdout == f"{said}\n"


@pytest.mark.parametrize("args", [("--grace", "10"), ("--offset", "1KB")])
def test_what_cannot_be_read_is_wrong_usage(args: tuple[str, str]) -> None:
    """Exit status 2, and the option is named."""
    done = CliRunner().invoke(verb, args)
    assert done.exit_code == 2 and args[0] in done.stderr
