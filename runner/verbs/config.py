"""`runner config show`: the settings that count, and where each came from."""

import os
from dataclasses import asdict

import click

from terminal.options import as_json


@click.group(short_help="Show the settings that count.")
def config() -> None:
    """Show the settings.

    \b
    Example:
      runner config show
    """


@config.command(short_help="Print every setting and where it came from.")
@as_json
@click.pass_context
def show(ctx: click.Context, as_json: bool) -> None:
    """Print every setting, its value and where that came from.

    Flags win over LOCAL_RUNNER_* variables, these over the settings file, the file over defaults. A proxy is shown as
    ***, since it may hold a password. The daemon reads its settings when it starts.

    \b
    Examples:
      runner config show
      LOCAL_RUNNER_LOG_LEVEL=debug runner config show --json
    """
    from runner.config import explain_settings
    from runner.render import print_table
    from terminal.printing import print_json

    settings, sources = explain_settings(ctx.obj, os.environ)
    found = {
        name: value if isinstance(value, int) or value is None else str(value)
        for name, value in asdict(settings).items()
    }
    if settings.proxy is not None:
        found["proxy"] = "***"
    if as_json:
        print_json({"settings": {name: {"value": value, "source": sources[name]} for name, value in found.items()}})
    else:
        rows = [(name, "(none)" if value is None else str(value), sources[name]) for name, value in found.items()]
        print_table(("SETTING", "VALUE", "SOURCE"), rows)
