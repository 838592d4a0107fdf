"""The owner's policy on disk: `policy.toml`, read strictly into a `Policy`.

Rule: whatever is wrong with the file, nothing is admitted and one sentence says why. There is no warn mode.
"""

import json
import os
import re
import stat
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from protocol.commands import Kind, SignalName
from protocol.envelope import digest_of
from protocol.limits import GRACE_MS_MAX, KIB, MIB
from runner.core.policy import Policy
from runner.errors import ConfigError

POLICY_VERSION: Final = 1
POLICY_BYTES_MAX: Final = 256 * KIB
CONCURRENT: Final = 64
"""Default of living attempts at a time."""
CONCURRENT_MAX: Final = 4096
"""As many log channels as a session has."""
GRACE_S_MAX: Final = GRACE_MS_MAX // 1000
ITEMS_MAX: Final = 1024
"""Entries of one list."""
DISK_FREE_MIB: Final = 2048
DISK_FREE_PERCENT: Final = 5
"""As much as file systems keep for root: below it they fragment and users are told that the disk is full."""
INODES_FREE_PERCENT: Final = 5
MEMORY_AVAILABLE_MIB: Final = 256
"""Less, and the kernel begins to kill: what runs already, perhaps."""
FDS_FREE: Final = 64
"""An attempt takes the daemon about two, git and its locks a dozen."""
MIB_MAX: Final = 1024 * 1024
FDS_MAX: Final = 1024 * 1024
PERCENT_MAX: Final = 99
OUTLIVE_MAX: Final = 64
"""Names that a shim's spec can hold."""
ON_STOP: Final = ("leave", "drain", "stop")
_PROGRAM: Final = re.compile(r"[A-Za-z0-9_.+@-]{1,64}")
_ENV_PATTERN: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}\*?|\*")
_MODE: Final = 0o600
_WRITABLE_BY_OTHERS: Final = stat.S_IWGRP | stat.S_IWOTH
DENIES_ALL: Final = Policy(digest=digest_of(b""))
"""What counts while there is no readable policy."""


class _Problem(Exception):
    """The file is wrong; the text says where and what was expected."""


class _Key(NamedTuple):
    parse: Callable[[Any], Any]
    expected: str
    default: Any


def load_policy(path: Path, managed: Sequence[str]) -> tuple[Policy, str | None]:
    """Read the policy. `managed`: directories of the runner's own that are roots besides the owner's.

    Returns:
        The policy and None; or, for a file that is missing, unreadable, writable by others or wrong, DENIES_ALL and a sentence.
    """
    try:
        content = _read(path)
        found = _parse(content)
    except _Problem as problem:
        return DENIES_ALL, f"{path}: {problem}; nothing is admitted"
    roots = [os.path.realpath(root) for root in (*found["roots.managed"], *managed)]
    return (
        Policy(
            digest=digest_of(content),
            kinds=frozenset(found["commands.kinds"]),
            signals=frozenset(found["commands.signals"]),
            roots=tuple(dict.fromkeys(roots)),
            env_allow=tuple(found["env.allow"]),
            env_deny=tuple(found["env.deny"]),
            concurrent_max=found["limits.concurrent"],
            grace_ms_max=found["limits.grace_s_max"] * 1000,
            outlive=tuple(found["orphans.outlive"]),
            on_daemon_stop=found["daemon.on_stop"],
            disk_free_min=found["limits.disk_free_mib_min"] * MIB,
            disk_free_percent_min=found["limits.disk_free_percent_min"],
            inodes_free_percent_min=found["limits.inodes_free_percent_min"],
            memory_available_min=found["limits.memory_available_mib_min"] * MIB,
            fds_free_min=found["limits.fds_free_min"],
        ),
        None,
    )


def write_default(path: Path, roots: Sequence[str], *, minimums: bool = True) -> None:
    """Write a commented policy that admits every kind inside `roots`. Raises ConfigError where a file is there already.

    Without `minimums` nothing is refused for what the machine has left: for demos and tests, on machines that may be nearly full.
    """
    try:
        text = _TEMPLATE.format(
            kinds=",\n".join(f"  {_quoted(kind)}" for kind in Kind),
            signals=", ".join(_quoted(name) for name in SignalName),
            roots=", ".join(_quoted(root) for root in roots),
            concurrent=CONCURRENT,
            grace_s_max=GRACE_S_MAX,
            disk_free_mib_min=DISK_FREE_MIB * minimums,
            disk_free_percent_min=DISK_FREE_PERCENT * minimums,
            inodes_free_percent_min=INODES_FREE_PERCENT * minimums,
            memory_available_mib_min=MEMORY_AVAILABLE_MIB * minimums,
            fds_free_min=FDS_FREE * minimums,
            on_stop=_quoted(ON_STOP[0]),
        ).encode("utf-8")
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
    except FileExistsError:
        raise ConfigError(str(path), "", "no file: the policy that is there is kept") from None
    except UnicodeEncodeError:
        raise ConfigError(str(path), "roots.managed", "directories whose names are UTF-8") from None
    except OSError as exc:
        raise ConfigError(str(path), "", f"a place that can be written ({exc.strerror})") from exc
    with open(fd, "wb") as file:
        file.write(text)
        file.flush()
        os.fsync(fd)


def _read(path: Path) -> bytes:
    """The bytes of a plain file that only its owner, us or root, may write."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise _Problem("there is no such file") from None
    except (OSError, ValueError) as exc:
        raise _Problem(f"cannot be opened ({getattr(exc, 'strerror', None) or 'not a path'})") from exc
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise _Problem("expected a plain file")
        if found.st_uid not in (os.geteuid(), 0):
            raise _Problem(f"expected owner {os.geteuid()} or root, found {found.st_uid}")
        if found.st_mode & _WRITABLE_BY_OTHERS:
            raise _Problem(f"may be written by others, put it right with: chmod go-w {path}")
        with open(fd, "rb", closefd=False) as file:
            content = file.read(POLICY_BYTES_MAX + 1)
    except OSError as exc:
        raise _Problem(f"cannot be read ({exc.strerror})") from exc
    finally:
        os.close(fd)
    if len(content) > POLICY_BYTES_MAX:
        raise _Problem(f"expected at most {POLICY_BYTES_MAX} bytes")
    return content


def _parse(content: bytes) -> dict[str, Any]:
    """Values by `section.key`, defaults filled in."""
    try:
        document = tomllib.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as exc:
        raise _Problem(f"expected TOML in UTF-8 ({_plain(str(exc).partition(chr(10))[0])})") from exc
    version = document.pop("version", None)
    if type(version) is not int or version != POLICY_VERSION:
        raise _Problem(f"version: expected {POLICY_VERSION}")
    given: dict[str, Any] = {}
    for section, table in document.items():
        if section not in _SECTIONS:
            raise _Problem(f"{_plain(section)}: expected one of {', '.join(sorted(_SECTIONS))}")
        if not isinstance(table, dict):
            raise _Problem(f"{section}: expected a table")
        given.update((f"{section}.{key}", value) for key, value in table.items())
    for name in given:
        if name not in _KEYS:
            raise _Problem(f"{_plain(name)}: expected one of {', '.join(sorted(_KEYS))}")
    return {name: _value(name, key, given) for name, key in _KEYS.items()}


def _value(name: str, key: _Key, given: Mapping[str, Any]) -> Any:
    if name not in given:
        return key.default
    try:
        return key.parse(given[name])
    except ValueError:
        raise _Problem(f"{name}: expected {key.expected}") from None


def _list_of(parse: Callable[[str], str], items_max: int = ITEMS_MAX) -> Callable[[Any], list[str]]:
    def parse_list(value: Any) -> list[str]:
        if not isinstance(value, list) or len(value) > items_max or not all(isinstance(item, str) for item in value):
            raise ValueError
        return [parse(item) for item in value]

    return parse_list


def _number(low: int, high: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError
        return value

    return parse


def _kind(text: str) -> str:
    return Kind(text).value


def _directory(text: str) -> str:
    path = os.path.expanduser(text)
    if not path.startswith("/") or "\0" in path:
        raise ValueError
    return path


def _env_pattern(text: str) -> str:
    if not _ENV_PATTERN.fullmatch(text):
        raise ValueError
    return text


def _signal(text: str) -> str:
    return SignalName(text).value


def _program(text: str) -> str:
    if not _PROGRAM.fullmatch(text):
        raise ValueError
    return text


def _on_stop(value: Any) -> str:
    if value not in ON_STOP:
        raise ValueError
    return str(value)


def _whole(high: int, default: int, unit: str = "") -> _Key:
    return _Key(_number(0, high), f"a whole number{unit} from 0 to {high}", default)


_KEYS: Final[Mapping[str, _Key]] = MappingProxyType(
    {
        "commands.kinds": _Key(_list_of(_kind), f"a list of {', '.join(Kind)}", ()),
        "commands.signals": _Key(_list_of(_signal), f"a list of {', '.join(SignalName)}", tuple(SignalName)),
        "roots.managed": _Key(_list_of(_directory), "a list of absolute directories, or below ~", ()),
        "env.allow": _Key(_list_of(_env_pattern), "a list of names, or prefixes ending in *", ("*",)),
        "env.deny": _Key(_list_of(_env_pattern), "a list of names, or prefixes ending in *", ()),
        "limits.concurrent": _whole(CONCURRENT_MAX, CONCURRENT),
        "limits.grace_s_max": _Key(_number(0, GRACE_S_MAX), f"whole seconds from 0 to {GRACE_S_MAX}", GRACE_S_MAX),
        "limits.disk_free_mib_min": _whole(MIB_MAX, DISK_FREE_MIB, " of MiB"),
        "limits.disk_free_percent_min": _whole(PERCENT_MAX, DISK_FREE_PERCENT),
        "limits.inodes_free_percent_min": _whole(PERCENT_MAX, INODES_FREE_PERCENT),
        "limits.memory_available_mib_min": _whole(MIB_MAX, MEMORY_AVAILABLE_MIB, " of MiB"),
        "limits.fds_free_min": _whole(FDS_MAX, FDS_FREE),
        "orphans.outlive": _Key(
            _list_of(_program, OUTLIVE_MAX), f"a list of at most {OUTLIVE_MAX} names of programs, no paths", ()
        ),
        "daemon.on_stop": _Key(_on_stop, f"one of {', '.join(ON_STOP)}", ON_STOP[0]),
    }
)
_SECTIONS: Final = frozenset(name.partition(".")[0] for name in _KEYS)


def _plain(text: str) -> str:
    return ascii(text[:200])[1:-1]


def _quoted(text: str) -> str:
    """A TOML basic string: JSON's escapes but for those of DEL and of what TOML reads as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


_TEMPLATE: Final = """\
# What may be asked of this machine, whatever is signed. Everything that is not named here is denied; a mistake in this
# file denies everything. The runner reads it when it starts; no command can change it.
version = 1

[commands]
# Kinds that are admitted. Stops and releases always are.
kinds = [
{kinds},
]
# Signals that may be sent to what runs, by whoever may start it.
signals = [{signals}]

[roots]
# Directories that hold what executions may use as working directory, and repositories that worktrees may be made of.
# The runner's own worktrees are always among them.
managed = [{roots}]

[env]
# Variables that a command may set: names, or prefixes ending in *. A fixed list of dangerous ones is always denied.
allow = ["*"]
deny = []

[limits]
# Executions that may be alive at a time.
concurrent = {concurrent}
# The longest a command may ask to wait between TERM and KILL, in seconds.
grace_s_max = {grace_s_max}
# New executions and worktrees are refused, with a time to ask again, while this machine has less left; what runs is not
# touched, and 0 never refuses. Of the disk under the state directory both count, whichever is more.
disk_free_mib_min = {disk_free_mib_min}
disk_free_percent_min = {disk_free_percent_min}
inodes_free_percent_min = {inodes_free_percent_min}
memory_available_mib_min = {memory_available_mib_min}
# Descriptors that the daemon may still open.
fds_free_min = {fds_free_min}

[orphans]
# Programs that may live on when the execution that started them has ended, with what they have started: build daemons,
# for instance "gradle" or "watchman". A name as `ps -o comm` shows it, or the last part of a Java main class. Everything
# else that an execution leaves behind is ended. Who lived on is named in the execution's settlement.
outlive = []

[daemon]
# What becomes of running executions when the daemon is told to end: "leave" them running, the next daemon takes them up;
# "drain": take nothing new and wait for them, as long as the service manager has patience, then leave; "stop" them.
on_stop = {on_stop}
"""
