"""Which environment a child gets: what it inherits from the machine, and what a command may add.

Rule 1: the daemon's own environment never reaches a child; a fixed list of names does. Rule 2: names that make programs load or
run something are never a command's to set, whatever the owner allows. Rule 3: values that look like secrets travel sealed.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Final

from protocol.errors import Reason
from runner.core.policy import Policy

INHERITED: Final = (
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "PATH",
    "LANG",
    "LANGUAGE",
    "LC_*",
    "TZ",
    "TMPDIR",
    "XDG_RUNTIME_DIR",
    "SSH_AUTH_SOCK",
)
"""What a child inherits of the machine."""

DENIED: Final = (
    "PATH",
    "HOME",
    "SHELL",
    "IFS",
    "ENV",
    "BASH_ENV",
    "BASH_FUNC_*",
    "BASHOPTS",
    "SHELLOPTS",
    "PROMPT_COMMAND",
    "PS4",
    "ZDOTDIR",
    "LD_*",
    "DYLD_*",
    "GLIBC_TUNABLES",
    "GCONV_PATH",
    "LOCPATH",
    "NLSPATH",
    "HOSTALIASES",
    "RES_OPTIONS",
    "MALLOC_*",
    "GIT_*",
    "SSH_*",
    "SUDO_*",
    "PYTHON*",
    "PERL*",
    "RUBYOPT",
    "RUBYLIB",
    "GEM_*",
    "NODE_OPTIONS",
    "NODE_PATH",
    "NPM_CONFIG_*",
    "JAVA_TOOL_OPTIONS",
    "_JAVA_OPTIONS",
    "JDK_JAVA_OPTIONS",
    "CLASSPATH",
    "DBUS_*",
    "XDG_RUNTIME_DIR",
    "LOCAL_RUNNER_*",
)
"""Names with which a command could make an allowed program run something else."""

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}")
_SECRET: Final = re.compile(
    r".*(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|API_?KEY)|.+_PWD|(.*_)?(CREDENTIALS?|KEY|CONNECTION_STRING)",
    re.IGNORECASE,
)
DEFAULT_PATH: Final = "/usr/local/bin:/usr/bin:/bin"
DEFAULT_LANG: Final = "C.UTF-8"
DEFAULT_TERM: Final = "xterm-256color"
"""What every viewer can show, and every system has a description of."""
OF_A_TERMINAL: Final = ("COLUMNS", "LINES", "TMUX", "TMUX_*", "STY", "TERM", "TERM_*", "COLORTERM", "VSCODE_*")
"""Names that tell of the terminal that somebody started the daemon in."""
_LOCALES: Final = ("LC_ALL", "LC_CTYPE", "LANG")
"""In the order in which they count for the encoding."""
_UTF_8: Final = re.compile(r"utf-?8", re.IGNORECASE)


def inherited(own: Mapping[str, str]) -> dict[str, str]:
    """The part of the daemon's environment that children get; PATH and a UTF-8 locale are always there."""
    kept = {name: value for name, value in own.items() if matches(name, INHERITED)}
    kept.setdefault("PATH", DEFAULT_PATH)
    if not any(name in kept for name in ("LANG", "LC_ALL", "LC_CTYPE")):
        kept["LANG"] = DEFAULT_LANG
    return kept


def terminal_env(base: Mapping[str, str]) -> dict[str, str]:
    """What the child of a PTY gets of what children inherit: its terminal by name, in UTF-8, and no other terminal's words."""
    kept = {name: value for name, value in base.items() if not matches(name, OF_A_TERMINAL)}
    spoken = next((kept[name] for name in _LOCALES if kept.get(name)), "")
    if not _UTF_8.search(spoken):
        # What stands above LANG would undo it.
        kept = {name: value for name, value in kept.items() if name not in _LOCALES}
        kept["LANG"] = DEFAULT_LANG
    return {**kept, "TERM": DEFAULT_TERM, "COLORTERM": "truecolor"}


def refuse_env(names: Iterable[str], policy: Policy) -> tuple[Reason, str] | None:
    """Why a command may not set one of `names`, or None."""
    for name in names:
        if not _NAME.fullmatch(name):
            return Reason.ENV_DENIED, "a name that is no environment variable's"
        if looks_secret(name):
            return Reason.ENV_SECRET_NAME, f"{name} looks like a secret: send it in secrets"
    return refuse_names(names, policy)


def refuse_names(names: Iterable[str], policy: Policy) -> tuple[Reason, str] | None:
    """Why one of `names` may not be set at all, be it in the clear or sealed, or None."""
    for name in names:
        if not _NAME.fullmatch(name):
            return Reason.ENV_DENIED, "a name that is no environment variable's"
        if matches(name.upper(), DENIED):
            return Reason.ENV_DENIED, f"{name} is never a command's to set"
        if matches(name, policy.env_deny) or not matches(name, policy.env_allow):
            return Reason.ENV_DENIED, f"{name} is not allowed by the owner's policy"
    return None


def looks_secret(name: str) -> bool:
    """Whether a variable of this name is likely to hold a secret."""
    return _SECRET.fullmatch(name) is not None


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether `name` is one of `patterns`, which are names or prefixes ending in `*`."""
    return any(name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern for pattern in patterns)
