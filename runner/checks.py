"""Checks of what is the runner's own: settings, state, daemon, identity, policy, journal, control plane, leftovers."""

import os
import shlex
import sqlite3
import stat
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from protocol.limits import CLOCK_SKEW_MS
from protocol.text import show_age, show_duration
from runner.adapters.attemptfiles import attempt_directories, is_locked, read_attempt
from runner.adapters.control_client import ControlUnavailable, call_control
from runner.adapters.succession import JOURNAL
from runner.adapters.system import SystemClock
from runner.doctor import Check, Measured, Scene, Verdict, ok, skip
from runner.errors import ConfigError, NotEnrolled, Refused
from runner.verbs.options import CALL_TIMEOUT_S, socket_of

if TYPE_CHECKING:
    from runner.adapters.keystore import Identity

KEYSET_LEFT_MS_MIN: Final = 7 * 24 * 60 * 60 * 1000
"""A machine that is off over a holiday week must not come back to an expired keyset."""
FSYNC_P99_MS_MAX: Final = 50.0
"""Every command waits for two commits; beyond this the disk is what a user waits for."""
CONNECT_TIMEOUT_S: Final = 5.0
LOOK_TIMEOUT_S: Final = 12.0
"""The daemon looks at every process of this user: as long as the control socket gives it."""
NONCE_BYTES: Final = 32
_NO_SETTINGS: Final = "the settings cannot be read"
_NO_IDENTITY: Final = "not enrolled"
_ENROLL: Final = "runner enroll JOIN-STRING"


def settings(scene: Scene) -> Measured:
    """R001: the settings can be read."""
    if scene.problem is not None:
        return Measured(Verdict.FAIL, str(scene.problem), f"${{EDITOR:-vi}} {scene.problem.place}")
    file = scene.settings.config_file
    return ok(f"{file}" if file.exists() else f"defaults ({file} is not there)")


def state_directory(scene: Scene) -> Measured:
    """R002: identity, journal and logs are their owner's alone."""
    path = scene.settings.state_dir
    try:
        found = path.stat()
    except FileNotFoundError:
        return Measured(Verdict.FAIL, f"{path} is not there", _ENROLL)
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid != os.geteuid():
        return Measured(Verdict.FAIL, f"{path} belongs to uid {found.st_uid}", f"chown -R {os.geteuid()} {path}")
    if mode & 0o077:
        return Measured(Verdict.FAIL, f"{path} has mode {mode:04o}, expected 0700", f"chmod 700 {path}")
    return ok(f"{path} 0700")


def daemon(scene: Scene) -> Measured:
    """R003: one daemon holds the state directory and answers."""
    lock = scene.settings.state_dir / "runner.lock"
    held = is_locked(lock)
    try:
        said = call_control(socket_of(scene.settings), "status", {}, CALL_TIMEOUT_S)
    except ControlUnavailable as exc:
        if held:
            pid = _written_pid(lock)
            # It is ours to end: what it had started goes on, and a service starts it again by itself.
            return Measured(Verdict.FAIL, f"pid {pid} holds {lock}, but {exc.detail}", f"kill -9 {pid}; runner start")
        return Measured(Verdict.WARN, "not running", "runner service install --user --now")
    session = said.get("session") or {}
    value = f"pid {said.get('pid')} answers, session {session.get('state')}"
    if session.get("state") != "up":
        return Measured(
            Verdict.WARN, f"{value}: {session.get('reason') or 'no reason given'}", "runner doctor --only R008"
        )
    return ok(value)


def _written_pid(lock: Path) -> str:
    try:
        return lock.read_text("ascii", "replace").strip()[:10] or "unknown"
    except OSError:
        return "unknown"


def identity(scene: Scene) -> Measured:
    """R004: keys, root and certificate are there, fit each other, and nobody else can read them."""
    known = scene.identity
    if isinstance(known, NotEnrolled):
        return Measured(Verdict.FAIL, _NO_IDENTITY, _ENROLL)
    if isinstance(known, ConfigError):
        _sentence, found, command = known.expected.rpartition("chmod ")
        return Measured(Verdict.FAIL, str(known), f"chmod {command.rstrip(')')}" if found else f"{_ENROLL} --replace")
    mine = known.certificate.value
    return ok(f"{mine.name} ({mine.runner}), incarnation {mine.inc}, key {known.key.key_id}")


def policy(scene: Scene) -> Measured:
    """R005: the owner's policy can be read; without it nothing is admitted."""
    from runner.adapters.policyfile import load_policy

    file = scene.settings.policy_file
    known, problem = load_policy(file, ())
    if problem is not None:
        return Measured(Verdict.FAIL, problem, _repair_policy(file, problem))
    if not known.kinds:
        return Measured(Verdict.WARN, f"{file} admits nothing", f"${{EDITOR:-vi}} {file}")
    return ok(f"{known.digest[:19]}… admits {len(known.kinds)} kinds below {len(known.roots)} roots")


def _repair_policy(file: Path, problem: str) -> str:
    if not file.exists():
        return "runner policy init"
    return f"chmod go-w {file}" if "chmod" in problem else f"${{EDITOR:-vi}} {file}"


def keyset(scene: Scene) -> Measured:
    """R006: the keys that may sign commands have not run out."""
    known = scene.identity
    if isinstance(known, (NotEnrolled, ConfigError)):
        return skip(_NO_IDENTITY)
    version, left_ms = known.keyset.value.version, known.keyset.value.exp - SystemClock().now().wall_ms
    if left_ms <= 0:
        return Measured(
            Verdict.FAIL, f"version {version} expired {show_age(-left_ms)} ago", "runner doctor --only R008"
        )
    if left_ms < KEYSET_LEFT_MS_MIN:
        return Measured(Verdict.WARN, f"version {version} expires in {show_age(left_ms)}", "runner start")
    return ok(f"version {version}, good for {show_age(left_ms)}")


def journal(scene: Scene) -> Measured:
    """R007: the journal is whole and its disk is quick."""
    from runner.adapters.journal import measure_fsync

    path = scene.settings.state_dir / JOURNAL
    if not path.exists():
        return skip(f"{path} is not there yet")
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=CONNECT_TIMEOUT_S)) as connection:
            (said,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.Error as exc:
        return Measured(Verdict.FAIL, f"{path}: {exc}", _set_aside(path))
    if said != "ok":
        return Measured(Verdict.FAIL, f"{path}: {said}", _set_aside(path))
    times_ms = sorted(measure_fsync(path.parent))
    p99 = times_ms[min(len(times_ms) - 1, int(len(times_ms) * 0.99))]
    value = f"whole; fsync p99 {p99:.1f} ms"
    return Measured(Verdict.WARN, value, f"df {path.parent}") if p99 > FSYNC_P99_MS_MAX else ok(value)


def _set_aside(path: Path) -> str:
    """The file with its write-ahead log, which must never meet another journal."""
    aside = shlex.quote(str(path.parent / "journal.broken"))
    return f"mkdir {aside} && mv {shlex.quote(str(path))}* {aside}/"


def control_plane(scene: Scene) -> Measured:
    """R008: the control plane answers, and its clock is near ours. A hello changes nothing on either side."""
    known = scene.identity
    if isinstance(known, (NotEnrolled, ConfigError)):
        return skip(_NO_IDENTITY)
    from websockets.exceptions import InvalidHandshake

    from protocol.errors import RemoteError

    try:
        offset_ms, took_ms = _greet(known, scene.settings.proxy)
    except (OSError, InvalidHandshake, EOFError) as exc:
        return Measured(Verdict.FAIL, f"{known.url}: {exc or type(exc).__name__}", f"curl -sv {_health(known.url)}")
    except RemoteError as exc:
        return Measured(Verdict.FAIL, f"{known.url}: {exc}", "runner status")
    value = f"{known.url} in {took_ms} ms, its clock is {show_duration(offset_ms)} from ours"
    if abs(offset_ms) > CLOCK_SKEW_MS:
        return Measured(Verdict.WARN, value, "timedatectl set-ntp true")
    return ok(value)


def _health(url: str) -> str:
    return "http" + url.removeprefix("ws").removesuffix("/runner") + "/health"


def _greet(known: "Identity", proxy: str | None) -> tuple[int, int]:
    """The plane's clock minus ours at the middle of the exchange, and how long that took."""
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.client import connect
    from websockets.typing import Subprotocol

    from protocol.errors import Reason, RemoteError
    from protocol.keys import b64url
    from protocol.limits import FRAME_BYTES_MAX
    from protocol.messages import SUBPROTOCOL, Bye, Challenge, Hello, decode_from_plane, encode

    mine, clock = known.certificate.value, SystemClock()
    hello = Hello(org=mine.org, runner=mine.runner, nonce=b64url(clock.entropy(NONCE_BYTES)))
    with connect(
        known.url,
        subprotocols=[Subprotocol(SUBPROTOCOL)],
        compression=None,
        max_size=FRAME_BYTES_MAX,
        proxy=proxy,
        open_timeout=CONNECT_TIMEOUT_S,
        close_timeout=CONNECT_TIMEOUT_S,
    ) as connection:
        sent_ms = clock.now().wall_ms
        try:
            connection.send(encode(hello))
            said = decode_from_plane(str(connection.recv(CONNECT_TIMEOUT_S)))
        except ConnectionClosed as exc:
            raise RemoteError(Reason.UNEXPECTED_MESSAGE, f"closed before a challenge: {exc}") from exc
        came_ms = clock.now().wall_ms
    if isinstance(said, Bye):
        raise RemoteError(said.reason, said.detail)
    if not isinstance(said, Challenge):
        raise RemoteError(Reason.UNEXPECTED_MESSAGE, "no challenge")
    return said.now_ms - (sent_ms + came_ms) // 2, came_ms - sent_ms


def leftovers(scene: Scene) -> Measured:
    """R009: no attempt without a shim and without an end, no process that nobody guards and that may not live on."""
    found = [read_attempt(directory) for directory in attempt_directories(scene.settings.state_dir)]
    lost = [files.name for files in found if files.state == "lost"]
    orphans = _orphans(scene)
    if not lost and not orphans:
        return ok(f"none among {len(found)} attempts")
    said = [f"without shim and end: {' '.join(lost)}"] if lost else []
    if orphans:
        count = sum(len(pids) for pids in orphans.values())
        named = ", ".join(f"{name} (pid {' '.join(map(str, pids))})" for name, pids in orphans.items())
        said.append(f"{count} orphan{'s' if count > 1 else ''}: {named}")
    # A daemon settles lost attempts when it starts; whose attempt it does not know it leaves alone.
    restart = "systemctl --user restart runner   # or end `runner start` and run it again"
    return Measured(Verdict.WARN, "; ".join(said), "runner orphans --kill" if orphans else restart)


def _orphans(scene: Scene) -> dict[str, list[int]]:
    """Processes that no shim guards, by attempt: as the daemon says, else as processes and files do."""
    try:
        said = call_control(socket_of(scene.settings), "orphans", {}, LOOK_TIMEOUT_S)["attempts"]
    except (ControlUnavailable, Refused):
        # Nobody answers, or a daemon of an earlier version.
        said = _unguarded(scene)
    return {one["attempt"]: [each["pid"] for each in one["processes"]] for one in said if one["state"] != "guarded"}


def _unguarded(scene: Scene) -> list[dict[str, Any]]:
    from runner.adapters import cgroups
    from runner.adapters.attemptdir import Place
    from runner.adapters.policyfile import load_policy
    from runner.adapters.remains import UNGUARDED, Remains

    known, settings = scene.identity, scene.settings
    if isinstance(known, (NotEnrolled, ConfigError)):
        return []  # without a name of ours nothing is ours
    place = Place(
        state_dir=settings.state_dir,
        runner=known.certificate.value.runner,
        boot_id=SystemClock().boot_id,
        # What was delegated to the daemon is not what was delegated to this shell.
        cgroups=None if settings.cgroup == cgroups.AUTO else cgroups.base(settings.cgroup),
    )
    remains = Remains(place, lambda: load_policy(settings.policy_file, ())[0].outlive)
    remains.recall()
    return [one.told(UNGUARDED) for one in remains.strays() if not one.guarded]


CHECKS: Final = (
    Check("R001", "configuration", settings),
    Check("R002", "state directory", state_directory),
    Check("R003", "daemon", daemon),
    Check("R004", "identity and key modes", identity),
    Check("R005", "policy", policy),
    Check("R006", "keyset", keyset),
    Check("R007", "journal", journal),
    Check("R008", "control plane", control_plane),
    Check("R009", "leftovers", leftovers),
)
