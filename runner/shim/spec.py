"""`spec.json` and the secrets of RELEASE, checked into one value. What is accepted here can be run as it stands."""

from __future__ import annotations

from binascii import a2b_base64

from runner.shim import files, lease

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from runner.shim.files import Json

COOKIE_NAME: Final = b"LOCAL_RUNNER_COOKIE"
ATTEMPT_NAME: Final = b"LOCAL_RUNNER_ATTEMPT"
EVENTS_FD_NAME: Final = b"LOCAL_RUNNER_EVENTS_FD"
EVENTS_FD: Final = 3
ATTEMPT_BYTES_MAX: Final = 255
SEGMENT_BYTES_MIN: Final = 1024
SEGMENT_BYTES_DEFAULT: Final = 8_388_608
SPOOL_BYTES_DEFAULT: Final = 1_073_741_824
# A year: more is a mistake in units, and it keeps every sum of deadlines far from overflow.
DURATION_MS_MAX: Final = 366 * 86_400_000
SIZE_MAX: Final = 1 << 62
RLIMIT_MAX: Final = 63
NAME_BYTES_MAX: Final = 255
OUTLIVE_MAX: Final = 64
# What happens to output beyond `spool_bytes`: its middle goes, its writer waits, its newest is not kept.
HEAD_TAIL, BLOCK, DISCARD = "head_tail", "block", "discard"
# A writer that waits must find room for one read when everything was trimmed.
BLOCK_BYTES_MIN: Final = 1_048_576
# A segment of a terminal's log begins with size and modes, and still has room for more than they take.
TTY_SEGMENT_BYTES_MIN: Final = 16_384
CELLS_MAX: Final = 1000
# Where a test can end or hold a shim, and how.
POINTS: Final = ("ready", "released", "spawned", "child_ended", "exit_told", "exit_durable")
POINT_ACTIONS: Final = ("kill", "stop")
_ACTIONS: Final = {
    "continue": lease.CONTINUE,
    "freeze": lease.ON_LOSS_FREEZE,
    "stop": lease.ON_LOSS_STOP,
}


class SpecError(ValueError):
    """A spec or a release that cannot be run; the text names the key."""


class Tty:
    """A terminal for the child: its size to begin with, whose size counts later, and whether what stays behind is swept."""

    __slots__ = ("cols", "leave", "rows", "size_policy")

    def __init__(self, rows: int, cols: int, size_policy: str, leave: bool) -> None:
        self.rows = rows
        self.cols = cols
        self.size_policy = size_policy
        self.leave = leave


class Spec:
    """What to run, checked. Texts for the kernel are bytes."""

    __slots__ = (
        "argv",
        "attempt",
        "cgroup",
        "cookie",
        "cwd",
        "env",
        "events",
        "execution",
        "fail",
        "floor_bytes",
        "grace_ms",
        "head_bytes",
        "idle_ms",
        "kill_wait_ms",
        "lease",
        "outlive",
        "overflow",
        "program",
        "rlimits",
        "secret_names",
        "segment_bytes",
        "spool_bytes",
        "stdin",
        "timeout_ms",
        "token",
        "tty",
        "umask",
    )

    def __init__(self, raw: dict[str, Json]) -> None:
        self.attempt = _raw_text(raw, "attempt")
        if not 0 < len(self.attempt) <= ATTEMPT_BYTES_MAX:
            raise SpecError("attempt: empty or too long")
        _raw_text(raw, "cmd_id")
        _raw_text(raw, "boot_id")
        self.argv = [_bytes(item, "argv") for item in _list(raw, "argv")]
        if not self.argv or not self.argv[0]:
            raise SpecError("argv: empty")
        self.cwd = _raw_text(raw, "cwd")
        if not self.cwd.startswith(b"/"):
            raise SpecError("cwd: not absolute")
        self.env = _environment(raw)
        self.secret_names = [_name(item, "secret_names") for item in _list(raw, "secret_names")]
        self.cookie = _raw_text(raw, "cookie")
        if not self.cookie:
            raise SpecError("cookie: empty")
        self.timeout_ms = None if _get(raw, "timeout_ms") is None else _int(raw, "timeout_ms", DURATION_MS_MAX)
        self.grace_ms = _int(raw, "grace_ms", DURATION_MS_MAX)
        self.kill_wait_ms = _int(raw, "kill_wait_ms", DURATION_MS_MAX)
        self.umask = _int(raw, "umask", 0o777)
        self.rlimits = _rlimits(raw)
        self.segment_bytes = _int(raw, "segment_bytes", SIZE_MAX)
        if self.segment_bytes < SEGMENT_BYTES_MIN:
            raise SpecError(f"segment_bytes: below {SEGMENT_BYTES_MIN}")
        self.spool_bytes = _int(raw, "spool_bytes", SIZE_MAX)
        self.lease = _lease(raw)
        # What follows came later: a spec without it means none.
        self.execution = _file_name(raw, "execution")
        self.token = _optional_int(raw, "token", SIZE_MAX) or 0
        self.cgroup = None if raw.get("cgroup") is None else _raw_text(raw, "cgroup")
        if self.cgroup is not None and not self.cgroup.startswith(b"/"):
            raise SpecError("cgroup: not absolute")
        self.outlive = _outlive(raw)
        self.floor_bytes = _optional_int(raw, "floor_bytes", SIZE_MAX) or 0
        self.idle_ms = _optional_int(raw, "idle_ms", DURATION_MS_MAX)
        self.overflow = str(raw.get("overflow") or DISCARD)
        if self.overflow not in (HEAD_TAIL, BLOCK, DISCARD):
            raise SpecError("overflow: not head_tail, block or discard")
        if self.overflow == BLOCK and self.spool_bytes < BLOCK_BYTES_MIN:
            raise SpecError(f"spool_bytes: below {BLOCK_BYTES_MIN}, with overflow block")
        self.head_bytes = _optional_int(raw, "head_bytes", SIZE_MAX) or 0
        self.stdin = raw.get("stdin") is True
        self.events = raw.get("events") is True
        self.program = None if raw.get("program") is None else _raw_text(raw, "program")
        self.tty = _tty(raw)
        if self.tty is not None and (self.stdin or self.events or self.overflow == BLOCK):
            raise SpecError("tty: with stdin, events or overflow block")
        if self.tty is not None and self.segment_bytes < TTY_SEGMENT_BYTES_MIN:
            raise SpecError(f"segment_bytes: below {TTY_SEGMENT_BYTES_MIN}, with a terminal")
        self.fail = _fail(raw)


def read_spec(dirfd: int) -> Spec:
    """The spec of the attempt in `dirfd`. Raises SpecError."""
    try:
        return Spec(files.read_object(dirfd, "spec.json", files.SPEC_BYTES_MAX))
    except SpecError as exc:
        raise SpecError(f"spec.json: {exc}") from None
    except files.FileError as exc:
        raise SpecError(str(exc)) from exc


def environment(spec: Spec, release: bytes) -> dict[bytes, bytes]:
    """The child's whole environment: the spec's, the secrets of the RELEASE body, the cookie and the attempt.

    A secret stands above a variable of the same name. Raises SpecError when the names are not exactly the spec's;
    the text holds names only, never a value.
    """
    try:
        secrets = files.decode(release)
    except ValueError as exc:
        raise SpecError("release: not a JSON object") from exc
    if not isinstance(secrets, dict):
        raise SpecError("release: not a JSON object")
    env = dict(spec.env)
    names = set()
    for key, value in secrets.items():
        name = _name(key, "release")
        names.add(name)
        try:
            secret = a2b_base64(value.encode("ascii"), strict_mode=True) if isinstance(value, str) else None
        except ValueError:
            secret = None
        if secret is None or b"\0" in secret:
            raise SpecError(f"release: the value of {key} is not base64 of bytes without NUL")
        env[name] = secret
    if names != set(spec.secret_names):
        raise SpecError("release: the names of the secrets are not those of secret_names")
    env[COOKIE_NAME] = spec.cookie
    env[ATTEMPT_NAME] = spec.attempt
    if spec.events:
        env[EVENTS_FD_NAME] = b"%d" % EVENTS_FD
    return env


def _get(raw: dict[str, Json], key: str) -> Json:
    if key not in raw:
        raise SpecError(f"{key}: missing")
    return raw[key]


def _list(raw: dict[str, Json], key: str) -> list[Json]:
    value = _get(raw, key)
    if not isinstance(value, list):
        raise SpecError(f"{key}: not a list")
    return value


def _bytes(value: Json, key: str) -> bytes:
    if not isinstance(value, str):
        raise SpecError(f"{key}: not a text")
    try:
        # File names and arguments need not be UTF-8; Python's own escape carries the other bytes.
        data = value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise SpecError(f"{key}: a surrogate that stands for no byte") from None
    if b"\0" in data:
        raise SpecError(f"{key}: holds a NUL")
    return data


def _raw_text(raw: dict[str, Json], key: str) -> bytes:
    return _bytes(_get(raw, key), key)


def _name(value: Json, key: str) -> bytes:
    name = _bytes(value, key)
    if not name or b"=" in name:
        raise SpecError(f"{key}: a name that is empty or holds '='")
    return name


def _int(raw: dict[str, Json], key: str, top: int) -> int:
    value = _get(raw, key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= top:
        raise SpecError(f"{key}: not an integer from 0 to {top}")
    return value


def _environment(raw: dict[str, Json]) -> dict[bytes, bytes]:
    value = _get(raw, "env")
    if not isinstance(value, dict):
        raise SpecError("env: not an object")
    return {_name(name, "env"): _bytes(text, "env") for name, text in value.items()}


def _rlimits(raw: dict[str, Json]) -> list[tuple[int, int, int]]:
    value = _get(raw, "rlimits")
    if not isinstance(value, dict):
        raise SpecError("rlimits: not an object")
    limits = []
    for key, pair in value.items():
        if not (key.isascii() and key.isdigit() and int(key) <= RLIMIT_MAX):
            raise SpecError("rlimits: a key that is no resource number")
        if not isinstance(pair, list) or len(pair) != 2:
            raise SpecError("rlimits: not [soft, hard]")
        soft, hard = pair
        for number in (soft, hard):
            if not isinstance(number, int) or isinstance(number, bool) or not -1 <= number <= SIZE_MAX:
                raise SpecError("rlimits: not [soft, hard]")
        assert isinstance(soft, int)
        assert isinstance(hard, int)
        limits.append((int(key), soft, hard))
    return limits


def _lease(raw: dict[str, Json]) -> lease.Lease | None:
    value = _get(raw, "lease")
    if value is None:
        return None
    if not isinstance(value, dict):
        raise SpecError("lease: not an object")
    action = _ACTIONS.get(str(value.get("action")))
    if action is None:
        raise SpecError("lease: action is not continue, freeze or stop")
    return lease.Lease(
        _int(value, "token", SIZE_MAX),
        _int(value, "deadline_ms", SIZE_MAX),
        action,
        _optional_int(value, "grace_ms", DURATION_MS_MAX),
    )


def _optional_int(raw: dict[str, Json], key: str, top: int) -> int | None:
    return None if raw.get(key) is None else _int(raw, key, top)


def _file_name(raw: dict[str, Json], key: str) -> bytes | None:
    if raw.get(key) is None:
        return None
    name = _raw_text(raw, key)
    if not 0 < len(name) <= NAME_BYTES_MAX or b"/" in name or name in (b".", b".."):
        raise SpecError(f"{key}: not the name of a file")
    return name


def _outlive(raw: dict[str, Json]) -> list[bytes]:
    if raw.get("outlive") is None:
        return []
    names = [_bytes(item, "outlive") for item in _list(raw, "outlive")]
    if len(names) > OUTLIVE_MAX or not all(names):
        raise SpecError(f"outlive: more than {OUTLIVE_MAX} names, or an empty one")
    return names


def _tty(raw: dict[str, Json]) -> Tty | None:
    value = raw.get("tty")
    if value is None:
        return None
    if not isinstance(value, dict):
        raise SpecError("tty: not an object")
    rows, cols = _int(value, "rows", CELLS_MAX), _int(value, "cols", CELLS_MAX)
    policy, background = value.get("size_policy", "latest"), value.get("background", "sweep")
    if rows < 1 or cols < 1 or policy not in ("latest", "smallest", "fixed") or background not in ("sweep", "leave"):
        raise SpecError("tty: a size, size_policy or background that is not known")
    return Tty(rows, cols, str(policy), background == "leave")


def _fail(raw: dict[str, Json]) -> dict[str, str]:
    value = raw.get("fail")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise SpecError("fail: not an object")
    points = {}
    for point, action in value.items():
        if point not in POINTS or action not in POINT_ACTIONS:
            raise SpecError("fail: a point or an action that is not known")
        points[point] = str(action)
    return points
