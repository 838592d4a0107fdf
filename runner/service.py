"""The daemon as a service of its user: writing, removing and looking at the systemd unit.

The unit's text is package data. systemd is only told where it answers; the file is right either way.
"""

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Final

from runner.errors import ConfigError

UNIT: Final = "runner.service"
SYSTEMCTL_TIMEOUT_S: Final = 150.0
"""`enable --now` waits for READY=1, for which the unit gives 120 s."""
_PLACEHOLDER: Final = "@EXEC_START@"
_PLAIN: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./=:@+,")


@dataclass(frozen=True, slots=True)
class Told:
    """What `systemctl --user` answered; `status` None: it cannot be run at all."""

    status: int | None
    text: str

    @property
    def ok(self) -> bool:
        """Whether it did what was asked."""
        return self.status == 0


def unit_path(environ: Mapping[str, str]) -> Path:
    """Where systemd looks for this user's units."""
    config = environ.get("XDG_CONFIG_HOME") or f"{environ.get('HOME') or Path.home()}/.config"
    return Path(config) / "systemd" / "user" / UNIT


def unit_text(program: Sequence[str]) -> str:
    """The unit that starts `program`, which begins with an absolute path. Raises ConfigError for what no unit can hold."""
    if not program[0].startswith("/"):
        raise ConfigError("the service", "ExecStart", "an absolute path of the runner command")
    template = (files("runner.units") / UNIT).read_text("utf-8")
    return template.replace(_PLACEHOLDER, " ".join(map(_quoted, program)))


def write_unit(path: Path, text: str) -> bool:
    """Put the unit there as a whole; False when it was there already, word for word."""
    try:
        if path.read_text("utf-8") == text:
            return False
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
    prepared = path.with_name(f".{path.name}.{os.getpid()}")
    prepared.write_text(text, "utf-8")
    prepared.replace(path)
    return True


def systemctl(*args: str) -> Told:
    """Ask the user's service manager."""
    try:
        done = subprocess.run(
            ["systemctl", "--user", "--no-pager", *args],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SYSTEMCTL_TIMEOUT_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        return Told(None, "there is no systemctl on this machine")
    except subprocess.TimeoutExpired:
        return Told(None, "systemctl does not answer")
    return Told(done.returncode, (done.stdout or done.stderr).strip())


def manager_answers() -> Told:
    """Whether there is a service manager of this user to talk to."""
    told = systemctl("show-environment")
    return Told(told.status, told.text if not told.ok else "")


def lingers(user: str) -> bool:
    """Whether this user's services run while nobody is logged in."""
    return Path("/var/lib/systemd/linger", user).exists()


def settings_of_unit(text: str) -> dict[str, str]:
    """Keys and values of a unit; the last one of a key counts."""
    lines = (line.strip() for line in text.splitlines())
    pairs = (line.partition("=") for line in lines if "=" in line and not line.startswith(("#", ";")))
    return {key.strip(): value.strip() for key, _equals, value in pairs}


def _quoted(word: str) -> str:
    """One argument of ExecStart= as systemd.service(5) reads it back."""
    if any(not char.isprintable() for char in word):
        raise ConfigError("the service", "ExecStart", "paths without control characters")
    word = word.replace("%", "%%").replace("$", "$$")
    if word and set(word) <= _PLAIN:
        return word
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'
