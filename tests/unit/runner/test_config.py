"""Settings: which source wins, what the defaults are, and that every mistake is named."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runner.config import Settings, explain_settings, load_settings
from runner.errors import ConfigError

HOME = {"HOME": "/home/ada"}


def written(tmp_path: Path, text: str | bytes) -> str:
    """A config file with that content."""
    file = tmp_path / "config.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(file)


def test_the_defaults_of_a_user_are_the_xdg_places() -> None:
    """HOME alone is enough."""
    assert load_settings({}, HOME) == Settings(
        config_file=Path("/home/ada/.config/runner/config.toml"),
        state_dir=Path("/home/ada/.local/state/runner"),
        runtime_dir=Path("/home/ada/.local/state/runner/run"),
        policy_file=Path("/home/ada/.config/runner/policy.toml"),
    )


def test_xdg_variables_move_them() -> None:
    """All three."""
    found = load_settings({}, {"XDG_CONFIG_HOME": "/c", "XDG_STATE_HOME": "/s", "XDG_RUNTIME_DIR": "/r"})
    assert (found.config_file, found.state_dir, found.runtime_dir) == (
        Path("/c/runner/config.toml"),
        Path("/s/runner"),
        Path("/r/runner"),
    )


def test_the_system_has_places_of_its_own() -> None:
    """And wants no HOME."""
    found = load_settings({}, {"LOCAL_RUNNER_SYSTEM": "1"})
    assert (found.config_file, found.state_dir, found.runtime_dir, found.policy_file) == (
        Path("/etc/runner/config.toml"),
        Path("/var/lib/runner"),
        Path("/run/runner"),
        Path("/etc/runner/policy.toml"),
    )


def test_flags_win_over_variables_over_the_file_over_defaults(tmp_path: Path) -> None:
    """One key from each source."""
    file = written(tmp_path, 'log_level = "error"\ngit = "git-file"\nproxy = "http://file:1"\nspool_bytes = 8388608')
    variables = {**HOME, "LOCAL_RUNNER_LOG_LEVEL": "warning", "LOCAL_RUNNER_GIT": "git-env"}
    found = load_settings({"config": file, "log_level": "debug", "git": None}, variables)
    assert (found.log_level, found.git, found.proxy) == ("debug", "git-env", "http://file:1")
    assert (found.spool_bytes, found.segment_bytes) == (8 * 1024**2, 8 * 1024**2)
    assert found.policy_file == tmp_path / "policy.toml"


def test_every_value_tells_where_it_came_from(tmp_path: Path) -> None:
    """A flag, a variable, the file, or a default; places that follow another setting tell that one's source."""
    file = written(tmp_path, 'log_level = "error"\ngit = "git-file"')
    variables = {**HOME, "LOCAL_RUNNER_LOG_LEVEL": "warning", "XDG_STATE_HOME": "/s"}
    settings, sources = explain_settings({"config": file, "log_format": "json"}, variables)
    assert sources == {
        "config_file": "--config",
        "policy_file": "--config",
        "state_dir": "XDG_STATE_HOME",
        "runtime_dir": "XDG_STATE_HOME",
        "log_level": "LOCAL_RUNNER_LOG_LEVEL",
        "log_format": "--log-format",
        "git": file,
        **dict.fromkeys(
            ("proxy", "spool_bytes", "segment_bytes", "cgroup", "floor_bytes", "keep_ms", "host_bytes"), "default"
        ),
    }
    assert settings == load_settings({"config": file, "log_format": "json"}, variables)
    assert set(explain_settings({}, HOME)[1].values()) == {"default"}
    moved = explain_settings({"state_dir": "/d"}, {**HOME, "LOCAL_RUNNER_CONFIG": file, "XDG_RUNTIME_DIR": "/r"})[1]
    assert [moved[key] for key in ("config_file", "policy_file", "state_dir", "runtime_dir")] == [
        "LOCAL_RUNNER_CONFIG",
        "LOCAL_RUNNER_CONFIG",
        "--state-dir",
        "XDG_RUNTIME_DIR",
    ]
    system = explain_settings({}, {"LOCAL_RUNNER_SYSTEM": "1", "XDG_RUNTIME_DIR": "/r", "XDG_STATE_HOME": "/s"})[1]
    assert set(system.values()) == {"default"}


def test_tables_name_what_is_the_shims_and_the_spools(tmp_path: Path) -> None:
    """Control groups: found, none, or below a directory; the floor of the disk in MiB. Variables have both words."""
    found = load_settings({"config": written(tmp_path, "")}, HOME)
    assert (found.cgroup, found.floor_bytes) == ("auto", 512 * 1024**2)
    file = written(tmp_path, '[shim]\ncgroup = "/sys/fs/cgroup/mine"\n[spool]\nfloor_mib = 64\n')
    found, sources = explain_settings({"config": file}, HOME)
    assert (found.cgroup, found.floor_bytes) == ("/sys/fs/cgroup/mine", 64 * 1024**2)
    assert sources["cgroup"] == sources["floor_bytes"] == file
    variables = {**HOME, "LOCAL_RUNNER_SHIM_CGROUP": "off", "LOCAL_RUNNER_SPOOL_FLOOR_MIB": "0"}
    found, sources = explain_settings({"config": file}, variables)
    assert (found.cgroup, found.floor_bytes) == ("off", 0)
    assert (sources["cgroup"], sources["floor_bytes"]) == ("LOCAL_RUNNER_SHIM_CGROUP", "LOCAL_RUNNER_SPOOL_FLOOR_MIB")


def test_what_is_kept_is_told_in_days_and_mebibytes(tmp_path: Path) -> None:
    """A week and ten GiB unless somebody says otherwise; nothing at all is a word too."""
    found = load_settings({"config": written(tmp_path, "")}, HOME)
    assert (found.keep_ms, found.host_bytes) == (7 * 86_400_000, 10 * 1024**3)
    found = load_settings({"config": written(tmp_path, "[spool]\nkeep_days = 0\nhost_mib = 1\n")}, HOME)
    assert (found.keep_ms, found.host_bytes) == (0, 1024**2)
    assert load_settings({}, {**HOME, "LOCAL_RUNNER_SPOOL_KEEP_DAYS": "2"}).keep_ms == 2 * 86_400_000


def test_an_empty_runtime_directory_is_none() -> None:
    """The state directory is as private."""
    found = load_settings({}, {**HOME, "XDG_RUNTIME_DIR": ""})
    assert found.runtime_dir == Path("/home/ada/.local/state/runner/run")


def test_an_empty_variable_takes_the_proxy_away(tmp_path: Path) -> None:
    """No proxy can be said explicitly; the environment's own proxy variables are never looked at."""
    file = written(tmp_path, 'proxy = "http://file:1"')
    variables = {**HOME, "LOCAL_RUNNER_CONFIG": file, "LOCAL_RUNNER_PROXY": "", "HTTPS_PROXY": "http://trap:1"}
    assert load_settings({}, variables).proxy is None


def test_a_proxy_is_not_shown(tmp_path: Path) -> None:
    """It may hold a password."""
    assert "hunter2" not in repr(load_settings({"proxy": "http://ada:hunter2@proxy:1"}, HOME))


def test_home_may_be_written_short(tmp_path: Path) -> None:
    """`~/` is the HOME of the environment."""
    file = written(tmp_path, 'state_dir = "~/state"')
    assert load_settings({"config": file}, HOME).state_dir == Path("/home/ada/state")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('state_dir = "state"', "state_dir"),
        ('state_dir = "/a/../b"', "state_dir"),
        ('state_dir = "~ada/x"', "state_dir"),
        ("state_dir = 1", "state_dir"),
        ('log_level = "loud"', "log_level"),
        ('spool_bytes = "10"', "spool_bytes"),
        ("spool_bytes = true", "spool_bytes"),
        ("spool_bytes = -1", "spool_bytes"),
        ("spool_bytes = 4194303", "spool_bytes"),
        (f"spool_bytes = 0x{'f' * 5000}", "spool_bytes"),
        ("spool_bytes = 1.5", "spool_bytes"),
        ('proxy = "ftp://x"', "proxy"),
        ('git = "./git"', "git"),
        ("color = true", "color"),
        ("[log]\nlevel = 'info'", "log"),
        ("shim = 1", "shim"),
        ("[shim]\ncgroup = 'group'", "shim.cgroup"),
        ("[shim]\ncgroups = 'off'", "shim.cgroups"),
        ("[shim.cgroup]\npath = '/x'", "shim.cgroup"),
        ('"shim.cgroup" = "off"', "shim.cgroup"),
        ("[spool]\nfloor_mib = -1", "spool.floor_mib"),
        ("[spool]\nkeep_days = 3651", "spool.keep_days"),
        ('[spool]\nhost_mib = "1"', "spool.host_mib"),
        ("cgroup = 'off'", "cgroup"),
        ("segment_bytes = 8388608\nspool_bytes = 4194304", "segment_bytes"),
        ("spool_bytes = ", ""),
        (b"\xff", ""),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, text: str | bytes, key: str) -> None:
    """File, key, and what was expected."""
    file = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_settings({"config": file}, HOME)
    assert (caught.value.place, caught.value.key) == (file, key)
    assert caught.value.expected


@pytest.mark.parametrize(
    ("flags", "environ", "place", "key"),
    [
        ({}, {}, "environment", "HOME"),
        ({}, {"HOME": "ada"}, "environment", "HOME"),
        ({}, {**HOME, "XDG_STATE_HOME": "state"}, "environment", "XDG_STATE_HOME"),
        ({}, {**HOME, "LOCAL_RUNNER_LOGLEVEL": "info"}, "environment", "LOCAL_RUNNER_LOGLEVEL"),
        ({}, {**HOME, "LOCAL_RUNNER_SPOOL_BYTES": ""}, "environment", "LOCAL_RUNNER_SPOOL_BYTES"),
        ({}, {**HOME, "LOCAL_RUNNER_SYSTEM": "yes"}, "environment", "LOCAL_RUNNER_SYSTEM"),
        ({"state_dir": "here"}, HOME, "flags", "--state-dir"),
        ({"colour": "red"}, HOME, "flags", "--colour"),
        ({"config": "/nowhere/config.toml"}, HOME, "/nowhere/config.toml", ""),
    ],
)
def test_a_mistake_elsewhere_is_named(
    flags: dict[str, str | None], environ: dict[str, str], place: str, key: str
) -> None:
    """A variable, a flag, or a file that was named and is not there."""
    with pytest.raises(ConfigError) as caught:
        load_settings(flags, environ)
    assert (caught.value.place, caught.value.key) == (place, key)


def test_variables_of_a_shim_and_of_tests_are_no_settings() -> None:
    """The CLI works inside an execution."""
    variables = dict.fromkeys(
        ("LOCAL_RUNNER_COOKIE", "LOCAL_RUNNER_ATTEMPT", "LOCAL_RUNNER_FAILPOINTS", "LOCAL_RUNNER_DELEGATED"), "x"
    )
    assert load_settings({}, {**HOME, **variables}) == load_settings({}, HOME)


LINES = st.lists(
    st.tuples(
        st.sampled_from([*Settings.__slots__, "other", "shim", "shim.cgroup", "spool.floor_mib", "[spool]\nfloor_mib"]),
        st.sampled_from(["1", "-1", "true", "1.5", '"x"', '"/x"', '"info"', "[]", "{}", '"', "'\\u0000'", "0xffff"]),
    ).map(" = ".join)
).map("\n".join)


@given(st.one_of(st.binary(), LINES.map(str.encode)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_loads_or_is_refused(tmp_path: Path, content: bytes) -> None:
    """There is no third way, and the refusal can be printed."""
    refused = ""
    try:
        load_settings({"config": written(tmp_path, content)}, HOME)
    except ConfigError as exc:
        refused = str(exc)
    assert refused.isprintable()


@given(st.dictionaries(st.sampled_from([f"LOCAL_RUNNER_{name.upper()}" for name in Settings.__slots__]), st.text()))
def test_any_environment_loads_or_is_refused(environ: dict[str, str]) -> None:
    """Values of variables are no more trusted than the file."""
    refused = ""
    try:
        load_settings({}, {**HOME, **environ})
    except ConfigError as exc:
        refused = str(exc)
    assert refused.isprintable()
