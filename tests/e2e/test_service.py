"""The user unit in a real systemd: what runs is left alone, whatever becomes of the service."""

import os
import sys
from pathlib import Path

import pytest

from tests.support.user_manager import CANNOT, under_manager, why_not

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

STORY_S = 180.0


def test_executions_outlive_their_service(tmp_path: Path) -> None:
    """Restarted, killed, failed and removed: the work goes on, the next daemon adopts it, its status is its own."""
    if reason := why_not():
        pytest.skip(reason)
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("LOCAL_RUNNER_", "XDG_", "DBUS_"))
    }
    # The manager finds its units by the same HOME as `runner service install`.
    env = {**kept, "HOME": str(tmp_path), "SYSTEMD_LOG_LEVEL": "warning"}
    ended = under_manager(sys.executable, "-m", "tests.support.service_story", env=env, timeout_s=STORY_S)
    if ended.status == CANNOT:
        pytest.skip(f"no systemd user manager here: {ended.said.strip()[-200:]}")
    assert ended.status == 0, ended.said
    for part in ("restart", "kill", "uninstall"):
        assert f"{part}: the work outlived it" in ended.said
    for said in (
        "wrong settings: failed once, with 3",
        "broken journal: tried again, with pauses",
        "drain --exit: stayed down",
        "on_stop: stopped with it",
        "tiers: ok, by control groups below",
    ):
        assert said in ended.said
