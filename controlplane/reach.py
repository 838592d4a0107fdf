"""What the verbs of the control plane's command line share: reaching the plane, options, errors as exit codes."""

import os
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

import click

from controlplane.client import Json, PlaneClient, PlaneRefused, PlaneUnreachable
from controlplane.render import complain
from protocol.errors import RemoteError
from protocol.text import duration_ms, size_bytes

DEFAULT_URL: Final = "http://127.0.0.1:7410"
TOKEN_BYTES_MAX: Final = 4096
_NEXT: Final = {
    "UNAUTHORIZED": "runner-control --token-file FILE …   (the plane's data directory holds admin.token)",
    "UNKNOWN_RUNNER": "runner-control runners",
    "UNKNOWN_EXECUTION": "runner-control ps --all",
    "UNKNOWN_WORKTREE": "runner-control worktree ls",
    "NOT_FOUND": "runner-control ps --all",
}


class ExitCode(IntEnum):
    """What the shell learns; `exec` gives the command's own status, and FAILED where there is none."""

    OK = 0
    REFUSED = 1
    USAGE = 2
    UNREACHABLE = 6
    FAILED = 125
    INTERRUPTED = 130


class Reach:
    """Where the control plane is and what it asks for."""

    def __init__(self, url: str, token_file: str | None) -> None:
        self.url = url
        self._token_file = Path(token_file) if token_file else data_dir() / "admin.token"

    def client(self) -> PlaneClient:
        """A connection. Raises click.UsageError when there is no token."""
        try:
            with self._token_file.open("rb") as file:
                token = file.read(TOKEN_BYTES_MAX).decode("ascii", "strict").strip()
        except (OSError, UnicodeDecodeError) as exc:
            problem = exc.strerror if isinstance(exc, OSError) else "it is no token"
            raise click.UsageError(
                f"the admin token cannot be read from {self._token_file}: {problem}. "
                "Start a control plane with `runner-control serve`, or name its token with --token-file."
            ) from None
        return PlaneClient(self.url, token)


class Front(click.Group):
    """The group of all verbs: turns what a control plane says no to into a sentence, a next step and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb."""
        try:
            return super().invoke(ctx)
        except (PlaneRefused, PlaneUnreachable, RemoteError) as exc:
            ctx.exit(explain(exc))


def explain(exc: PlaneRefused | PlaneUnreachable | RemoteError) -> ExitCode:
    """Say what went wrong and what comes next."""
    if isinstance(exc, PlaneUnreachable):
        complain(str(exc), "runner-control serve   (or name another one with --url)")
        return ExitCode.UNREACHABLE
    reason = exc.reason
    complain(str(exc), _NEXT.get(reason, ""))
    return ExitCode.REFUSED


def data_dir() -> Path:
    """Where a control plane on this machine keeps its things, unless told otherwise."""
    import platformdirs

    return Path(platformdirs.user_state_dir("runner-control", appauthor=False))


def wants_colour() -> bool | None:
    """False where the user wants no colours (no-color.org), None to let each stream decide by being a terminal."""
    return False if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" else None


class Parsed(click.ParamType[int]):
    """An option's value that a function of `protocol.text` reads."""

    def __init__(self, name: str, read: Callable[[str], int]) -> None:
        self.name = name
        self._read = read

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number that was typed."""
        try:
            return value if isinstance(value, int) else self._read(value)
        except ValueError as exc:
            self.fail(str(exc), param, ctx)


DURATION: Final = Parsed("duration", duration_ms)
SIZE: Final = Parsed("size", size_bytes)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
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


def without_none(body: Json) -> Json:
    """A request body without what was not given."""
    return {name: value for name, value in body.items() if value is not None}


def path_id(text: str) -> str:
    """An id or name as a part of a URL. Raises click.BadParameter: nothing else may steer where a request goes."""
    from protocol.ids import is_id

    if not is_id(text):
        raise click.BadParameter(f"{text!r} is no id or name: letters, digits, _ and - only")
    return text
