"""The service unit: what is written, what systemd is told, and what a person reads where there is no systemd."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from runner.cli import cli
from runner.ending import PATIENCE_S, REST_S
from runner.errors import ConfigError
from runner.service import settings_of_unit, unit_path, unit_text, write_unit

FAKE = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$3" in is-active) echo active;; esac
exit ${SYSTEMCTL_STATUS:-0}
"""


class Machine:
    """A home and a systemctl that writes down what it was told."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home, self.calls = tmp_path / "home", tmp_path / "calls"
        self.bin = tmp_path / "bin"
        self.bin.mkdir()
        self.calls.touch()
        for name in [name for name in os.environ if name.startswith(("LOCAL_RUNNER_", "XDG_"))]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("HOME", str(self.home))
        monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1")
        monkeypatch.setenv("CALLS", str(self.calls))
        monkeypatch.setenv("PATH", f"{self.bin}:{os.environ['PATH']}")
        self.unit = self.home / ".config" / "systemd" / "user" / "runner.service"

    def with_systemd(self) -> "Machine":
        """systemctl is there."""
        fake = self.bin / "systemctl"
        fake.write_text(FAKE)
        fake.chmod(0o755)
        return self

    def told(self) -> list[str]:
        """What systemctl was told, without the options that are always there."""
        return [line.removeprefix("--user --no-pager ") for line in self.calls.read_text().splitlines()]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """One for each test."""
    return Machine(tmp_path, monkeypatch)


def run(*args: str) -> Result:
    """The command line in this process."""
    return CliRunner().invoke(cli, args)


def test_the_unit_keeps_executions_alive(machine: Machine) -> None:
    """The lines on which the promise stands."""
    text = unit_text(["/opt/runner", "start"])
    found = settings_of_unit(text)
    wanted = {
        "Type": "notify",
        "KillMode": "process",
        "Restart": "on-failure",
        "RestartSec": "2",
        "Delegate": "yes",
        "Environment": "LOCAL_RUNNER_DELEGATED=1",
        "UMask": "0077",
        "OOMPolicy": "continue",
        "ExecStart": "/opt/runner start",
    }
    assert {key: found[key] for key in wanted} == wanted
    assert float(found["TimeoutStopSec"]) == PATIENCE_S + REST_S
    assert "@" not in text


def test_words_of_the_command_are_quoted_as_systemd_reads_them() -> None:
    """Spaces, quotes, specifiers and variables are taken literally; no line can be broken."""
    line = settings_of_unit(unit_text(['/a b/run"ner', "--state-dir", "/100%/$HOME\\x", "start"]))["ExecStart"]
    assert line == '"/a b/run\\"ner" --state-dir "/100%%/$$HOME\\\\x" start'
    for program in (["runner"], ["/a\nExecStartPre=/bin/evil"]):
        with pytest.raises(ConfigError):
            unit_text(program)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_itself_finds_nothing_wrong(tmp_path: Path) -> None:
    """Every directive is known and every value readable."""
    unit = tmp_path / "runner.service"
    write_unit(unit, unit_text(["/bin/true", "--state-dir", "/a b", "start"]))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=60, check=False
    )
    complaints = [line for line in done.stderr.splitlines() if "runner.service" in line]
    assert complaints == []


def test_installing_twice_changes_nothing(machine: Machine) -> None:
    """The second time says so; flags of the call are kept in the unit."""
    machine.with_systemd()
    first = run("--state-dir", "/data/runner", "service", "install", "--user")
    assert first.exit_code == 0 and f"{machine.unit} written" in first.stdout
    program = settings_of_unit(machine.unit.read_text())["ExecStart"]
    assert program.startswith("/") and program.endswith(" --state-dir /data/runner start")
    assert os.access(program.split()[0], os.X_OK)
    second = run("--state-dir", "/data/runner", "service", "install", "--user")
    assert "is up to date" in second.stdout
    assert [one.name for one in machine.unit.parent.iterdir()] == ["runner.service"]
    assert machine.told() == ["show-environment", "daemon-reload"] * 2


def test_places_of_the_environment_are_kept(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service has another environment; what it cannot be told by flags is named."""
    machine.with_systemd()
    (machine.home / "c.toml").parent.mkdir(parents=True)
    (machine.home / "c.toml").touch()
    monkeypatch.setenv("LOCAL_RUNNER_CONFIG", str(machine.home / "c.toml"))
    monkeypatch.setenv("XDG_STATE_HOME", "/s")
    monkeypatch.setenv("LOCAL_RUNNER_PROXY", "http://ada:hunter2@proxy:1")
    done = run("service", "install", "--user")
    text = machine.unit.read_text()
    assert settings_of_unit(text)["ExecStart"].endswith(f" --config {machine.home}/c.toml --state-dir /s/runner start")
    assert "hunter2" not in text + done.output
    assert "LOCAL_RUNNER_PROXY: of this shell alone" in done.stderr and f"vi}} {machine.home}/c.toml" in done.stderr


def test_now_enables_and_starts_it(machine: Machine) -> None:
    """And a unit that changed is started again."""
    machine.with_systemd()
    assert run("service", "install", "--user", "--now").exit_code == 0
    assert machine.told()[1:] == ["daemon-reload", "enable --now runner.service", "restart runner.service"]
    machine.calls.write_text("")
    assert run("service", "install", "--user", "--now").exit_code == 0
    assert machine.told()[1:] == ["daemon-reload", "enable --now runner.service"]


def test_without_systemd_the_unit_is_written_and_the_rest_is_said(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it was to be started, that is an error."""
    monkeypatch.setenv("PATH", str(machine.bin))
    done = run("service", "install", "--user")
    assert done.exit_code == 0 and machine.unit.exists()
    assert "there is no systemctl" in done.stderr and "runner start" in done.stderr
    assert run("service", "install", "--user", "--now").exit_code == 1


def test_uninstalling_removes_the_unit_alone(machine: Machine) -> None:
    """And is told to systemd; twice is no error."""
    machine.with_systemd()
    run("service", "install", "--user")
    machine.calls.write_text("")
    assert run("service", "uninstall", "--user", "--now").exit_code == 0
    assert machine.told() == ["show-environment", "disable --now runner.service", "daemon-reload"]
    assert not machine.unit.exists()
    assert "is not there" in run("service", "uninstall", "--user").stdout


def test_status_tells_what_is_there(machine: Machine) -> None:
    """Exit status 0 only when it is active."""
    machine.with_systemd()
    run("service", "install", "--user")
    done = run("service", "status", "--user", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout) | {"lingers": None} == {
        "unit": str(machine.unit),
        "installed": True,
        "enabled": True,
        "active": "active",
        "lingers": None,
    }


def test_the_place_follows_xdg() -> None:
    """As systemd itself looks."""
    assert unit_path({"XDG_CONFIG_HOME": "/c", "HOME": "/h"}) == Path("/c/systemd/user/runner.service")
    assert unit_path({"HOME": "/h"}) == Path("/h/.config/systemd/user/runner.service")


@pytest.mark.slow
def test_an_installed_wheel_has_the_unit(tmp_path: Path) -> None:
    """Package data, found without the source tree."""
    root = Path(__file__).parents[3]
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "tests", "build", "*.egg-info")
    shutil.copytree(root, source, ignore=ignored)
    (source / "LICENSE").touch()
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "-w", str(tmp_path), str(source)], check=True, capture_output=True, timeout=110)
    (wheel,) = tmp_path.glob("*.whl")
    names = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(wheel)], check=True, capture_output=True, text=True, timeout=30
    ).stdout
    assert "runner/units/runner.service" in names and "runner/verbs/status.py" in names
