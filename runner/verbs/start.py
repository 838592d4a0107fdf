"""`runner start`: the daemon, in the foreground."""

import click

from runner.render import complain
from runner.verbs.options import ExitCode, settings_of


@click.command()
@click.pass_context
def start(ctx: click.Context) -> None:
    """Run the daemon in the foreground.

    It logs to stderr, under systemd to the journal; `runner logs --daemon` shows it. It ends at SIGTERM or SIGINT; what it
    had started goes on, and the next daemon takes it up again, unless the policy wants it drained or stopped
    ([daemon] on_stop). A second signal ends it at once. A service manager is told when it is ready (sd_notify).

    \b
    Examples:
      runner start
      runner --log-level debug --log-format json start
    """
    import anyio

    from runner.logs import configure

    settings = settings_of(ctx)
    sink = configure(settings.log_level, settings.log_format)
    # After the logs: they decide what is loaded with them.
    from runner.daemon import run_daemon

    status = anyio.run(run_daemon, settings, sink)
    if status != ExitCode.OK:
        complain("the daemon has ended; the last lines of its log say why", "runner doctor")
    ctx.exit(status)
