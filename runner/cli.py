"""The operator's command line. A verb lives in runner/verbs; here is what all share: global options, errors and exit codes.

Nothing heavy is imported before a verb needs it: `runner status` answers at once.
"""

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

import click

from runner.config import ENVIRONMENT_PLACE, FLAGS_PLACE
from runner.errors import AnotherDaemon, ConfigError, NotEnrolled, RunnerError
from runner.render import complain
from runner.verbs.options import ExitCode
from terminal.printing import wants_colour

VERBS: Final = {
    "enroll": "runner.verbs.enroll",
    "start": "runner.verbs.start",
    "status": "runner.verbs.status",
    "ps": "runner.verbs.attempts",
    "attach": "runner.verbs.attach",
    "logs": "runner.verbs.logs",
    "log-level": "runner.verbs.daemon_logs",
    "stop": "runner.verbs.attempts",
    "explain": "runner.verbs.explain",
    "pause": "runner.verbs.drain",
    "resume": "runner.verbs.drain",
    "drain": "runner.verbs.drain",
    "orphans": "runner.verbs.orphans",
    "gc": "runner.verbs.gc",
    "doctor": "runner.verbs.doctor",
    "service": "runner.verbs.service",
    "policy": "runner.verbs.policy",
    "config": "runner.verbs.config",
}
"""Where each verb is found, in the order a new user meets them; the module is imported when its verb is used."""


class Front(click.Group):
    """The group of all verbs: finds them lazily, and turns errors into a sentence, a next step and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every verb."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb of that name."""
        if cmd_name not in VERBS:
            return None
        found = getattr(import_module(VERBS[cmd_name]), cmd_name.replace("-", "_"))
        assert isinstance(found, click.Command), "a verb's module defines it under its own name"
        return found

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb."""
        try:
            return super().invoke(ctx)
        except ConfigError as exc:
            complain(str(exc), _repair(exc))
            ctx.exit(ExitCode.CONFIG)
        except NotEnrolled:
            complain("this machine is not enrolled", "runner enroll JOIN-STRING")
            ctx.exit(ExitCode.NOT_ENROLLED)
        except AnotherDaemon as exc:
            complain(str(exc), "runner status")
            ctx.exit(ExitCode.ANOTHER_DAEMON)
        except RunnerError as exc:
            complain(str(exc), "runner doctor")
            ctx.exit(ExitCode.INTERNAL)
        except BrokenPipeError:
            raise  # whoever read what we print has left: that is no error to tell of
        except OSError as exc:
            place = f"{exc.filename}: " if isinstance(exc.filename, str) else ""
            complain(f"{place}{exc.strerror or exc}", "runner doctor")
            ctx.exit(ExitCode.INTERNAL)


def _repair(exc: ConfigError) -> str:
    """The command that an error carries, else the one that changes what is wrong."""
    _sentence, colon, command = exc.expected.rpartition(": chmod ")
    if colon:
        return f"chmod {command}"
    if exc.place == FLAGS_PLACE:
        return "runner --help"
    if exc.place == ENVIRONMENT_PLACE:
        return f"unset {exc.key}"
    return f"${{EDITOR:-vi}} {exc.place}" if exc.place.endswith(".toml") else "runner doctor"


def _version(ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted:
        from protocol.messages import PROTOCOL_VERSION
        from protocol.version import VERSION

        click.echo(f"runner {VERSION} (protocol {PROTOCOL_VERSION})")
        ctx.exit()


def _absolute(_ctx: click.Context, _option: click.Parameter, path: str | None) -> str | None:
    return path if path is None or path.startswith("~/") else os.path.abspath(path)


PathOption = Callable[[Callable[..., Any]], Callable[..., Any]]


def _path_option(name: str, text: str) -> PathOption:
    return click.option(name, metavar="PATH", callback=_absolute, help=text)


@click.group(cls=Front, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@_path_option("--config", "Settings file [default: ~/.config/runner/config.toml].")
@_path_option("--state-dir", "Identity, journal and logs [default: ~/.local/state/runner].")
@_path_option("--runtime-dir", "The control socket [default: $XDG_RUNTIME_DIR/runner].")
@click.option("--log-level", metavar="LEVEL", help="debug, info, warning or error [default: info].")
@click.option("--log-format", metavar="FORM", help="auto, json or console [default: auto].")
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Print versions and exit."
)
@click.pass_context
def cli(ctx: click.Context, /, **flags: str | None) -> None:
    """Run what your control plane signs, on this machine, within the limits you set.

    \b
    A first day:
      runner enroll -                       paste the join string of your control plane
      runner service install --user --now   keep the daemon running
      runner doctor                         see whether all is well
      runner ps                             what runs here
      runner logs -f EXECUTION              what it says

    Exit codes: 0 ok, 1 internal, 2 usage, 3 configuration, 4 not enrolled, 5 another daemon, 6 control plane
    unreachable, 8 doctor has warnings or there are orphans, 9 doctor found failures.
    """
    ctx.color = wants_colour(os.environ)
    ctx.obj = flags


def main() -> None:
    """Entry point of the `runner` command."""
    # No other package gets to look into what is validated here; and to search all that is installed for one takes a while.
    os.environ["PYDANTIC_DISABLE_PLUGINS"] = "__all__"
    cli(prog_name="runner")


if __name__ == "__main__":
    main()
