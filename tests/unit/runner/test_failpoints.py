"""Named crash points: what arms them, when they trigger, and that nothing else does."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import Reason
from runner import failpoints
from runner.errors import Broken, ConfigError

POINT = "journal.after_commit"


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.arm("")


def run(armed: str, code: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that imports the points with `armed` in its environment."""
    environ = {**os.environ, failpoints.ENVIRONMENT: armed}
    return subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=30)


def test_a_point_that_is_not_armed_does_nothing() -> None:
    """Every registered name may be passed freely."""
    for name in failpoints.NAMES:
        failpoints.hit(name)


def test_every_point_in_the_code_can_be_armed() -> None:
    """A name that is missing here could never be tested."""
    sources = Path(failpoints.__file__).parent.rglob("*.py")
    hits = {name for path in sources for name in re.findall(r'failpoints\.hit\("([^"]+)"\)', path.read_text())}
    assert hits
    assert hits <= failpoints.NAMES


def test_the_environment_arms_at_import() -> None:
    """exit(code) ends the process at the first hit, with that status."""
    ended = run(f"{POINT}=exit(37)", f"from runner import failpoints; failpoints.hit({POINT!r}); print('alive')")
    assert (ended.returncode, ended.stdout) == (37, "")


def test_kill_is_a_kill() -> None:
    """The process cannot say anything any more."""
    ended = run(f"{POINT}=kill", f"from runner import failpoints; failpoints.hit({POINT!r}); print('alive')")
    assert (ended.returncode, ended.stdout) == (-9, "")


def test_a_count_names_the_one_hit_that_triggers() -> None:
    """Hits before and after it pass."""
    failpoints.arm(f"{POINT}=3*error(DISK_FULL)")
    failpoints.hit(POINT)
    failpoints.hit(POINT)
    with pytest.raises(Broken) as caught:
        failpoints.hit(POINT)
    assert caught.value.reason is Reason.DISK_FULL
    failpoints.hit(POINT)


def test_without_a_count_every_hit_triggers() -> None:
    """And only at the point that was named."""
    failpoints.arm(f" {POINT} = error(INFRA) ; ; report.sent=off")
    for _ in range(2):
        with pytest.raises(Broken, match=POINT):
            failpoints.hit(POINT)
    failpoints.hit("report.sent")


def test_a_delay_passes() -> None:
    """It waits and goes on."""
    failpoints.arm(f"{POINT}=delay(1)")
    failpoints.hit(POINT)


def test_a_pause_tells_that_it_was_reached_and_waits_for_the_gate(tmp_path: Path) -> None:
    """`path`.hit appears; the thread goes on when `path` does."""
    gate = tmp_path / "gate"
    failpoints.arm(f"{POINT}=pause({gate})")
    waiting = threading.Thread(target=failpoints.hit, args=(POINT,))
    waiting.start()
    reached = Path(f"{gate}.hit")
    while not reached.exists():
        waiting.join(0.001)
    assert waiting.is_alive()
    gate.touch()
    waiting.join(10)
    assert not waiting.is_alive()


@pytest.mark.parametrize(
    "text",
    [
        "nowhere=kill",
        POINT,
        f"{POINT}=",
        f"{POINT}=0*kill",
        f"{POINT}=exit",
        f"{POINT}=exit(256)",
        f"{POINT}=exit(-1)",
        f"{POINT}=kill(9)",
        f"{POINT}=error(NO_SUCH_REASON)",
        f"{POINT}=delay(60001)",
        f"{POINT}=pause(relative)",
        f"{POINT}=explode",
        f"{POINT}=off;{POINT}=off",
    ],
)
def test_an_entry_that_is_wrong_is_named_and_arms_nothing(text: str) -> None:
    """The error says which point; what was armed before stays."""
    failpoints.arm("report.sent=error(INFRA)")
    with pytest.raises(ConfigError) as caught:
        failpoints.arm(text)
    assert caught.value.place == failpoints.ENVIRONMENT
    assert text.partition("=")[0] in caught.value.key
    with pytest.raises(Broken):
        failpoints.hit("report.sent")


PIECES = st.sampled_from(
    [*failpoints.NAMES, "=", ";", "*", "(", ")", "exit", "kill", "off", "delay", "7", "/x", "\0", " "]
)


@given(st.one_of(st.text(), st.lists(PIECES).map("".join)))
def test_any_text_arms_or_is_refused(text: str) -> None:
    """There is no third way."""
    refused = ""
    try:
        failpoints.arm(text)
    except ConfigError as exc:
        refused = str(exc)
    assert refused.isprintable()


def test_a_shim_is_told_its_points_by_the_daemon() -> None:
    """Only the attempt that the count names gets them, under the names its spec knows."""
    failpoints.arm("shim.spawned=2*kill;shim.exit_told=stop")
    asked = [failpoints.for_shim() for _ in range(3)]
    assert asked == [{"exit_told": "stop"}, {"exit_told": "stop", "spawned": "kill"}, {"exit_told": "stop"}]


@pytest.mark.parametrize("action", ["exit(3)", "error(INFRA)", "delay(5)", "pause(/tmp/gate)"])
def test_a_shim_takes_signals_only(action: str) -> None:
    """It has no code for anything else, and would refuse its spec."""
    with pytest.raises(ConfigError):
        failpoints.arm(f"shim.ready={action}")


def test_stop_holds_the_process_until_it_is_continued() -> None:
    """As SIGSTOP from outside would; the code behind the point runs after CONT."""
    environ = {**os.environ, failpoints.ENVIRONMENT: f"{POINT}=stop"}
    code = f"from runner import failpoints; failpoints.hit({POINT!r}); print('alive')"
    held = subprocess.Popen([sys.executable, "-c", code], env=environ, stdout=subprocess.PIPE, text=True)
    try:
        stopped = os.waitid(os.P_PID, held.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        held.send_signal(signal.SIGCONT)
        out, _ = held.communicate(timeout=30)
    finally:
        held.kill()
        held.wait()
    assert stopped is not None and stopped.si_status == signal.SIGSTOP
    assert (held.returncode, out) == (0, "alive\n")
