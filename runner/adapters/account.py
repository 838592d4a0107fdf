"""The user this runner runs as: what the system knows of it, for terminals."""

import os
import pwd
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

FALLBACK_SHELL: Final = "/bin/sh"


@dataclass(frozen=True, slots=True)
class Account:
    """Who a login shell is started for. `env`: names of it that a session always has."""

    shell: str
    env: Mapping[str, str]

    @property
    def login_argv(self) -> list[str]:
        """How a shell is called to be a login shell."""
        return [f"-{os.path.basename(self.shell)}"]


def own_account() -> Account:
    """The account of this process; what its system does not know is left out. Blocks while the system asks a directory service."""
    try:
        found = pwd.getpwuid(os.getuid())
    except KeyError:
        # A user of a container may have a number and no name.
        shell = _first_runnable("", os.environ.get("SHELL", ""))
        return Account(shell, {"SHELL": shell})
    shell = _first_runnable(found.pw_shell, os.environ.get("SHELL", ""))
    env = {"HOME": found.pw_dir, "USER": found.pw_name, "LOGNAME": found.pw_name, "SHELL": shell}
    return Account(shell, {name: value for name, value in env.items() if value})


def _first_runnable(*shells: str) -> str:
    runnable = (shell for shell in shells if shell.startswith("/") and os.access(shell, os.X_OK))
    return next(runnable, FALLBACK_SHELL)
