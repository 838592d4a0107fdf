"""The daemon's settings: flags, then `LOCAL_RUNNER_*`, then the config file, then defaults. What may be asked of it is not here.

Rule: whatever is not understood is an error that names the place, the key and what was expected; nothing is guessed.
"""

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from protocol.limits import MIB, SEGMENT_BYTES, SPOOL_BYTES_PER_EXECUTION, SPOOL_BYTES_PER_HOST
from runner.errors import ConfigError

PREFIX: Final = "LOCAL_RUNNER_"
FLAGS_PLACE: Final = "flags"
ENVIRONMENT_PLACE: Final = "environment"
DEFAULT_PLACE: Final = "default"
CONFIG_BYTES_MAX: Final = 1 * MIB
LOG_LEVELS: Final = ("debug", "info", "warning", "error")
LOG_FORMS: Final = ("auto", "json", "console")
SPOOL_BYTES_RANGE: Final = (4 * MIB, 1024 * 1024 * MIB)
SEGMENT_BYTES_RANGE: Final = (1 * MIB, 1024 * MIB)
"""A segment holds many records of 64 KiB, or the head of a log alone would fill it."""
FLOOR_MIB: Final = 512
"""Room for the journal, for git and for whatever else the machine does, while one execution fills its disk."""
FLOOR_MIB_MAX: Final = 1024 * 1024
HOST_MIB_MAX: Final = 1024 * 1024 * 1024
DAY_MS: Final = 24 * 60 * 60 * 1000
KEEP_DAYS: Final = 7
"""Long enough to look at the log of last week's build on the machine where it ran."""
KEEP_DAYS_MAX: Final = 3650
_ELSEWHERE: Final = frozenset({"config", "system", "failpoints", "cookie", "attempt", "execution_id", "delegated"})
"""Variables of our prefix that are no settings: two say where to look, one is of the tests, three are of a shim's child, one of our
service unit."""
_CONTROL: Final = "control_"
"""Begin of the names that are for `runner-control`."""
_DIGITS: Final = re.compile(r"[0-9]{1,15}")
_PROXY: Final = re.compile(r"(http|https|socks5|socks5h)://[!-~]{1,2000}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything the daemon is told by its owner's machine; all paths are absolute."""

    config_file: Path
    """Where the file is, or would be."""
    state_dir: Path
    runtime_dir: Path
    policy_file: Path
    log_level: str = "info"
    log_format: str = "auto"
    proxy: str | None = field(default=None, repr=False)
    """URL of the proxy to dial through, perhaps with a password; None: never any, whatever the environment says."""
    git: str = "git"
    """A name to look up on PATH, or an absolute path."""
    spool_bytes: int = SPOOL_BYTES_PER_EXECUTION
    segment_bytes: int = SEGMENT_BYTES
    cgroup: str = "auto"
    """Where shims make control groups: below the daemon's own where that is delegated, nowhere (`off`), or below a directory."""
    floor_bytes: int = FLOOR_MIB * MIB
    """Free space of the disk below which spools stop growing; the journal goes on."""
    keep_ms: int = KEEP_DAYS * DAY_MS
    """How long files of an execution are kept that is settled, with all of its log at the control plane."""
    host_bytes: int = SPOOL_BYTES_PER_HOST
    """What all executions' files may take; above it the oldest go that may."""


class _Key(NamedTuple):
    toml: type
    parse: Callable[[str, Mapping[str, str]], Any]
    expected: str


def _path(text: str, environ: Mapping[str, str]) -> Path:
    home = environ.get("HOME", "")
    if text.startswith("~/") and home.startswith("/"):
        text = home + text[1:]
    if not text.startswith("/") or "\0" in text or ".." in text.split("/"):
        raise ValueError
    return Path(text)


def _proxy(text: str, _environ: Mapping[str, str]) -> str | None:
    if text and not _PROXY.fullmatch(text):
        raise ValueError
    return text or None


def _git(text: str, environ: Mapping[str, str]) -> str:
    return text if re.fullmatch(r"[A-Za-z0-9_.+-]+", text) else str(_path(text, environ))


def _choice(*allowed: str) -> _Key:
    def parse(text: str, _environ: Mapping[str, str]) -> str:
        if text not in allowed:
            raise ValueError
        return text

    return _Key(str, parse, f"one of {', '.join(allowed)}")


def _integer(low: int, high: int, unit: str) -> _Key:
    def parse(text: str, _environ: Mapping[str, str]) -> int:
        if not _DIGITS.fullmatch(text) or not low <= int(text) <= high:
            raise ValueError
        return int(text)

    return _Key(int, parse, f"a whole number of {unit} from {low} to {high}")


def _mebibytes(low: int, high: int) -> _Key:
    key = _integer(low, high, "MiB")
    return key._replace(parse=lambda text, environ: key.parse(text, environ) * MIB)


def _days(low: int, high: int) -> _Key:
    key = _integer(low, high, "days")
    return key._replace(parse=lambda text, environ: key.parse(text, environ) * DAY_MS)


def _cgroup(text: str, environ: Mapping[str, str]) -> str:
    return text if text in ("auto", "off") else str(_path(text, environ))


_PATH_KEY: Final = _Key(str, _path, "an absolute path, or one below ~/, without ..")
_KEYS: Final[Mapping[str, _Key]] = MappingProxyType(
    {
        "state_dir": _PATH_KEY,
        "runtime_dir": _PATH_KEY,
        "policy_file": _PATH_KEY,
        "log_level": _choice(*LOG_LEVELS),
        "log_format": _choice(*LOG_FORMS),
        "proxy": _Key(str, _proxy, "an http, https or socks5 URL, or nothing"),
        "git": _Key(str, _git, "a program name or an absolute path"),
        "spool_bytes": _integer(*SPOOL_BYTES_RANGE, "bytes"),
        "segment_bytes": _integer(*SEGMENT_BYTES_RANGE, "bytes"),
        "shim.cgroup": _Key(str, _cgroup, "auto, off, or the absolute path of a control group that is ours"),
        "spool.floor_mib": _mebibytes(0, FLOOR_MIB_MAX),
        "spool.keep_days": _days(0, KEEP_DAYS_MAX),
        "spool.host_mib": _mebibytes(0, HOST_MIB_MAX),
    }
)
"""By the name in the file: `table.key`, or a key outside of all tables."""
_FIELDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "shim.cgroup": "cgroup",
        "spool.floor_mib": "floor_bytes",
        "spool.keep_days": "keep_ms",
        "spool.host_mib": "host_bytes",
    }
)
"""Settings whose field is not called as their key."""
_TABLES: Final = frozenset(name.partition(".")[0] for name in _KEYS if "." in name)
_BY_WORD: Final[Mapping[str, str]] = MappingProxyType({name.replace(".", "_"): name for name in _KEYS})
"""Names as flags and variables have them."""
assert {_FIELDS.get(name, name) for name in _KEYS} | {"config_file"} == {f.name for f in fields(Settings)}


def load_settings(flags: Mapping[str, str | None], environ: Mapping[str, str]) -> Settings:
    """Read the settings; beyond its arguments it looks at the config file only.

    Args:
        flags: by setting name, and `config`; None is a flag that was not given.
        environ: `LOCAL_RUNNER_*`, HOME and the XDG variables. `LOCAL_RUNNER_SYSTEM=1` takes the system's directories.

    Raises:
        ConfigError: an unknown key, a wrong type, a relative path, a named file that is not there.
    """
    return explain_settings(flags, environ)[0]


def explain_settings(flags: Mapping[str, str | None], environ: Mapping[str, str]) -> tuple[Settings, Mapping[str, str]]:
    """As `load_settings`, and where each value came from: a flag, a variable, the file's path, or `default`."""
    given = {key: value for key, value in flags.items() if value is not None}
    ours = {key.removeprefix(PREFIX).lower(): value for key, value in environ.items() if key.startswith(PREFIX)}
    variables = {key: value for key, value in ours.items() if not key.startswith(_CONTROL)}
    file, required = _config_file(given, variables, environ)
    found: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, read in (
        (lambda _key: str(file), _from_file(file, environ, required=required)),
        (_variable_name, _from_texts(ENVIRONMENT_PLACE, variables, environ, _ELSEWHERE, _variable_name)),
        (_flag_name, _from_texts(FLAGS_PLACE, given, environ, frozenset({"config"}), _flag_name)),
    ):
        for name, value in read:
            key = _FIELDS.get(name, name)
            found[key], sources[key] = value, source(name)
    settings = Settings(**{**_defaults(found, file, variables, environ), **found})
    if settings.segment_bytes > settings.spool_bytes:
        raise ConfigError(str(file), "segment_bytes", "no more than spool_bytes")
    return settings, {**_default_sources(sources, given, variables, environ), **sources}


def _default_sources(
    sources: Mapping[str, str], given: Mapping[str, str], variables: Mapping[str, str], environ: Mapping[str, str]
) -> dict[str, str]:
    """What moved the places that nobody named; some follow another setting."""

    def moved_by(variable: str) -> str:
        return variable if environ.get(variable) and not _is_system(variables) else DEFAULT_PLACE

    known = dict.fromkeys((_FIELDS.get(name, name) for name in _KEYS), DEFAULT_PLACE)
    named = _flag_name("config") if "config" in given else _variable_name("config") if "config" in variables else ""
    known["config_file"] = known["policy_file"] = named or moved_by("XDG_CONFIG_HOME")
    known["state_dir"] = moved_by("XDG_STATE_HOME")
    runtime = moved_by("XDG_RUNTIME_DIR")
    followed = sources.get("state_dir", known["state_dir"])
    known["runtime_dir"] = followed if runtime == DEFAULT_PLACE and not _is_system(variables) else runtime
    return known


def _variable_name(name: str) -> str:
    return PREFIX + name.replace(".", "_").upper()


def _flag_name(name: str) -> str:
    return "--" + name.replace(".", "-").replace("_", "-")


def _config_file(
    given: Mapping[str, str], variables: Mapping[str, str], environ: Mapping[str, str]
) -> tuple[Path, bool]:
    """The file, and whether somebody named it: then it must be there."""
    if "config" in given:
        return _parsed(FLAGS_PLACE, "--config", _PATH_KEY, given["config"], environ), True
    if "config" in variables:
        return _parsed(ENVIRONMENT_PLACE, f"{PREFIX}CONFIG", _PATH_KEY, variables["config"], environ), True
    if _is_system(variables):
        return Path("/etc/runner/config.toml"), False
    return _xdg("XDG_CONFIG_HOME", ".config", environ) / "runner" / "config.toml", False


def _is_system(variables: Mapping[str, str]) -> bool:
    text = variables.get("system", "0")
    if text not in ("0", "1"):
        raise ConfigError(ENVIRONMENT_PLACE, f"{PREFIX}SYSTEM", "0 or 1")
    return text == "1"


def _defaults(
    found: Mapping[str, Any], file: Path, variables: Mapping[str, str], environ: Mapping[str, str]
) -> dict[str, Any]:
    """Places that nobody named; a variable that is not needed is not looked at."""
    places: dict[str, Any] = {"config_file": file, "policy_file": file.parent / "policy.toml"}
    system = _is_system(variables)
    if "state_dir" not in found:
        places["state_dir"] = (
            Path("/var/lib/runner") if system else _xdg("XDG_STATE_HOME", ".local/state", environ) / "runner"
        )
    if "runtime_dir" not in found:
        state_dir = found.get("state_dir") or places["state_dir"]
        places["runtime_dir"] = Path("/run/runner") if system else _user_runtime(state_dir, environ)
    return places


def _user_runtime(state_dir: Path, environ: Mapping[str, str]) -> Path:
    # Without a login session (containers, cron) there is no runtime directory; the state directory is as private.
    if not environ.get("XDG_RUNTIME_DIR"):
        return state_dir / "run"
    return _xdg("XDG_RUNTIME_DIR", "", environ) / "runner"


def _xdg(variable: str, below_home: str, environ: Mapping[str, str]) -> Path:
    if environ.get(variable):
        return Path(_parsed(ENVIRONMENT_PLACE, variable, _PATH_KEY, environ[variable], environ))
    home = environ.get("HOME", "")
    if not home.startswith("/"):
        raise ConfigError(ENVIRONMENT_PLACE, "HOME", f"an absolute path, or {variable} in its place")
    return Path(home) / below_home


def _from_texts(
    place: str,
    texts: Mapping[str, str],
    environ: Mapping[str, str],
    elsewhere: frozenset[str],
    shown: Callable[[str], str],
) -> Iterator[tuple[str, Any]]:
    for word, text in texts.items():
        if word in elsewhere:
            continue
        if word not in _BY_WORD:
            raise ConfigError(place, ascii(shown(word))[1:-1], _one_of(shown))
        name = _BY_WORD[word]
        yield name, _parsed(place, shown(name), _KEYS[name], text, environ)


def _from_file(file: Path, environ: Mapping[str, str], *, required: bool) -> Iterator[tuple[str, Any]]:
    try:
        with file.open("rb") as stream:
            content = stream.read(CONFIG_BYTES_MAX + 1)
    except FileNotFoundError:
        if required:
            raise ConfigError(str(file), "", "a file") from None
        return
    except OSError as exc:
        raise ConfigError(str(file), "", f"a readable file ({exc.strerror})") from exc
    for name, value in _tables(str(file), content).items():
        if name not in _KEYS:
            raise ConfigError(str(file), ascii(name)[1:-1], _one_of(str))
        key = _KEYS[name]
        if type(value) is not key.toml or not isinstance(value, str | int):
            raise ConfigError(str(file), name, key.expected)
        yield name, _parsed(str(file), name, key, value, environ)


def _tables(place: str, content: bytes) -> dict[str, Any]:
    """Values by their names; a table that is none of ours is a value like any other."""
    given: dict[str, Any] = {}
    for name, value in _document(place, content).items():
        if "." in name:
            raise ConfigError(place, ascii(name)[1:-1], "no quoted key: a table and a key in it")
        if name in _TABLES and isinstance(value, dict):
            given.update((f"{name}.{key}", inner) for key, inner in value.items())
        else:
            given[name] = value
    return given


def _document(place: str, content: bytes) -> dict[str, Any]:
    if len(content) > CONFIG_BYTES_MAX:
        raise ConfigError(place, "", f"at most {CONFIG_BYTES_MAX} bytes")
    try:
        return tomllib.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as exc:
        raise ConfigError(place, "", f"TOML in UTF-8 ({_first_line(exc)})") from exc


def _first_line(exc: Exception) -> str:
    return ascii(str(exc).partition("\n")[0][:200])[1:-1]


def _one_of(shown: Callable[[str], str]) -> str:
    return "one of " + ", ".join(sorted(map(shown, _KEYS)))


def _parsed(place: str, shown: str, key: _Key, value: str | int, environ: Mapping[str, str]) -> Any:
    try:
        return key.parse(str(value), environ)
    except ValueError:
        raise ConfigError(place, shown, key.expected) from None
