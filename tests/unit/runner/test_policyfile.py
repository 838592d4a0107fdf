"""The owner's policy: what a file means, and that every mistake denies everything."""

import os
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.commands import Kind
from protocol.envelope import digest_of
from protocol.limits import GRACE_MS_MAX
from runner.adapters.policyfile import DENIES_ALL, load_policy, write_default
from runner.core.policy import Policy
from runner.errors import ConfigError


def written(tmp_path: Path, text: str | bytes) -> Path:
    """A policy file with that content."""
    path = tmp_path / "policy.toml"
    path.touch(0o600)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_whole_file_becomes_a_policy(tmp_path: Path) -> None:
    """Every key; roots as real paths, the runner's own behind them."""
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    text = f"""
        version = 1
        [commands]
        kinds = ["execution.start", "worktree.create"]
        signals = ["HUP"]
        [roots]
        managed = ["{tmp_path}/link", "{real}"]
        [env]
        allow = ["LANG", "CI_*"]
        deny = ["CI_SECRET"]
        [limits]
        concurrent = 3
        grace_s_max = 7
        disk_free_mib_min = 10
        disk_free_percent_min = 1
        inodes_free_percent_min = 2
        memory_available_mib_min = 3
        fds_free_min = 4
        [orphans]
        outlive = ["gradle", "GradleDaemon"]
        [daemon]
        on_stop = "drain"
    """
    policy, problem = load_policy(written(tmp_path, text), ["/managed"])
    assert problem is None
    assert policy == Policy(
        digest=digest_of(text.encode()),
        kinds=frozenset({"execution.start", "worktree.create"}),
        signals=frozenset({"HUP"}),
        roots=(str(real), "/managed"),
        env_allow=("LANG", "CI_*"),
        env_deny=("CI_SECRET",),
        concurrent_max=3,
        grace_ms_max=7000,
        disk_free_min=10 * 1024**2,
        disk_free_percent_min=1,
        inodes_free_percent_min=2,
        memory_available_min=3 * 1024**2,
        fds_free_min=4,
        outlive=("gradle", "GradleDaemon"),
        on_daemon_stop="drain",
    )


def test_what_is_left_out_is_denied_or_has_its_default(tmp_path: Path) -> None:
    """No kinds and no roots; variables and limits as documented."""
    policy, problem = load_policy(written(tmp_path, "version = 1"), [])
    assert problem is None
    assert policy == Policy(
        digest=digest_of(b"version = 1"),
        signals=frozenset({"HUP", "INT", "USR1", "USR2", "WINCH"}),
        env_allow=("*",),
        concurrent_max=64,
        grace_ms_max=GRACE_MS_MAX,
        disk_free_min=2048 * 1024**2,
        disk_free_percent_min=5,
        inodes_free_percent_min=5,
        memory_available_min=256 * 1024**2,
        fds_free_min=64,
        on_daemon_stop="leave",
    )


def test_home_may_be_written_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` is the owner's home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    policy, _ = load_policy(written(tmp_path, 'version = 1\n[roots]\nmanaged = ["~/src", "~"]'), [])
    assert policy.roots == (f"{tmp_path.resolve()}/src", str(tmp_path.resolve()))


MISTAKES = {
    "": "version: expected 1",
    "version = 2": "version: expected 1",
    "version = true": "version: expected 1",
    "version = ": "expected TOML",
    "version = 1\nkinds = []": "kinds: expected one of commands, daemon, env, limits, orphans",
    "version = 1\ncommands = 1": "commands: expected a table",
    "version = 1\n[commands]\nkind = []": "commands.kind: expected one of",
    'version = 1\n[commands]\nkinds = "execution.start"': "commands.kinds: expected a list",
    'version = 1\n[commands]\nkinds = ["execution.*"]': "commands.kinds: expected a list of execution.start",
    'version = 1\n[roots]\nmanaged = ["src"]': "roots.managed: expected a list of absolute",
    'version = 1\n[roots]\nmanaged = ["/a\\u0000"]': "roots.managed: expected a list of absolute",
    'version = 1\n[env]\nallow = ["A*B"]': "env.allow: expected",
    "version = 1\n[env]\ndeny = [1]": "env.deny: expected",
    "version = 1\n[limits]\nconcurrent = -1": "limits.concurrent: expected a whole number",
    "version = 1\n[limits]\ngrace_s_max = 301": "limits.grace_s_max: expected whole seconds from 0 to 300",
    "version = 1\n[limits]\ngrace_s_max = 1.0": "limits.grace_s_max: expected",
    "version = 1\n[limits]\ndisk_free_mib_min = -1": "limits.disk_free_mib_min: expected a whole number of MiB from 0",
    "version = 1\n[limits]\ndisk_free_percent_min = 100": "limits.disk_free_percent_min: expected a whole number from 0 to 99",
    "version = 1\n[limits]\nmemory_available_mib_min = true": "limits.memory_available_mib_min: expected",
    'version = 1\n[orphans]\noutlive = "gradle"': "orphans.outlive: expected a list of at most 64 names",
    'version = 1\n[orphans]\noutlive = ["/usr/bin/gradle"]': "orphans.outlive: expected",
    'version = 1\n[orphans]\noutlive = [""]': "orphans.outlive: expected",
    'version = 1\n[daemon]\non_stop = "kill"': "daemon.on_stop: expected one of leave, drain, stop",
    "version = 1\n[daemon]\non_stop = []": "daemon.on_stop: expected one of",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_denies_everything_and_is_named(tmp_path: Path, text: str) -> None:
    """File, key, and what was expected."""
    path = written(tmp_path, text)
    policy, problem = load_policy(path, ["/managed"])
    assert policy == DENIES_ALL
    assert problem is not None
    assert problem.startswith(f"{path}: {MISTAKES[text]}")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.chmod(0o620), "chmod go-w"),
        (lambda path: path.chmod(0o602), "chmod go-w"),
        (lambda path: (path.unlink(), path.mkdir()), "plain file"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "plain file"),
        (lambda path: path.write_bytes(b"#" * 300_000), "at most"),
        (lambda path: path.write_bytes(b"version = 1 # \xff"), "UTF-8"),
    ],
)
def test_a_file_that_cannot_be_trusted_denies_everything(
    tmp_path: Path, spoil: Callable[[Path], object], said: str
) -> None:
    """Missing, writable by others, no file at all, too long, no text."""
    path = written(tmp_path, "version = 1")
    spoil(path)
    policy, problem = load_policy(path, [])
    assert policy == DENIES_ALL
    assert problem is not None
    assert said in problem


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_somebody_else_denies_everything(tmp_path: Path) -> None:
    """Only the owner's and root's word counts."""
    path = written(tmp_path, "version = 1")
    os.chown(path, 12345, 12345)
    policy, problem = load_policy(path, [])
    assert (policy, "12345" in str(problem)) == (DENIES_ALL, True)


def test_the_default_is_a_policy_that_admits_work_in_the_given_roots(tmp_path: Path) -> None:
    """Private, commented, readable; and never written over another."""
    path = tmp_path / "etc" / "policy.toml"
    write_default(path, [str(tmp_path)])
    assert path.stat().st_mode & 0o777 == 0o600
    policy, problem = load_policy(path, [])
    assert problem is None
    assert policy.kinds == frozenset(Kind)
    assert policy.roots == (str(tmp_path.resolve()),)
    # What it spells out is what counts where nothing is said.
    plain, _ = load_policy(written(tmp_path, "version = 1"), [])
    assert policy == replace(plain, digest=policy.digest, kinds=policy.kinds, roots=policy.roots)
    before = path.read_bytes()
    with pytest.raises(ConfigError):
        write_default(path, [])
    assert path.read_bytes() == before


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_directory_name_survives_the_default(tmp_path: Path, name: str) -> None:
    """Quotes, newlines, DEL, whatever people call directories."""
    path = tmp_path / "policy.toml"
    path.unlink(missing_ok=True)
    write_default(path, ["/" + name])
    assert tomllib.loads(path.read_bytes().decode())["roots"]["managed"] == ["/" + name]


LINES = st.lists(
    st.sampled_from(
        [
            "version = 1",
            "version = []",
            "[commands]",
            "[roots]",
            "[env]",
            "[limits]",
            'kinds = ["execution.start"]',
            'managed = ["/a"]',
            'managed = ["~nobody_at_all/a"]',
            'allow = ["*"]',
            "concurrent = 1",
            f"concurrent = 0x{'f' * 5000}",
            'grace_s_max = "x"',
            "grace_s_max = 1979-05-27",
            '"\\u001b[2J" = 1',
            "[[env]]",
            "a.b.c = 1",
        ]
    )
).map("\n".join)


@given(st.one_of(st.binary(), LINES.map(str.encode)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_is_a_policy_or_denies_everything(tmp_path: Path, content: bytes) -> None:
    """There is no third way, and the sentence can be printed."""
    policy, problem = load_policy(written(tmp_path, content), [])
    assert (problem is None) == (policy.digest == digest_of(content) and content != b"")
    assert problem is None or (problem.isprintable() and policy == DENIES_ALL)
