"""The operator's command line: help, exit codes, and what is said on stderr; real processes where it matters."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import anyio
import click
import pytest
from click.testing import CliRunner, Result

from protocol.errors import Reason
from protocol.records import RecordKind
from runner.adapters.attemptfiles import living_ptys
from runner.adapters.control import AnswerCall, ControlCall, serve_control
from runner.cli import VERBS, cli
from runner.errors import AnotherDaemon, NotEnrolled, Refused
from tests.support.attempts import AttemptDir

STATUS = {
    "pid": 77, "uptime_s": 3723, "version": "0.1.0", "runner": "rn_1", "name": "laptop", "org": "org_1", "inc": 2,
    "session": {"state": "down", "since_ms": 1_795_000_000_000, "url": "ws://127.0.0.1:1", "reason": "refused \x1b[31m"},
    "clock_offset_ms": -12, "attempts": 1, "policy_digest": "sha256:00", "keyset_version": 3,
    "outbox": {"head": 9, "unanswered": True}, "log_backlog_bytes": 1536, "key_id": "kid",
}  # fmt: skip
ATTEMPT = {
    "attempt": "ex_1.1", "execution_id": "ex_1", "start_token": 1, "state": "running", "argv": ["echo", "a b\x1b]0;x\x07"],
    "cwd": "/srv", "pid": 5, "started_ms": 1_795_000_000_000, "ended_ms": None, "verdict": None, "exit_status": None,
    "log_end": 10, "acked": 5, "lease": None,
}  # fmt: skip


async def a_daemon(call: ControlCall) -> dict[str, Any]:
    """Answers as the daemon does."""
    if call.verb == "status":
        return STATUS
    if call.verb == "ps":
        return {"attempts": [ATTEMPT] if call.args["all"] else []}
    if call.args["execution_id"] != "ex_1":
        raise Refused(Reason.UNKNOWN_TARGET, "no such execution")
    return {"attempt": "ex_1.1", "state": f"stopping {call.args['grace_ms']}"}


@contextmanager
def answering(path: Path, answer: AnswerCall = a_daemon) -> Iterator[None]:
    """A daemon on a thread of its own."""
    up, down = Event(), Event()

    async def serve() -> None:
        async with anyio.create_task_group() as tasks:
            await tasks.start(partial(serve_control, path, answer))
            up.set()
            await anyio.to_thread.run_sync(down.wait)
            tasks.cancel_scope.cancel()

    thread = Thread(target=partial(anyio.run, serve))
    thread.start()
    try:
        assert up.wait(10)
        yield
    finally:
        down.set()
        thread.join(10)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The command line in this process, with a state directory of its own."""
    for name in [name for name in os.environ if name.startswith(("LOCAL_RUNNER_", "XDG_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LOCAL_RUNNER_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("LOCAL_RUNNER_RUNTIME_DIR", str(tmp_path / "rt"))
    return lambda *args, **more: CliRunner().invoke(cli, args, **more)


def every_verb(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every verb and verb of a verb."""
    ctx = click.Context(group)
    for name in group.list_commands(ctx):
        found = group.get_command(ctx, name)
        yield (*path, name)
        if isinstance(found, click.Group):
            yield from every_verb(found, (*path, name))


@pytest.mark.parametrize("verb", list(every_verb()), ids=" ".join)
def test_every_verb_explains_itself(run: Callable[..., Result], verb: tuple[str, ...]) -> None:
    """With an example that begins with the command's name."""
    done = run(*verb, "--help")
    assert done.exit_code == 0
    assert "Example" in done.stdout and f"runner {verb[0]}" in done.stdout.partition("Example")[2]


def test_the_front_page_lists_every_verb_and_every_exit_code(run: Callable[..., Result]) -> None:
    """A first day, too."""
    page = run("--help").stdout
    assert all(f"  {verb} " in page for verb in VERBS)
    assert all(f" {code} " in page.replace("\n", " ") for code in (0, 1, 2, 3, 4, 5, 6, 8, 9))


def test_the_version_names_the_protocol(run: Callable[..., Result]) -> None:
    """Both numbers."""
    assert run("--version").stdout == "runner 0.1.0 (protocol 1)\n"


def test_status_of_a_running_daemon(run: Callable[..., Result], tmp_path: Path) -> None:
    """Exit status 0; what the daemon says cannot steer a terminal."""
    with answering(tmp_path / "rt" / "control.sock"):
        done, machine = run("status"), run("status", "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    for words in (
        "pid 77, up 1h2m",
        "down since",
        r"refused \x1b[31m",
        "-12ms",
        "not all answered, 9 in all",
        "1.5 KiB",
    ):
        assert words in done.stdout
    assert json.loads(machine.stdout) == {"running": True, **STATUS}


def test_status_of_somebody_elses_daemon_says_so(run: Callable[..., Result], tmp_path: Path) -> None:
    """Two runners of one user that share a socket directory."""

    async def other(_call: ControlCall) -> dict[str, Any]:
        return {**STATUS, "state_dir": "/other"}

    with answering(tmp_path / "rt" / "control.sock", other):
        done = run("status")
    assert done.exit_code == 0 and f"of /other, not of {tmp_path / 'state'}" in done.stderr


def test_status_without_a_daemon_tells_what_is_on_the_disk(run: Callable[..., Result], tmp_path: Path) -> None:
    """Exit status 1, the living attempts, and the next command."""
    living = AttemptDir(tmp_path / "state", "ex_1.1")
    AttemptDir(tmp_path / "state", "ex_2.1").finish()
    with living.held():
        done, machine = run("status"), run("status", "--json")
    assert done.exit_code == machine.exit_code == 1
    assert "not running" in done.stdout and "1 living: ex_1.1" in done.stdout
    assert "next: runner enroll" in done.stderr
    said = json.loads(machine.stdout)
    assert (said["running"], said["attempts"], said["identity"]["problem"]) == (False, ["ex_1.1"], "not enrolled")


def test_ps_shows_what_the_daemon_says(run: Callable[..., Result], tmp_path: Path) -> None:
    """Arguments are shown as words, and harmless."""
    with answering(tmp_path / "rt" / "control.sock"):
        assert "ex_1.1" not in run("ps").stdout
        shown = run("ps", "--all").stdout
        assert json.loads(run("ps", "--all", "--json").stdout) == {"attempts": [ATTEMPT]}
    assert r"echo 'a b\x1b]0;x\x07'" in shown and "\x1b" not in shown


def test_ps_without_a_daemon_reads_the_files(run: Callable[..., Result], tmp_path: Path) -> None:
    """And says so."""
    living = AttemptDir(tmp_path / "state", "ex_1.1", argv=("sleep", "60"))
    AttemptDir(tmp_path / "state", "ex_2.1").finish("signalled", None, signal=9)
    with living.held():
        few, everything = run("ps"), json.loads(run("ps", "--all", "--json").stdout)["attempts"]
    assert "sleep 60" in few.stdout and "ex_2.1" not in few.stdout and "what the files say" in few.stderr
    assert [(one["attempt"], one["state"], one["exit_status"]) for one in everything] == [
        ("ex_1.1", "running", None),
        ("ex_2.1", "ended", 137),
    ]


def test_a_pty_is_shown_as_one(run: Callable[..., Result], tmp_path: Path) -> None:
    """By its size, columns first; without one there is no such column. Those that live are listed for who looks at them."""
    state = tmp_path / "state"
    plain = AttemptDir(state, "ex_1.1")
    with plain.held():
        assert "TTY" not in run("ps").stdout and living_ptys(state) == []
        ptys = [AttemptDir(state, name, argv=("-bash",)) for name in ("ex_2.1", "ex_3.1", "ex_4.1")]
        for number, pty in enumerate(ptys):
            pty.put("spec.json", {"argv": ["-bash"], "cwd": "/srv", "tty": {"rows": 24, "cols": 80 + number}})
            pty.put("meta.json", {"phase": "running", "started_ns": (9 - number) * 10**9})
        with ptys[0].held(), ptys[1].held():
            shown = run("ps").stdout
            assert "TTY" in shown and "80x24" in shown and "81x24" in shown
            sizes = [one["terminal"] for one in json.loads(run("ps", "--json").stdout)["attempts"]]
            found = living_ptys(state)
    assert sizes == [None, "80x24", "81x24"]
    assert [(pty.attempt, pty.rows, pty.cols, pty.argv, pty.started_ms) for pty in found] == [
        ("ex_3.1", 24, 81, ("-bash",), 8000),
        ("ex_2.1", 24, 80, ("-bash",), 9000),
    ]
    assert found[0].directory == ptys[1].path


def test_stop_asks_the_daemon(run: Callable[..., Result], tmp_path: Path) -> None:
    """With the grace in milliseconds; a refusal says what comes next."""
    with answering(tmp_path / "rt" / "control.sock"):
        assert "ex_1.1 stopping 2500" in run("stop", "ex_1", "--grace", "2s500ms").stdout
        refused = run("stop", "ex_2")
    assert refused.exit_code == 1 and "UNKNOWN_TARGET" in refused.stderr
    assert "next: runner ps --all" in refused.stderr
    assert run("stop", "ex_1", "--grace", "5").exit_code == 2


def test_stop_without_a_daemon_tells_what_the_files_say(run: Callable[..., Result], tmp_path: Path) -> None:
    """What lives needs the daemon; what has ended has ended; what is unknown is said to be."""
    living = AttemptDir(tmp_path / "state", "ex_1.1")
    AttemptDir(tmp_path / "state", "ex_2.1").finish()
    with living.held():
        down, over, unknown = run("stop", "ex_1"), run("stop", "ex_2", "--json"), run("stop", "ex_3")
    assert down.exit_code == 1 and "ex_1.1 is running" in down.stderr and "next: runner start" in down.stderr
    assert (over.exit_code, json.loads(over.stdout)) == (0, {"attempt": "ex_2.1", "state": "ended"})
    assert unknown.exit_code == 1 and "UNKNOWN_TARGET" in unknown.stderr and "runner ps --all" in unknown.stderr


HEAVY = ("anyio", "asyncio", "cryptography", "fastapi", "git", "httpx", "pydantic", "structlog", "websockets")


@pytest.mark.parametrize(
    "verb", [("status",), ("ps",), ("ps", "--all", "--json"), ("stop", "ex_1"), ("config", "show")]
)
def test_a_look_at_a_running_daemon_is_light(tmp_path: Path, verb: tuple[str, ...]) -> None:
    """Nothing is imported that takes longer than the answer."""
    script = (
        "import atexit, sys; from runner.cli import main; sys.argv[0] = 'runner';"
        f"atexit.register(lambda: print('HEAVY', *sorted(sys.modules.keys() & set({HEAVY!r})), file=sys.stderr)); main()"
    )
    environ = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "LOCAL_RUNNER_RUNTIME_DIR": str(tmp_path / "rt")}
    with answering(tmp_path / "rt" / "control.sock"):
        done = subprocess.run(
            [sys.executable, "-c", script, *verb], env=environ, capture_output=True, text=True, timeout=60
        )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "HEAVY")


def shell(tmp_path: Path, *args: str, **more: Any) -> "subprocess.Popen[bytes]":
    """The command line as a process."""
    environ = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "LOCAL_RUNNER_STATE_DIR": str(tmp_path / "state")}
    return subprocess.Popen([sys.executable, "-m", "runner.cli", *args], env=environ, **more)


def test_logs_are_byte_exact_and_apart(tmp_path: Path) -> None:
    """Every byte value, with the daemon down; a hole is named on stderr."""
    made = AttemptDir(tmp_path / "state")
    every = bytes(range(256)) * 200
    made.write(every[:9])
    made.write(every[9:])
    made.write(b"\xff\x1b[1m", RecordKind.STDERR)
    made.roll(skip=250)
    made.finish()
    with shell(tmp_path, "logs", "ex_1", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, every, b"\xff\x1b[1m[gap: 250 bytes missing]\n")


@pytest.mark.slow
def test_following_logs_waits_for_the_end(tmp_path: Path) -> None:
    """What is written meanwhile comes at once; the end ends it."""
    made = AttemptDir(tmp_path / "state")
    made.write(b"first\n")
    with made.held(), shell(tmp_path, "logs", "-f", "ex_1.1", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"first\n"
        made.roll()
        made.write(b"second\n")
        assert process.stdout.readline() == b"second\n"
        made.finish()
        assert process.stdout.read() == b""
        assert process.wait(30) == 0


@pytest.mark.slow
def test_an_interrupt_ends_following(tmp_path: Path) -> None:
    """As a shell expects, without a traceback."""
    made = AttemptDir(tmp_path / "state")
    made.write(b"first\n")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with made.held(), shell(tmp_path, "logs", "-f", "ex_1", **pipes) as process:
        assert process.stdout is not None and process.stdout.readline() == b"first\n"
        process.send_signal(signal.SIGINT)
        assert (process.wait(30), process.stderr.read() if process.stderr else None) == (130, b"")


@pytest.mark.parametrize(("raw", "shown"), [((), b"a\\x1b]0;x\\x07b\r\n"), (("--raw",), b"a\x1b]0;x\x07b\r\n")])
@pytest.mark.slow
def test_a_terminal_is_not_steered_by_a_log(tmp_path: Path, raw: tuple[str, ...], shown: bytes) -> None:
    """Unless that is asked for; at the end it says how it ended."""
    made = AttemptDir(tmp_path / "state")
    made.write(b"a\x1b]0;x\x07b\n")
    made.finish("stopped", None, signal=15, cause={"kind": "stop", "by": "ada\x1b"})
    leader, follower = pty.openpty()
    with shell(tmp_path, "logs", *raw, "ex_1", stdout=follower, stderr=follower) as process:
        os.close(follower)
        said = b""
        while True:
            try:
                said += os.read(leader, 4096)
            except OSError:
                break
        process.wait(30)
    os.close(leader)
    assert said == shown + b"[stopped by signal 15 (stop ada\\x1b)]\r\n"


def test_logs_of_what_is_unknown(run: Callable[..., Result], tmp_path: Path) -> None:
    """An execution that is not here; a log that is damaged."""
    done = run("logs", "ex_404")
    assert done.exit_code == 1 and "next: runner ps --all" in done.stderr
    made = AttemptDir(tmp_path / "state")
    made.append(b"\xff" * 64)
    damaged = run("logs", "ex_1")
    assert damaged.exit_code == 1 and "damaged" in damaged.stderr


@pytest.mark.parametrize(
    ("raised", "code", "following"),
    [(NotEnrolled(), 4, "runner enroll"), (AnotherDaemon(12), 5, "runner status")],
)
def test_errors_have_codes_and_a_next_step(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, raised: Exception, code: int, following: str
) -> None:
    """What the daemon raises when it cannot begin."""

    def fail(*_args: Any) -> int:
        raise raised

    monkeypatch.setattr("anyio.run", fail)
    monkeypatch.setattr("runner.logs.configure", lambda *_args: None)
    done = run("start")
    assert done.exit_code == code and f"next: {following}" in done.stderr


def test_wrong_settings_are_a_configuration_error(run: Callable[..., Result], tmp_path: Path) -> None:
    """Exit status 3, with the file and the key."""
    (tmp_path / "config.toml").write_text("colour = 1\n")
    done = run("--config", str(tmp_path / "config.toml"), "status")
    assert done.exit_code == 3 and "config.toml: colour" in done.stderr
    assert f"next: ${{EDITOR:-vi}} {tmp_path / 'config.toml'}" in done.stderr
    assert "next: unset LOCAL_RUNNER_GIT" in run("status", env={"LOCAL_RUNNER_GIT": "./git"}).stderr
    assert "next: runner --help" in run("--log-level", "loud", "status").stderr


def test_config_show_prints_what_counts(run: Callable[..., Result], tmp_path: Path) -> None:
    """As text and as JSON; a relative path of a flag is of the caller's directory; a proxy's password is not shown."""
    found = json.loads(run("--state-dir", "here", "config", "show", "--json").stdout)["settings"]
    assert found["state_dir"] == {"value": os.path.abspath("here"), "source": "--state-dir"}
    assert found["proxy"] == {"value": None, "source": "default"}
    secret = run("config", "show", env={"LOCAL_RUNNER_PROXY": "http://ada:hunter2@proxy:1"})
    assert secret.exit_code == 0 and "hunter2" not in secret.stdout
    assert re.search(r"^proxy +\*\*\* +LOCAL_RUNNER_PROXY$", secret.stdout, re.MULTILINE)


def test_the_policy_is_written_once_and_shown(run: Callable[..., Result], tmp_path: Path) -> None:
    """A second time is an error; what the daemon would read is shown."""
    (tmp_path / "src").mkdir()
    assert run("policy", "init", "--root", str(tmp_path / "src")).exit_code == 0
    assert run("policy", "init").exit_code == 3
    found = json.loads(run("policy", "show", "--json").stdout)
    assert found["roots"] == [str(tmp_path / "src")] and "execution.start" in found["kinds"]


def test_a_policy_that_is_not_there_is_an_error(run: Callable[..., Result]) -> None:
    """With the command that writes one."""
    done = run("policy", "show")
    assert done.exit_code == 3 and "next: runner policy init" in done.stderr


def test_enrolling_wants_one_join_string(run: Callable[..., Result], tmp_path: Path) -> None:
    """None, two, and one that is none: usage errors that repeat nothing of it."""
    (tmp_path / "join").write_text("rj1://secret")
    for args, text in [((), None), (("x", "--token-file", str(tmp_path / "join")), None), (("-",), "rj1://secret\n")]:
        done = run("enroll", *args, input=text)
        assert done.exit_code == 2 and "secret" not in done.stderr
    assert run("enroll", "--label", "novalue", "-").exit_code == 2


def test_colours_are_for_terminals_that_want_them(run: Callable[..., Result], tmp_path: Path) -> None:
    """None in a pipe; none at a terminal with NO_COLOR."""
    with answering(tmp_path / "rt" / "control.sock"):
        assert "\x1b[1m" in run("status", color=True).stdout
        assert "\x1b" not in run("status", color=True, env={"NO_COLOR": "1"}).stdout
        assert "\x1b" not in run("status").stdout


def test_a_file_that_is_no_segment_does_not_stop_the_reader(tmp_path: Path) -> None:
    """The child's own user may put anything beside the segments."""
    made = AttemptDir(tmp_path / "state")
    made.write(b"said\n")
    made.finish()
    for name in ("gggggggggggggggg.seg", "0.seg", "notes"):
        (made.path / "log" / name).write_text("not ours")
    with shell(tmp_path, "logs", "ex_1", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert (process.stdout.read(), process.wait(30)) == (b"said\n", 0)
