"""The machine's edge: clocks, process identities, the state lock, systemd's socket."""

import fcntl
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from runner.adapters.system import (
    LOCK_PAUSE_S,
    StateLock,
    SystemClock,
    make_private,
    process_start,
    raise_fd_limit,
    sd_notify,
)
from runner.errors import AnotherDaemon, ConfigError


def test_the_clock_reads_wall_time_and_boottime_in_milliseconds() -> None:
    """Between two readings of the system's own."""
    clock = SystemClock()
    before = (time.time_ns() // 10**6, time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 10**6)
    now = clock.now()
    after = (time.time_ns() // 10**6, time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 10**6)
    assert before[0] <= now.wall_ms <= after[0]
    assert before[1] <= now.boot_ms <= after[1]
    assert len(clock.entropy(10)) == 10
    assert clock.entropy(16) != clock.entropy(16)
    assert clock.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def test_a_process_is_known_by_its_start(tmp_path: Path) -> None:
    """Whatever it calls itself; and it is nobody once it is reaped."""
    naughty = tmp_path / "a) R (b 1 2"
    naughty.symlink_to("/bin/sleep")
    with subprocess.Popen([str(naughty), "60"]) as child:
        # The child's name is the script's only once exec is over.
        while "(b" not in Path(f"/proc/{child.pid}/comm").read_text():
            time.sleep(0.001)
        start = process_start(child.pid)
        assert start is not None
        uptime_ticks = time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK")
        assert uptime_ticks - 60 * os.sysconf("SC_CLK_TCK") < start <= uptime_ticks + 1
        child.kill()
    assert process_start(child.pid) is None
    assert process_start(os.getpid()) == process_start(os.getpid()) is not None


def test_a_second_daemon_is_told_the_pid_of_the_first(tmp_path: Path) -> None:
    """In the same process or another; after the release the next one gets it."""
    path = tmp_path / "runner.lock"
    with StateLock(path):
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(AnotherDaemon) as caught:
            StateLock(path).acquire()
        assert caught.value.pid == os.getpid()
    with StateLock(path):
        pass


def test_a_killed_daemon_leaves_no_lock(tmp_path: Path) -> None:
    """The kernel gives it back; a stale pid in the file means nothing."""
    path = tmp_path / "runner.lock"
    code = (
        "import sys, time; from pathlib import Path; from runner.adapters.system import StateLock\n"
        "lock = StateLock(Path(sys.argv[1])); lock.acquire(); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(AnotherDaemon) as caught:
            StateLock(path).acquire()
        assert caught.value.pid == holder.pid
        holder.send_signal(signal.SIGKILL)
    with StateLock(path):
        assert path.read_text() == f"{os.getpid()}\n"


def test_a_lock_that_tells_no_pid_is_held_all_the_same(tmp_path: Path) -> None:
    """Its holder has not written it yet."""
    path = tmp_path / "runner.lock"
    with StateLock(path):
        path.write_text("garbage")
        with pytest.raises(AnotherDaemon) as caught:
            StateLock(path).acquire()
    assert caught.value.pid is None


def test_a_look_at_the_lock_is_no_other_daemon(tmp_path: Path) -> None:
    """Doctor probes it: whoever wants it waits for that moment."""
    path = tmp_path / "runner.lock"
    path.touch()
    with path.open() as probe:
        fcntl.flock(probe, fcntl.LOCK_SH)
        timer = threading.Timer(LOCK_PAUSE_S * 1.5, lambda: fcntl.flock(probe, fcntl.LOCK_UN))
        timer.start()
        with StateLock(path):
            timer.join()


def test_a_place_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    """As a mistake of the settings, not as a traceback."""
    (tmp_path / "file").touch()
    for attempt in (lambda: make_private(tmp_path / "file" / "state"), StateLock(tmp_path / "file" / "lock").acquire):
        with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "file"))):
            attempt()


def test_the_soft_limit_of_files_is_lifted() -> None:
    """To the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
    try:
        assert raise_fd_limit() == hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_hears_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    """On a path or an abstract socket."""
    shown = f"@runner-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.bind(shown.replace("@", "\0") if abstract else shown)
        ear.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", shown)
        assert sd_notify("READY=1\nSTATUS=ready")
        assert ear.recv(100) == b"READY=1\nSTATUS=ready"


@pytest.mark.parametrize("address", [None, "", "relative", "/nowhere/at/all", "vsock:2:1"])
def test_nobody_listening_is_no_error(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    """It says False."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert not sd_notify("READY=1")
