"""What the verbs of the control plane's command line share: reaching the plane, options, errors as exit codes."""

import os
import re
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

import click

from controlplane.client import Json, PlaneClient, PlaneRefused, PlaneUnreachable
from controlplane.render import complain
from protocol.errors import RemoteError
from protocol.limits import SECRET_BYTES_MAX

DEFAULT_URL: Final = "http://127.0.0.1:7410"
TOKEN_BYTES_MAX: Final = 4096
LIVING: Final = ("queued", "sent", "running")
"""States of an execution that is under way."""
_NEXT: Final = {
    "UNAUTHORIZED": "runner-control --token-file FILE …   (the plane's data directory holds admin.token)",
    "UNKNOWN_RUNNER": "runner-control runners",
    "UNKNOWN_EXECUTION": "runner-control ps --all",
    "UNKNOWN_WORKTREE": "runner-control worktree ls",
    "NOT_FOUND": "runner-control ps --all",
    "WORKTREE_EXISTS": "runner-control worktree ls",
    "WORKTREE_NOT_READY": "runner-control worktree ls",
    "BAD_OFFSET": "runner-control logs EXECUTION   (offsets are where records begin)",
    "TOO_MANY_INTENTS": "runner-control ps",
    "NOT_A_PTY": "runner-control pty ls",
    "ATTACH_REFUSED": "runner-control pty ls   (the owner's policy may not admit it: runner policy show, there)",
    "RUNNER_SILENT": "runner-control runners",
    "UNKNOWN_ATTEMPT": "runner-control show EXECUTION   (and show RUNNER: what lives there)",
    "NOT_MOVABLE": "runner-control rerun EXECUTION   (on its own runner)",
    "SECRETS_WANTED": "runner-control rerun EXECUTION --secret NAME=@FILE",
}
_ELSE_NEXT: Final = "runner-control --help"
_ORIGIN: Final = re.compile(r"https?://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")
_URL: Final = re.compile(r"https?://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?/?")


class ExitCode(IntEnum):
    """What the shell learns; `exec` gives the command's own status, and FAILED where there is none."""

    OK = 0
    REFUSED = 1
    USAGE = 2
    CONFIG = 3
    ANOTHER_PLANE = 5
    UNREACHABLE = 6
    FAILED = 125
    INTERRUPTED = 130
    UNREAD = 141


class NoToken(Exception):
    """The admin token cannot be read; the text names the file and why."""


class Reach:
    """Where the control plane is and what it asks for."""

    def __init__(self, url: str, token_file: str | None) -> None:
        self.url = url
        self._token_file = Path(token_file) if token_file else data_dir() / "admin.token"

    def client(self) -> PlaneClient:
        """A connection. Raises NoToken."""
        try:
            with self._token_file.open("rb") as file:
                token = file.read(TOKEN_BYTES_MAX).decode("ascii", "strict").strip()
        except (OSError, UnicodeDecodeError) as exc:
            problem = exc.strerror if isinstance(exc, OSError) else "it is no token"
            raise NoToken(f"the admin token cannot be read from {self._token_file}: {problem}") from None
        return PlaneClient(self.url, token)


class Front(click.Group):
    """The group of all verbs: turns what a control plane says no to into a sentence, a next step and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every verb, in the order a new user meets them."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb."""
        try:
            return super().invoke(ctx)
        except (PlaneRefused, PlaneUnreachable, RemoteError) as exc:
            ctx.exit(explain(exc))
        except NoToken as exc:
            complain(str(exc), "runner-control serve   (or name the token of another one with --token-file)")
            ctx.exit(ExitCode.CONFIG)
        except BrokenPipeError:
            raise  # whoever read what we print has left: that is no error to tell of
        except OSError as exc:
            place = f"{exc.filename}: " if isinstance(exc.filename, str) else ""
            complain(f"{place}{exc.strerror or exc}", _ELSE_NEXT)
            ctx.exit(ExitCode.REFUSED)


def explain(exc: PlaneRefused | PlaneUnreachable | RemoteError) -> ExitCode:
    """Say what went wrong and what comes next."""
    if isinstance(exc, PlaneUnreachable):
        complain(str(exc), "runner-control serve   (or name another one with --url)")
        return ExitCode.UNREACHABLE
    reason = exc.reason
    complain(str(exc), _NEXT.get(reason, _ELSE_NEXT))
    return ExitCode.REFUSED


def plane_url(_ctx: click.Context, _option: click.Parameter, url: str) -> str:
    """The address of a control plane. Raises click.BadParameter."""
    port = url.rstrip("/").rpartition(":")[2]
    if not _URL.fullmatch(url) or (port.isdigit() and not 0 < int(port) < 65536):
        raise click.BadParameter("expected http://HOST:PORT or https://HOST")
    return url


def page_origins(_ctx: click.Context, _option: click.Parameter, origins: tuple[str, ...]) -> tuple[str, ...]:
    """Origins as browsers write them, to the letter. Raises click.BadParameter."""
    if bad := [origin for origin in origins if not _ORIGIN.fullmatch(origin)]:
        raise click.BadParameter(f"expected https://HOST[:PORT] in small letters, without a path: {bad[0]!r}")
    return origins


def data_dir() -> Path:
    """Where a control plane on this machine keeps its things, unless told otherwise."""
    import platformdirs

    return Path(platformdirs.user_state_dir("runner-control", appauthor=False))


pass_reach = click.make_pass_decorator(Reach)


def pairs(texts: tuple[str, ...], option: str) -> dict[str, str]:
    """`NAME=VALUE` options as a mapping. Raises click.BadParameter."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise click.BadParameter("expected NAME=VALUE", param_hint=option)
        found[name] = value
    return found


def secret(given: str) -> tuple[str, str]:
    """`--secret NAME` from this environment, or `NAME=@FILE`. Raises click.BadParameter."""
    name, equals, source = given.partition("=")
    hint = "--secret"
    if not equals:
        if name not in os.environ:
            raise click.BadParameter(f"{name} is not in this environment", param_hint=hint)
        return name, os.environ[name]
    if not name or not source.startswith("@"):
        raise click.BadParameter("expected NAME or NAME=@FILE: others can see arguments of commands", param_hint=hint)
    try:
        with Path(source[1:]).open("rb") as file:
            value = file.read(SECRET_BYTES_MAX + 2)
        text = value.decode("utf-8").removesuffix("\n")
    except OSError as exc:
        raise click.BadParameter(f"{source[1:]}: {exc.strerror}", param_hint=hint) from None
    except UnicodeDecodeError:
        raise click.BadParameter(f"{source[1:]} is not UTF-8 text", param_hint=hint) from None
    if len(text.encode()) > SECRET_BYTES_MAX:
        raise click.BadParameter(f"{source[1:]} is longer than {SECRET_BYTES_MAX} bytes", param_hint=hint)
    return name, text


def without_none(body: Json) -> Json:
    """A request body without what was not given."""
    return {name: value for name, value in body.items() if value is not None}


def path_id(text: str) -> str:
    """An id or name as a part of a URL. Raises click.BadParameter: nothing else may steer where a request goes."""
    from protocol.ids import is_id

    if not is_id(text):
        raise click.BadParameter(f"{text!r} is no id or name: letters, digits, _ and - only")
    return text
