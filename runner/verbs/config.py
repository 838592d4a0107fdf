"""`runner config show`: the settings that count."""

from dataclasses import asdict

import click

from runner.verbs.options import as_json, settings_of


@click.group()
def config() -> None:
    """Show the settings.

    \b
    Example:
      runner config show
    """


@config.command()
@as_json
@click.pass_context
def show(ctx: click.Context, as_json: bool) -> None:
    """Print the effective settings: flags, then LOCAL_RUNNER_* variables, then the file, then defaults.

    \b
    Examples:
      runner config show
      LOCAL_RUNNER_LOG_LEVEL=debug runner config show --json
    """
    from runner.render import print_facts, print_json

    settings = settings_of(ctx)
    found = {
        name: value if isinstance(value, int) or value is None else str(value)
        for name, value in asdict(settings).items()
    }
    if settings.proxy is not None:
        found["proxy"] = "***"  # it may hold a password
    if as_json:
        print_json(found)
    else:
        print_facts([(name, "(none)" if value is None else str(value)) for name, value in found.items()])
