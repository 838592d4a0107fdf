"""Doctor: each thing broken by hand is found, under its id, with a verdict and the command that helps."""

import fcntl
import json
import os
import resource
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import anyio
import pytest
from click.testing import CliRunner

from protocol.identity import JoinString
from runner import checks, daemon_checks, machine_checks
from runner.adapters.control import ControlCall
from runner.adapters.enrolment import MachineFacts, enroll
from runner.adapters.keystore import Keystore
from runner.adapters.policyfile import write_default
from runner.cli import cli
from runner.config import Settings
from runner.core.inputs import Now
from runner.doctor import Measured, Scene, Verdict, examine
from runner.errors import ConfigError
from runner.link import TWO_MACHINES
from tests.support.attempts import AttemptDir
from tests.support.control_plane import running
from tests.unit.runner.planekeys import PlaneKeys
from tests.unit.runner.test_cli import STATUS, answering

GIT = """#!/bin/sh
echo "git version $SAID"
"""


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    """A machine where nothing is wrong yet, and nobody has enrolled."""
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    settings = Settings(
        config_file=tmp_path / "config.toml",
        state_dir=state,
        runtime_dir=tmp_path / "rt",
        policy_file=tmp_path / "policy.toml",
    )
    return Scene(settings, environ={"HOME": str(tmp_path)})


def test_ids_are_unique_and_in_order() -> None:
    """Scripts name them."""
    ids = [check.id for check in (*checks.CHECKS, *machine_checks.CHECKS, *daemon_checks.CHECKS)]
    assert ids == [f"R{number:03d}" for number in range(1, len(ids) + 1)]


def test_settings_that_cannot_be_read_are_the_one_finding(tmp_path: Path) -> None:
    """Nothing else can be looked at; exit status 9."""
    (tmp_path / "c.toml").write_text("=")
    done = CliRunner().invoke(cli, ["--config", str(tmp_path / "c.toml"), "doctor", "--json"])
    (finding,) = json.loads(done.stdout)["findings"]
    assert (done.exit_code, finding["id"], finding["verdict"]) == (9, "R001", "fail")
    assert finding["fix"].endswith("c.toml")


def test_a_state_directory_open_to_others(scene: Scene) -> None:
    """0755 instead of 0700; and one that is not there."""
    scene.settings.state_dir.chmod(0o755)
    found = checks.state_directory(scene)
    assert (found.verdict, found.fix) == (Verdict.FAIL, f"chmod 700 {scene.settings.state_dir}")
    scene.settings.state_dir.rmdir()
    assert checks.state_directory(scene).fix.startswith("runner enroll")


def test_a_daemon_that_is_down(scene: Scene) -> None:
    """A warning: it may be meant."""
    found = checks.daemon(scene)
    assert (found.verdict, found.fix) == (Verdict.WARN, "runner service install --user --now")


def test_a_daemon_that_holds_the_lock_and_says_nothing(scene: Scene) -> None:
    """With its process id, as it wrote it."""
    with (scene.settings.state_dir / "runner.lock").open("w") as lock:
        lock.write("4711\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = checks.daemon(scene)
    assert found.verdict is Verdict.FAIL and "pid 4711" in found.value and found.fix.startswith("kill -9 4711")


def test_a_daemon_without_a_session(scene: Scene) -> None:
    """It answers, and says why it is offline; connected, all is well."""
    path = scene.settings.runtime_dir / "control.sock"
    with answering(path):
        found = checks.daemon(scene)
    assert found.verdict is Verdict.WARN and "refused" in found.value and "R008" in found.fix

    async def connected(_call: ControlCall) -> dict[str, object]:
        return {**STATUS, "session": {"state": "up"}}

    with answering(path, connected):
        assert checks.daemon(scene).verdict is Verdict.OK


def test_nobody_enrolled(scene: Scene) -> None:
    """Identity fails, what needs one is skipped."""
    assert checks.identity(scene).fix.startswith("runner enroll")
    assert checks.keyset(scene).verdict is checks.control_plane(scene).verdict is Verdict.SKIP


def test_a_key_that_others_can_read(scene: Scene) -> None:
    """The fix is the chmod of that very file."""
    directory = scene.settings.state_dir / "identity"
    directory.mkdir(mode=0o700)
    (directory / "plane.json").write_text('{"v":1,"url":"ws://127.0.0.1:1/v1/runner"}')
    for name in ("runner.key", "seal.key", "plane.json", "root.json", "keyset.json", "certificate.json"):
        (directory / name).touch()
        (directory / name).chmod(0o600)
    (directory / "runner.key").chmod(0o644)
    found = checks.identity(scene)
    assert (found.verdict, found.fix) == (Verdict.FAIL, f"chmod 600 {directory / 'runner.key'}")
    directory.chmod(0o755)
    assert checks.identity(Scene(scene.found)).fix == f"chmod 700 {directory}"


def test_a_policy_that_is_missing_or_wrong(scene: Scene) -> None:
    """Without one nothing is admitted, so it is a failure."""
    assert checks.policy(scene).fix == "runner policy init"
    file = scene.settings.policy_file
    file.write_text("version = 1\ncolour = 2\n")
    file.chmod(0o600)
    found = checks.policy(scene)
    assert found.verdict is Verdict.FAIL and "colour" in found.value and found.fix.endswith(str(file))
    file.chmod(0o620)
    assert checks.policy(scene).fix == f"chmod go-w {file}"
    file.chmod(0o600)
    file.write_text("version = 1\n")
    assert checks.policy(scene).verdict is Verdict.WARN


def test_a_journal_that_is_whole_and_one_that_is_not(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skipped before there is one; damaged; on a slow disk."""
    assert checks.journal(scene).verdict is Verdict.SKIP
    path = scene.settings.state_dir / checks.JOURNAL
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE t (x)")
        connection.executemany("INSERT INTO t VALUES (?)", [("y" * 500,)] * 100)
        connection.commit()
    assert checks.journal(scene).value.startswith("whole; fsync p99")
    monkeypatch.setattr("runner.adapters.journal.measure_fsync", lambda _directory: [1.0] * 99 + [99.0])
    assert checks.journal(scene).verdict is Verdict.WARN
    content = bytearray(path.read_bytes())
    content[4096:12288] = b"\xa5" * 8192
    path.write_bytes(content)
    found = checks.journal(scene)
    assert found.verdict is Verdict.FAIL and f"mv {path}* " in found.fix


@contextmanager
def carrying(cookie: str) -> Iterator[int]:
    """A process with an attempt's cookie in its environment."""
    environ = {"LOCAL_RUNNER_COOKIE": cookie}
    script = "import sys; print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", script], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid


def enrolled(scene: Scene, runner: str) -> Scene:
    """The same machine, as this runner."""
    plane, keystore = PlaneKeys(), Keystore(scene.settings.state_dir / "identity")
    mine, seal_seed = keystore.create_keys()
    certificate = plane.certificate(mine, seal_seed, runner=runner)
    keystore.keep_enrolment(plane.root, plane.keyset(), certificate, "ws://127.0.0.1:1/v1/runner")
    return Scene(scene.found, environ=scene.environ)


def test_attempts_and_processes_that_nobody_looks_after(scene: Scene) -> None:
    """A lost attempt; a process whose attempt has ended. What a shim guards, and what the owner lets live on, are no leftovers."""
    assert checks.leftovers(scene).verdict is Verdict.OK
    mine = f"rn_{os.getpid()}"
    scene = enrolled(scene, mine)
    living = AttemptDir(scene.settings.state_dir, f"ex_{os.getpid()}a.1")
    ended = AttemptDir(scene.settings.state_dir, f"ex_{os.getpid()}b.1")
    ended.finish()
    with living.held(), carrying(f"{mine}:{living.name}") as good, carrying(f"{mine}:{ended.name}") as bad:
        found = checks.leftovers(scene)
        assert found.verdict is Verdict.WARN and f"1 orphan: {ended.name} (pid {bad})" in found.value
        assert found.fix == "runner orphans --kill"
        assert str(good) not in found.value
        ended.put("spec.json", {"argv": ["make"], "cwd": "/", "cookie": "", "outlive": [Path(sys.executable).name]})
        assert checks.leftovers(scene).verdict is Verdict.OK
    assert living.name in checks.leftovers(scene).value


def test_orphans_as_a_daemon_knows_them(scene: Scene) -> None:
    """It has the journal, and knows whom it could not end."""
    process = {"pid": 7, "name": "sh", "age_ms": 1, "tier": "cookie"}
    told = [
        {"attempt": f"ex_{n}.1", "state": state, "processes": [process]}
        for n, state in enumerate(("guarded", "settled"))
    ]

    async def answer(call: ControlCall) -> dict[str, object]:
        assert (call.verb, call.args) == ("orphans", {})
        return {"attempts": told}

    with answering(scene.settings.runtime_dir / "control.sock", answer):
        assert checks.leftovers(scene).value == "1 orphan: ex_1.1 (pid 7)"


def test_a_disk_that_is_nearly_full(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning, then a failure; a state directory that is not there yet is measured where it would be."""
    monkeypatch.setattr(machine_checks, "DISK_BYTES_FAIL", 0)
    monkeypatch.setattr(machine_checks, "DISK_BYTES_WARN", 0)
    nowhere = replace(scene.settings, state_dir=scene.settings.state_dir / "a" / "b")
    assert machine_checks.disk(Scene(nowhere)).verdict is Verdict.OK
    monkeypatch.setattr(machine_checks, "DISK_BYTES_WARN", 2**60)
    assert machine_checks.disk(scene).verdict is Verdict.WARN
    monkeypatch.setattr(machine_checks, "DISK_BYTES_FAIL", 2**60)
    found = machine_checks.disk(scene)
    assert found.verdict is Verdict.FAIL and found.fix.startswith("du ")


def test_too_few_descriptors(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the hard limit: the daemon raises the soft one itself."""
    for hard, verdict in [(128, Verdict.FAIL), (1024, Verdict.WARN), (65536, Verdict.OK), (-1, Verdict.OK)]:
        monkeypatch.setattr(resource, "getrlimit", lambda _what, hard=hard: (128, hard))
        assert machine_checks.descriptors(scene).verdict is verdict


@pytest.mark.parametrize(
    ("said", "verdict"),
    [("2.36.0", Verdict.OK), ("3.0.1 (Vendor)", Verdict.OK), ("2.35.9", Verdict.FAIL), ("unknown", Verdict.FAIL)],
)
def test_git_of_other_versions(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, verdict: Verdict
) -> None:
    """At least 2.36."""
    program = tmp_path / "git"
    program.write_text(GIT)
    program.chmod(0o755)
    monkeypatch.setenv("SAID", said)
    found = machine_checks.git(Scene(replace(scene.settings, git=str(program))))
    assert found.verdict is verdict and ("apt-get install git" in found.fix) == (verdict is Verdict.FAIL)


def test_no_git_at_all(scene: Scene, tmp_path: Path) -> None:
    """Neither there nor executable."""
    for name in ("nowhere", "config.toml"):
        (tmp_path / "config.toml").touch()
        found = machine_checks.git(Scene(replace(scene.settings, git=str(tmp_path / name))))
        assert found.verdict is Verdict.FAIL and "cannot be run" in found.value


def test_this_kernel_can_do_what_is_needed(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured; and what is missing is named."""
    assert machine_checks.kernel(scene).verdict is Verdict.OK

    def refuse(_pid: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    assert machine_checks.kernel(scene).value == "missing: pidfd"


def test_a_terminal_can_be_opened(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real one; and without /dev/pts."""
    assert machine_checks.terminal(scene).verdict is Verdict.OK

    def refuse() -> tuple[int, int]:
        raise OSError("out of pty devices")

    monkeypatch.setattr("pty.fork", refuse)
    monkeypatch.setattr("ptyprocess.ptyprocess.pty.fork", refuse)
    assert machine_checks.terminal(scene).verdict is Verdict.FAIL


def test_a_unit_that_would_end_every_execution(scene: Scene, tmp_path: Path) -> None:
    """KillMode missing; a command that is gone; the unit as it is installed."""
    path = tmp_path / ".config" / "systemd" / "user" / "runner.service"
    path.parent.mkdir(parents=True)
    path.write_text("[Service]\nExecStart=/bin/true start\n")
    assert "KillMode=control-group" in machine_checks.unit(scene).value
    path.write_text("[Service]\nKillMode=process\nExecStart=/nowhere/runner start\n")
    assert machine_checks.unit(scene).verdict is Verdict.FAIL
    path.write_text("[Service]\nKillMode=process\nExecStart=/bin/true start\n")
    assert machine_checks.unit(scene).verdict is Verdict.OK


def test_what_a_check_did_not_foresee_is_a_finding(scene: Scene) -> None:
    """The next checks still have their say."""

    def fail(_scene: Scene) -> Measured:
        raise PermissionError(13, "Permission denied", "/secret")

    (broken, fine) = examine(scene, [checks.CHECKS[0]._replace(measure=fail), checks.CHECKS[0]])
    assert (broken.verdict, broken.measured) == (Verdict.FAIL, "/secret: Permission denied")
    assert fine.verdict is Verdict.OK


def test_exit_codes_follow_the_worst_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """0, 8 and 9; an id that is none is a usage error."""
    monkeypatch.setenv("LOCAL_RUNNER_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("LOCAL_RUNNER_RUNTIME_DIR", str(tmp_path / "rt"))
    run = CliRunner().invoke
    assert run(cli, ["doctor", "--only", "R013"]).exit_code == 0
    warned = run(cli, ["doctor", "--only", "R003"])
    assert warned.exit_code == 8 and "warn  R003" in warned.stdout and "fix: runner service" in warned.stdout
    assert run(cli, ["doctor", "--only", "R013", "--only", "R004"]).exit_code == 9
    assert run(cli, ["doctor", "--only", "R999"]).exit_code == 2


def test_problems_of_settings_name_their_place() -> None:
    """The place is what is to be edited."""
    found = checks.settings(Scene(None, ConfigError("/etc/x.toml", "key", "a number")))
    assert (found.verdict, found.fix) == (Verdict.FAIL, "${EDITOR:-vi} /etc/x.toml")


@pytest.mark.parametrize(("left_ms", "verdict"), [(-1, Verdict.FAIL), (3_600_000, Verdict.WARN), (10**10, Verdict.OK)])
def test_a_keyset_that_runs_out(scene: Scene, monkeypatch: pytest.MonkeyPatch, left_ms: int, verdict: Verdict) -> None:
    """Expired, about to be, and good for months."""
    plane = PlaneKeys()
    keystore = Keystore(scene.settings.state_dir / "identity")
    mine, seal_seed = keystore.create_keys()
    keystore.keep_enrolment(
        plane.root, plane.keyset(), plane.certificate(mine, seal_seed), "ws://127.0.0.1:1/v1/runner"
    )

    class Clock:
        def now(self) -> Now:
            return Now(2000 - left_ms, 0)

    monkeypatch.setattr(checks, "SystemClock", Clock)
    assert checks.keyset(scene).verdict is verdict
    assert checks.identity(scene).verdict is Verdict.OK


async def test_a_control_plane_with_another_clock_or_none(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured by a real hello and challenge."""
    keystore = Keystore(scene.settings.state_dir / "identity")
    async with running(tmp_path / "plane") as plane:
        join = JoinString.parse(await plane.join())
        facts = MachineFacts(boot_id="b", hostname="h", platform="p", version="v")
        await enroll(join, keystore, name="laptop", labels={}, facts=facts, proxy=None)
        assert (await anyio.to_thread.run_sync(checks.control_plane, scene)).verdict is Verdict.OK
        plane.clock.ahead_ms = 120_000
        ahead = await anyio.to_thread.run_sync(checks.control_plane, scene)
    assert ahead.verdict is Verdict.WARN and ahead.fix == "timedatectl set-ntp true"
    gone = await anyio.to_thread.run_sync(checks.control_plane, scene)
    assert gone.verdict is Verdict.FAIL and gone.fix.startswith("curl")


@contextmanager
def saying(scene: Scene, **said: object) -> Iterator[None]:
    """A daemon that says this of itself."""

    async def answer(_call: ControlCall) -> dict[str, object]:
        return {**STATUS, **said}

    with answering(scene.settings.runtime_dir / "control.sock", answer):
        yield


def test_without_a_daemon_there_is_nobody_to_ask(scene: Scene) -> None:
    """But what the machine has left can be measured."""
    skipped = (daemon_checks.admission, daemon_checks.control_groups, daemon_checks.conflict, daemon_checks.leases)
    assert {check(scene).verdict for check in skipped} == {Verdict.SKIP}
    write_default(scene.settings.policy_file, ["/"], minimums=False)
    found = daemon_checks.headroom(scene)
    assert found.verdict is Verdict.OK and "disk " in found.value and "descriptors" not in found.value
    text = scene.settings.policy_file.read_text()
    scene.settings.policy_file.write_text(text.replace("disk_free_mib_min = 0", "disk_free_mib_min = 1048576"))
    found = daemon_checks.headroom(scene)
    assert found.verdict is Verdict.WARN and "DISK_LOW" in found.value and found.fix.endswith("policy.toml")


def test_a_machine_that_is_closed(scene: Scene) -> None:
    """Paused, or draining: a warning, and how it is opened."""
    with saying(scene, admission={"state": "open", "stops_in_ms": None}):
        assert daemon_checks.admission(scene).verdict is Verdict.OK
    for state in ("paused", "draining"):
        with saying(scene, admission={"state": state, "stops_in_ms": None}):
            found = daemon_checks.admission(scene)
        assert (found.verdict, found.fix) == (Verdict.WARN, "runner resume") and state in found.value


def test_a_daemon_with_too_few_descriptors(scene: Scene) -> None:
    """It measures itself; its word counts."""
    with saying(scene, headroom={"fds_free": 3, "short": "FDS_LOW", "detail": "3 descriptors are free, 64 are wanted"}):
        found = daemon_checks.headroom(scene)
    assert found.verdict is Verdict.WARN and "FDS_LOW, 3 descriptors" in found.value
    with saying(scene, headroom={"fds_free": 300, "disk_free": 2**30, "short": None, "detail": ""}):
        assert daemon_checks.headroom(scene).value.endswith("disk 1 GiB, descriptors 300")


def test_the_ways_by_which_processes_are_found(scene: Scene, tmp_path: Path) -> None:
    """Delegated; not delegated by an old unit; a group that cannot be used; off."""
    with saying(scene, cgroups="/sys/fs/cgroup/x"):
        assert (
            daemon_checks.control_groups(scene).value == "by control groups below /sys/fs/cgroup/x, descendants, cookie"
        )
    with saying(scene, cgroups=None):
        assert daemon_checks.control_groups(scene) == (Verdict.OK, "by descendants, cookie", "")
        unit = tmp_path / ".config" / "systemd" / "user" / "runner.service"
        unit.parent.mkdir(parents=True)
        unit.write_text("[Service]\nKillMode=process\n")
        found = daemon_checks.control_groups(scene)
        assert found.verdict is Verdict.WARN and found.fix == "runner service install --user --now"
        mine = Scene(replace(scene.settings, cgroup="/sys/fs/cgroup/mine"))
        found = daemon_checks.control_groups(mine)
        assert found.verdict is Verdict.WARN and "/sys/fs/cgroup/mine cannot be used" in found.value
    assert daemon_checks.control_groups(Scene(replace(scene.settings, cgroup="off"))).verdict is Verdict.OK


@pytest.mark.parametrize("reason", ["IDENTITY_CONFLICT: seen twice", f"closed: {TWO_MACHINES}"])
def test_a_machine_that_is_there_twice(scene: Scene, reason: str) -> None:
    """A copy of a disk, a restored snapshot: never silently down."""
    with saying(scene, session={"state": "down", "reason": reason}):
        found = daemon_checks.conflict(scene)
    assert found.verdict is Verdict.FAIL and found.value == reason and "enroll --replace" in found.fix
    with saying(scene):
        assert daemon_checks.conflict(scene).verdict is Verdict.OK


@pytest.mark.parametrize(
    ("held", "lost", "late", "verdict", "said"),
    [
        (0, 0, 0, Verdict.OK, "none"),
        (3, 0, 0, Verdict.OK, "3 held"),
        (3, 0, 1, Verdict.WARN, "1 of 3 not renewed in time, the next is over in 4s"),
        (1, 2, 0, Verdict.WARN, "2 lost, 1 held"),
    ],
)
def test_leases_that_run_out(scene: Scene, held: int, lost: int, late: int, verdict: Verdict, said: str) -> None:
    """Before they are lost, and after."""
    with saying(scene, leases={"held": held, "lost": lost, "late": late, "soonest_ms": 4200}):
        found = daemon_checks.leases(scene)
    assert found.verdict is verdict and said in found.value
