"""A terminal held by a real shim: real job control, typing that counts, sizes, and ends as they are."""

from __future__ import annotations

import hashlib
import os
import signal
import struct
import sys
import time
from typing import Any

import pytest

from runner.shim import lease, machine, terminal, wire
from runner.shim.spec import SpecError
from tests.support.shim import Connection, Shim, wait_for
from tests.support.viewer import Viewer
from tests.unit.runner.shim.conftest import StartShim

MIB = 1 << 20
ENV = {"PATH": "/usr/local/bin:/usr/bin:/bin", "TERM": "xterm-256color", "PS1": "$ ", "HISTFILE": "/dev/null"}
RAW = "import os, sys, tty; tty.setraw(0)\n{}\nprint('raw', flush=True)\n{}"


def opened(start_shim: StartShim, *argv: str, rows: int = 24, cols: int = 80, **spec: Any) -> Shim:
    """A PTY whose child runs."""
    tty = {"rows": rows, "cols": cols} | spec.pop("tty", {})
    wanted = {"overflow": "head_tail", "segment_bytes": MIB, "spool_bytes": 8 * MIB, "env": ENV} | spec
    shim: Shim = start_shim(argv=list(argv), tty=tty, **wanted)
    shim.start()
    return shim


def shell(start_shim: StartShim, **spec: Any) -> tuple[Shim, Viewer]:
    """An interactive shell and somebody who may type."""
    shim = opened(start_shim, "bash", "--norc", "-i", **spec)
    viewer = Viewer(shim)
    viewer.shows(b"$ ")
    return shim, viewer


def raw(start_shim: StartShim, code: str, before: str = "", **spec: Any) -> tuple[Shim, Viewer]:
    """A program of Python with its terminal in raw mode."""
    shim = opened(start_shim, sys.executable, "-I", "-S", "-c", RAW.format(before, code), **spec)
    viewer = Viewer(shim)
    viewer.shows(b"raw")
    return shim, viewer


# --- a real terminal --------------------------------------------------------------------------------------------


def test_a_shell_has_a_controlling_terminal_of_the_size_it_was_given(start_shim: StartShim) -> None:
    """`tty`, `stty` and /dev/tty agree; bytes of several are one character to the line editor."""
    shim, viewer = shell(start_shim, rows=33, cols=101)
    viewer.type(b"tty; stty size; stty -a | grep -ow iutf8; echo to-$((40+2)) >/dev/tty; exit 7\r")
    told = shim.exit()
    shown = shim.log().pty
    assert b"/dev/pts/" in shown and b"33 101" in shown and b"\niutf8" in shown and b"to-42" in shown
    assert (told["verdict"], told["code"], told["drain"]) == ("exited", 7, "eof")
    assert told["streams"] == {"pty": {"bytes": len(shown), "sha256": hashlib.sha256(shown).hexdigest()}}


def test_job_control_works_as_in_any_terminal(start_shim: StartShim) -> None:
    """^C ends the job and not the shell, ^Z stops it, and the shell lists it."""
    shim, viewer = shell(start_shim)
    viewer.type(b"sh -c 'echo on; exec sleep 1000'\r")
    viewer.shows(b"on\r\n")
    viewer.type(b"\x03")
    viewer.shows(b"^C")
    viewer.type(b"echo rc=$?; sh -c 'echo on; exec sleep 2000'\r")
    viewer.shows(b"rc=130")
    viewer.shows(b"on\r\n", 2)
    viewer.type(b"\x1a")
    viewer.shows(b"Stopped")
    viewer.type(b"jobs; kill -9 %1; exit 3\rexit 3\r")
    assert shim.exit()["code"] == 3
    assert shim.log().pty.count(b"sleep 2000") >= 2, "typed, told at the stop, and listed"


def test_a_password_prompt_shows_nothing_of_the_password(start_shim: StartShim) -> None:
    """Echo off is the program's; nothing of ours echoes."""
    shim, viewer = shell(start_shim)
    viewer.type(b"read -rsp 'word: ' word; echo; echo ${#word}; exit\r")
    viewer.shows(b"\rword: ")
    viewer.type(b"hunter2\r")
    shim.exit()
    assert b"hunter2" not in shim.log().pty and b"\n7\r" in shim.log().pty


@pytest.mark.parametrize(
    ("argv", "reason"),
    [(["no-such-program"], "EXEC_NOT_FOUND"), (["/etc/passwd"], "EXEC_NOT_EXECUTABLE")],
    ids=["ENOENT", "EACCES"],
)
def test_a_program_that_cannot_run_is_told_with_its_reason(start_shim: StartShim, argv: list[str], reason: str) -> None:
    """As with pipes."""
    shim = start_shim(argv=argv, tty={"rows": 24, "cols": 80}, overflow="head_tail", env=ENV)
    told = shim.run()
    assert (told["verdict"], told["cause"]["reason"]) == ("never_started", reason)


def test_a_file_that_is_no_program_and_a_directory_that_is_not_there(start_shim: StartShim, tmp_path: Any) -> None:
    """ENOEXEC is told as such, a missing directory as itself."""
    file = tmp_path / "noise"
    file.write_bytes(os.urandom(64))
    file.chmod(0o755)
    tty = {"rows": 24, "cols": 80}
    told = start_shim(argv=[str(file)], tty=tty, overflow="head_tail", env=ENV).run()
    assert told["cause"]["reason"] == "EXEC_NOT_EXECUTABLE"
    told = start_shim(argv=["true"], cwd="/no/such/place", tty=tty, overflow="head_tail", env=ENV).run()
    assert told["cause"]["reason"] == "CWD_MISSING"


def test_a_login_shell_is_told_so_by_its_name(start_shim: StartShim) -> None:
    """The file that runs and the name it is given are two things."""
    shim = opened(start_shim, "-sh", "-c", "echo I am $0", program="/bin/sh")
    shim.exit()
    assert b"I am -sh" in shim.log().pty


# --- typing -----------------------------------------------------------------------------------------------------


def test_what_is_typed_twice_is_taken_once_and_what_comes_early_is_not(start_shim: StartShim) -> None:
    """A carrier that does not know how far it came sends again."""
    shim, viewer = raw(
        start_shim, "sys.stdout.write(repr(os.read(0, 1)) * 0)\nfor _ in range(6): os.write(1, os.read(0, 1).upper())"
    )
    assert viewer.give(0, b"abc")[0] == 3
    assert viewer.give(0, b"abc")[0] == 3
    assert viewer.give(9, b"zzz")[0] == 3, "a gap is not taken"
    assert viewer.give(1, b"bcdefg")[0] == 7
    assert shim.exit()["code"] == 0
    assert shim.log().pty.endswith(b"BCDEFG")


def test_each_viewer_has_a_count_of_its_own_and_keeps_it(start_shim: StartShim) -> None:
    """Also behind another daemon, and on another connection."""
    shim, one = raw(start_shim, "got = b''\nwhile len(got) < 9: got += os.read(0, 99)\nos.write(1, got)")
    two = Viewer(shim, "vw_2")
    one.type(b"one")
    two.type(b"two")
    one.close()
    daemon = shim.connect()
    daemon.hello()
    again = Viewer(shim, "vw_1", daemon)
    assert again.give(0, b"one+++")[0] == 6
    shim.controller.close()
    shim.controller = daemon
    shim.exit()
    assert shim.log().pty.endswith(b"onetwo+++")


def test_a_large_paste_with_echo_does_not_lock_up(start_shim: StartShim) -> None:
    """Ten thousand lines into a shell that echoes each: nobody waits for the other for ever."""
    shim, viewer = shell(start_shim)
    paste = b"".join(b": %06d\r" % number for number in range(10_000)) + b"echo all-$((1+1)); exit 5\r"
    while viewer.sent < len(paste):
        received, credit, _ = viewer.give(viewer.sent, paste[viewer.sent : viewer.sent + 16_384])
        if received == viewer.sent:
            assert wire.unpack_taken(viewer.connection.wait(wire.TAKEN))[2] > received, "it is told when there is room"
            assert credit <= received + terminal.QUEUE_BYTES
        viewer.sent = received
    assert shim.exit(60)["code"] == 5
    assert b"all-2" in shim.log().pty


def test_a_program_that_reads_nothing_takes_so_much_and_no_more(start_shim: StartShim) -> None:
    """The kernel takes about 18 KB in raw mode; the rest waits here, up to a bound, and no typing of another is lost in it."""
    shim, viewer = raw(start_shim, "import time; time.sleep(1000)")
    offset = 0
    while (received := viewer.give(offset, b"x" * 16_384)[0]) > offset:
        offset = received
    assert terminal.QUEUE_BYTES - 16_384 < offset < terminal.QUEUE_BYTES + 65_536
    shim.stop(0)
    assert shim.exit()["verdict"] == "stopped"


def test_the_kernel_cuts_a_line_at_4096_bytes_in_canonical_mode(start_shim: StartShim) -> None:
    """As documented: nothing of ours can help a program that reads lines."""
    shim = opened(
        start_shim, sys.executable, "-I", "-S", "-c", "import os; os.write(1, b'on'); print(len(os.read(0, 99_999)))"
    )
    viewer = Viewer(shim)
    viewer.shows(b"on")
    viewer.type(b"y" * 10_000 + b"\r")
    shim.exit()
    assert b"4096" in shim.log().pty


def test_an_end_of_file_is_typed_and_in_the_middle_of_a_line_twice(start_shim: StartShim) -> None:
    """The first only hands over what is there."""
    shim = opened(
        start_shim,
        sys.executable,
        "-I",
        "-S",
        "-c",
        "import os; os.write(1, b'on')\nwhile got := os.read(0, 99): print(got)\nprint('over')",
    )
    viewer = Viewer(shim)
    viewer.shows(b"on")
    viewer.type(b"abc\x04")
    viewer.shows(b"b'abc'")
    assert b"over" not in shim.log().pty
    viewer.type(b"\x04")
    shim.exit()
    assert b"over" in shim.log().pty


def test_bytes_arrive_however_they_are_cut(start_shim: StartShim) -> None:
    """A character of four bytes, cut at each of them, is the same character."""
    word = "naïve 🚀 日本".encode()
    shim, viewer = raw(start_shim, f"got = b''\nwhile len(got) < {len(word)}: got += os.read(0, 1)\nos.write(1, got)")
    for at in range(len(word)):
        viewer.type(word[at : at + 1])
    shim.exit()
    assert shim.log().pty.endswith(word)


# --- sizes ------------------------------------------------------------------------------------------------------

TELLS = "import signal; signal.signal(28, lambda *_: os.write(1, b'%d %d;' % os.get_terminal_size(0)))"
UNTIL_Q = "while os.read(0, 1) != b'q': pass"


def test_the_latest_size_counts_and_an_older_one_that_is_late_does_not(start_shim: StartShim) -> None:
    """And the log tells each."""
    shim, one = raw(start_shim, UNTIL_Q, TELLS)
    two = Viewer(shim, "vw_2")
    one.resize(40, 100)
    one.shows(b"100 40;")
    two.resize(50, 120)
    one.shows(b"120 50;")
    one.resize(10, 10, gen=1)
    one.resize(41, 101)
    one.shows(b"101 41;")
    one.leave()
    one.shows(b"120 50;", 2)
    one.type(b"q")
    shim.exit()
    assert shim.log().sizes == [(24, 80), (40, 100), (50, 120), (41, 101), (50, 120)]
    assert b"10 10" not in shim.log().pty


def test_with_the_smallest_everybody_sees_all_of_it(start_shim: StartShim) -> None:
    """Until the small one leaves."""
    shim, one = raw(start_shim, UNTIL_Q, TELLS, tty={"size_policy": "smallest"})
    two = Viewer(shim, "vw_2")
    one.resize(40, 100)
    one.shows(b"100 40;")
    two.resize(50, 90)
    one.shows(b"90 40;")
    two.leave()
    one.shows(b"100 40;", 2)
    one.type(b"q")
    shim.exit()


def test_a_fixed_size_stays(start_shim: StartShim) -> None:
    """Whatever viewers have; a redraw is still felt."""
    shim, one = raw(start_shim, UNTIL_Q, TELLS, tty={"size_policy": "fixed"})
    one.resize(40, 100)
    one.resize(40, 100, redraw=True)
    one.shows(b"81 25;")
    one.shows(b"80 24;")
    one.type(b"q")
    shim.exit()
    assert shim.log().sizes == [(24, 80)]


def test_a_size_that_no_terminal_has_ends_the_connection_and_nothing_else(start_shim: StartShim) -> None:
    """Likewise whatever a viewer has no right to say."""
    shim, one = raw(start_shim, UNTIL_Q, TELLS)
    for frame in (
        wire.pack_resize(b"vw_9", 1, 1001, 80, redraw=False),
        wire.pack_resize(b"", 1, 20, 80, redraw=False),
        wire.pack(wire.TYPE, b"\0"),
        wire.pack(wire.STOP, struct.pack("<I", 0)),
        wire.pack(wire.TRIM, struct.pack("<Q", 10**9)),
        wire.pack(wire.HELLO, struct.pack("<HHQ", 1, 1, 1)),
    ):
        other = Viewer(shim, "vw_9")
        other.connection.sock.sendall(frame)
        while other.connection.receive() is not None:
            pass
    one.connection.send(200, b"a word of a later version")
    stranger = shim.connect()
    stranger.sock.sendall(wire.pack_type(b"vw_1", 0, b"q"))
    assert stranger.receive() is None
    one.type(b"q")
    assert shim.exit()["verdict"] == "exited"


def test_attempts_with_pipes_have_no_viewers(start_shim: StartShim) -> None:
    """There is nothing to look at."""
    shim = start_shim(argv=["sleep", "60"])
    shim.start()
    connection = shim.connect()
    connection.send(wire.VIEW)
    assert connection.receive() is None


# --- how far ahead ----------------------------------------------------------------------------------------------


def test_a_flood_waits_for_who_follows_and_an_interrupt_acts_at_once(start_shim: StartShim) -> None:
    """`yes` is a quarter of a megabyte ahead and not more; without viewers it runs on, in a ring."""
    shim, viewer = shell(start_shim)
    viewer.seen(0)
    viewer.type(b"yes abcdefghijklmnopqrstuvwxyz\r")
    bell(viewer.connection, terminal.AHEAD_BYTES)
    for _ in range(50):
        # Each answer is a turn of the shim, in which it would have read on.
        viewer.give(viewer.sent, b"")
    end = shim.log().end
    assert end < terminal.AHEAD_BYTES + 2 * 65_536 + 4096, "it waits"
    viewer.seen(end)
    bell(viewer.connection, end + terminal.AHEAD_BYTES)
    viewer.type(b"\x03")
    viewer.seen(shim.log().end)
    viewer.type(b"echo rc=$?\r")
    viewer.seen(shim.log().end + terminal.AHEAD_BYTES)
    viewer.shows(b"rc=130")
    viewer.seen(None)
    viewer.type(b"yes abcdefghijklmnopqrstuvwxyz | head -c 12000000; exit\r")
    shim.exit(60)
    log = shim.log()
    assert log.end > 12_000_000 and len(log.holes) == 1 and sum(size for _, size in log.segments) <= 8 * MIB + 65_536
    assert log.sizes.count((24, 80)) == len(log.markers) == len(log.segments), (
        "each segment can be shown without the others"
    )


def test_a_viewer_that_goes_holds_nobody(start_shim: StartShim) -> None:
    """Its connection takes its word with it."""
    shim, viewer = shell(start_shim)
    viewer.seen(0)
    viewer.type(b"yes abcdefghijklmnopqrstuvwxyz | head -c 2000000; exit 4\r")
    bell(viewer.connection, terminal.AHEAD_BYTES)
    viewer.close()
    assert shim.exit(60)["code"] == 4


def bell(connection: Connection, beyond: int) -> None:
    """Wait until the log is longer than this."""
    connection.send(wire.ARM, struct.pack("<Q", beyond))
    connection.wait(wire.BELL)


# --- ends -------------------------------------------------------------------------------------------------------


def test_closing_hangs_up_first(start_shim: StartShim) -> None:
    """A shell that takes no TERM takes this, in no time, and says goodbye to its jobs."""
    shim, viewer = shell(start_shim)
    viewer.type(b"sleep 1000 &\r")
    viewer.shows(b"[1] ")
    began = time.monotonic()
    shim.stop(60_000)
    told = shim.exit()
    assert (told["verdict"], told["signal"]) == ("stopped", signal.SIGHUP)
    assert time.monotonic() - began < terminal_hangup_s() + 2 and told["survivors"] == 0


def terminal_hangup_s() -> float:
    """Between hanging up and TERM, in seconds."""
    return machine.HANGUP_MS / 1000


def test_what_ignores_the_hangup_takes_the_ladder(start_shim: StartShim) -> None:
    """And is counted."""
    shim, viewer = shell(start_shim)
    viewer.type(b"(trap '' HUP; echo up; while :; do sleep 1; done) &\r")
    viewer.shows(b"up\r\n")
    shim.stop(1000)
    told = shim.exit()
    assert told["verdict"] == "stopped" and told["survivors"] == 0
    assert sum(each["count"] for each in told["swept"] if each["signal"] == signal.SIGTERM) >= 1


@pytest.mark.parametrize("background", ["sweep", "leave"])
def test_jobs_that_outlive_their_shell_are_swept_or_left_as_it_was_said(start_shim: StartShim, background: str) -> None:
    """Either way they are counted; the end is the shell's, not the terminal's."""
    shim, viewer = shell(start_shim, tty={"background": background}, grace_ms=200)
    viewer.type(b"nohup sleep 1000 >/dev/null 2>&1 &\r")
    viewer.shows(b"[1] ")
    viewer.type(b"exit 6\r")
    told = shim.exit()
    assert (told["verdict"], told["code"], told["drain"]) == ("exited", 6, "eof")
    if background == "sweep":
        assert told["outlived"] == [] and told["swept"]
        return
    [left] = told["outlived"]
    assert left["name"] in ("nohup", "sleep") and told["swept"] == []
    os.kill(left["pid"], signal.SIGKILL)


def test_output_of_a_holder_after_its_leader_is_kept_until_it_is_quiet(start_shim: StartShim) -> None:
    """The terminal ends when nobody says anything any more, not when its leader does."""
    shim = opened(start_shim, "sh", "-c", "trap '' HUP; (sleep 0.1; echo late) & exit 2", tty={"background": "leave"})
    told = shim.exit()
    assert told["code"] == 2 and b"late" in shim.log().pty


def test_nothing_that_was_written_before_the_end_is_lost(start_shim: StartShim) -> None:
    """A program writes as much as a terminal takes and is gone."""
    shim = opened(start_shim, sys.executable, "-I", "-S", "-c", "import os; os.write(1, b'z' * 60_000 + b'!')")
    told = shim.exit()
    assert shim.log().pty == b"z" * 60_000 + b"!" and told["drain"] == "eof"


def test_typing_to_what_has_ended_is_answered(start_shim: StartShim) -> None:
    """With what was taken, and that it is over."""
    shim, viewer = raw(start_shim, "os.read(0, 1)")
    viewer.type(b"x")
    viewer.connection.wait(wire.EXIT)
    received, _, closed = viewer.give(1, b"y")
    assert (received, closed) == (1, True)
    late = Viewer(shim, "vw_2")
    late.connection.wait(wire.EXIT)


def test_a_lost_lease_freezes_no_terminal_and_stops_it_where_that_was_said() -> None:
    """Somebody may be typing."""
    freeze = lease.Lease(1, 50_000, lease.ON_LOSS_FREEZE)
    exempt, other = (lease.Tenure(freeze, grace_ms=0, kill_wait_ms=0, exempt=each) for each in (True, False))
    assert (exempt.asks(60_000), other.asks(60_000)) == (lease.NOTHING, lease.FREEZE)
    assert exempt.take(lease.Lease(2, 50_000, lease.ON_LOSS_STOP), 40_000)
    assert exempt.asks(60_000) == lease.GIVE_UP


def test_two_daemons_that_race_leave_a_terminal_one_of_them_can_use(start_shim: StartShim) -> None:
    """The newest hello wins; what the older one had typed is not typed again."""
    shim, _ = raw(start_shim, "got = b''\nwhile len(got) < 4: got += os.read(0, 9)\nos.write(1, got)")
    first, second = shim.connect(), shim.connect()
    first.hello()
    old = Viewer(shim, "vw_1", first)
    old.type(b"ab")
    second.hello()
    wait_for(lambda: first.receive() is None, "the older one is closed")
    assert Viewer(shim, "vw_1", second).give(0, b"abcd")[0] == 4
    second.wait(wire.EXIT)
    assert shim.log().pty.endswith(b"abcd")


def test_a_socket_that_was_deleted_is_there_again(start_shim: StartShim) -> None:
    """At the next look; who is connected notices nothing, and the next daemon finds it."""
    shim, viewer = raw(start_shim, "os.write(1, os.read(0, 9).upper())", timeout_ms=60_000)
    (shim.dir / "s").unlink()
    wait_for((shim.dir / "s").exists, "the socket")
    Viewer(shim, "vw_2").type(b"here")
    viewer.connection.wait(wire.EXIT)
    assert shim.log().pty.endswith(b"HERE")


def test_a_terminal_cannot_have_what_only_pipes_have() -> None:
    """A spec that mixes them is refused."""
    from runner.shim.spec import Spec
    from tests.support.shim import default_spec

    for wrong in (
        {"stdin": True},
        {"events": True},
        {"overflow": "block"},
        {"segment_bytes": 1024},
        {"tty": {"rows": 0, "cols": 80}},
        {"tty": {"rows": 24, "cols": 1001}},
        {"tty": {"rows": 24, "cols": 80, "size_policy": "none"}},
        {"tty": {"rows": 24, "cols": 80, "background": "?"}},
        {"tty": [24, 80]},
    ):
        with pytest.raises(SpecError):
            Spec(default_spec("ex_1.1") | {"tty": {"rows": 24, "cols": 80}, "overflow": "head_tail"} | wrong)
