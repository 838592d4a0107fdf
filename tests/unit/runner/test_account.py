"""Whose a PTY is, and what its spec says: the login shell, a terminal, a ring, and an environment that names its user."""

import os
import pwd
from pathlib import Path
from typing import Any

import pytest

from protocol.commands import Background, SizePolicy
from protocol.limits import MIB
from runner.adapters.account import Account, own_account
from runner.adapters.attemptdir import ShimSettings, spec_of
from runner.core.plans import TerminalPlan
from tests.support.shims import a_plan

TERMINAL = TerminalPlan(rows=30, cols=100, size_policy=SizePolicy.SMALLEST, background=Background.LEAVE)
ANNA = Account("/bin/zsh", {"HOME": "/home/anna", "USER": "anna", "LOGNAME": "anna", "SHELL": "/bin/zsh"})


def settings(**over: Any) -> ShimSettings:
    """Of a daemon."""
    fields: dict[str, Any] = {"state_dir": Path("/s"), "runner": "rnr_1", "boot_id": "b", "epoch": 1, "umask": 0o22}
    return ShimSettings(**(fields | {"segment_bytes": 8 * MIB, "spool_bytes": 1024 * MIB} | over))


def spec(*argv: str, **over: Any) -> dict[str, Any]:
    """Of Anna's PTY."""
    plan = a_plan(terminal=TERMINAL, overflow="head_tail", **{"argv": argv, **over})
    return spec_of(settings(), plan, "/", ANNA)


def entry(shell: str) -> pwd.struct_passwd:
    """A line of the user database."""
    return pwd.struct_passwd(("anna", "x", 1, 1, "", "/home/anna", shell))


def test_without_a_command_it_is_the_login_shell() -> None:
    """Called as one: its name begins with a dash, so the program is named beside it."""
    assert (spec()["argv"], spec()["program"]) == (["-zsh"], "/bin/zsh")
    assert (spec("vi", "x")["argv"], spec("vi", "x")["program"]) == (["vi", "x"], None)


def test_its_log_is_a_ring() -> None:
    """Small segments, the newest of them, no head; an owner who keeps less keeps less of it."""
    found = spec()
    assert (found["segment_bytes"], found["spool_bytes"], found["head_bytes"]) == (1 * MIB, 8 * MIB, 0)
    assert (found["overflow"], found["stdin"], found["events"]) == ("head_tail", False, False)
    small = spec_of(settings(spool_bytes=4 * MIB), a_plan(terminal=TERMINAL), "/", ANNA)
    assert small["spool_bytes"] == 4 * MIB


def test_its_terminal_is_in_the_spec_and_nobody_elses_is() -> None:
    """Pipes have none."""
    assert spec()["tty"] == {"rows": 30, "cols": 100, "size_policy": "smallest", "background": "leave"}
    assert "tty" not in spec_of(settings(), a_plan(), "/") and "program" not in spec_of(settings(), a_plan(), "/")


def test_its_environment_names_its_user() -> None:
    """What the machine or the command says of that goes first."""
    found = spec(env={"PATH": "/bin", "HOME": "/elsewhere", "TERM": "vt100"})["env"]
    assert found == {
        "HOME": "/elsewhere",
        "USER": "anna",
        "LOGNAME": "anna",
        "SHELL": "/bin/zsh",
        "PATH": "/bin",
        "TERM": "vt100",
        "LOCAL_RUNNER_EXECUTION_ID": "ex_1",
    }


@pytest.mark.parametrize(
    ("listed", "said", "shell"),
    [
        ("/bin/sh", "/bin/cat", "/bin/sh"),
        ("", "/bin/cat", "/bin/cat"),
        ("/nowhere/zsh", "/bin/cat", "/bin/cat"),
        ("", "sh", "/bin/sh"),
        ("/nowhere/zsh", "/nowhere/fish", "/bin/sh"),
    ],
)
def test_the_shell_is_the_first_that_can_be_run(
    listed: str, said: str, shell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user database, the daemon's environment, the one that is always there."""
    monkeypatch.setenv("SHELL", said)
    monkeypatch.setattr(pwd, "getpwuid", lambda _uid: entry(listed))
    found = own_account()
    assert (found.shell, found.login_argv) == (shell, [f"-{os.path.basename(shell)}"])
    assert found.env == {"HOME": "/home/anna", "USER": "anna", "LOGNAME": "anna", "SHELL": shell}


def test_a_user_without_a_name_has_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in containers: nothing is made up."""

    def unknown(_uid: int) -> pwd.struct_passwd:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("SHELL", raising=False)
    assert own_account() == Account("/bin/sh", {"SHELL": "/bin/sh"})
