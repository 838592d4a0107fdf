"""What a child inherits, and what a command may set: a table of names that make programs run something else."""

import pytest

from protocol.errors import Reason
from runner.core.environment import (
    DEFAULT_LANG,
    DEFAULT_PATH,
    inherited,
    matches,
    refuse_env,
    refuse_names,
    terminal_env,
)
from tests.support.engine import a_policy

EVERYTHING = a_policy(env_allow=("*",))

HOSTILE = [
    "LD_PRELOAD",
    "LD_LIBRARY_PATH",
    "LD_AUDIT",
    "DYLD_INSERT_LIBRARIES",
    "GLIBC_TUNABLES",
    "GCONV_PATH",
    "LOCPATH",
    "MALLOC_TRACE",
    "GIT_DIR",
    "GIT_SSH",
    "GIT_SSH_COMMAND",
    "GIT_CONFIG_COUNT",
    "GIT_EXEC_PATH",
    "GIT_ASKPASS",
    "GIT_PAGER",
    "GIT_EXTERNAL_DIFF",
    "PYTHONPATH",
    "PYTHONSTARTUP",
    "PYTHONHOME",
    "PYTHONINSPECT",
    "PYTHONBREAKPOINT",
    "PERL5LIB",
    "PERL5OPT",
    "RUBYOPT",
    "RUBYLIB",
    "GEM_HOME",
    "NODE_OPTIONS",
    "NODE_PATH",
    "NPM_CONFIG_SCRIPT_SHELL",
    "npm_config_registry",
    "JAVA_TOOL_OPTIONS",
    "_JAVA_OPTIONS",
    "CLASSPATH",
    "BASH_ENV",
    "ENV",
    "IFS",
    "PS4",
    "SHELLOPTS",
    "BASHOPTS",
    "PROMPT_COMMAND",
    "ZDOTDIR",
    "BASH_FUNC_ls",
    "PATH",
    "HOME",
    "SHELL",
    "SSH_AUTH_SOCK",
    "SSH_ASKPASS",
    "SUDO_ASKPASS",
    "DBUS_SESSION_BUS_ADDRESS",
    "XDG_RUNTIME_DIR",
    "HOSTALIASES",
    "RES_OPTIONS",
    "LOCAL_RUNNER_EXECUTION_ID",
    "ld_preload",
    "Path",
]

SECRET_LOOKING = [
    "GITHUB_TOKEN",
    "TOKEN",
    "NPM_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "DB_PASSWORD",
    "PASSWORD",
    "MY_PASSWD",
    "KEY_PASSPHRASE",
    "API_KEY",
    "APIKEY",
    "PGPASSWORD",
    "MYSQL_PWD",
    "AUTHTOKEN",
    "STRIPE_APIKEY",
    "CLIENT_SECRET",
    "GOOGLE_CREDENTIALS",
    "SIGNING_PRIVATE_KEY",
    "ACCESS_KEY",
    "DATABASE_CONNECTION_STRING",
    "github_token",
]

NO_NAMES = ["", "1A", "A-B", "A B", "A\n", "Ä", "BASH_FUNC_ls%%", "A.B", "A" * 257, "A\x1b[0m"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_makes_programs_run_something_is_denied_whatever_the_owner_allows(name: str) -> None:
    """In the clear and sealed."""
    for denied in (refuse_env([name], EVERYTHING), refuse_names([name], EVERYTHING)):
        assert denied is not None and denied[0] is Reason.ENV_DENIED


@pytest.mark.parametrize("name", SECRET_LOOKING)
def test_a_name_that_looks_like_a_secret_is_refused_in_the_clear_and_taken_sealed(name: str) -> None:
    """What is in the clear is in the journal of two machines."""
    denied = refuse_env([name], EVERYTHING)
    assert denied is not None and denied[0] is Reason.ENV_SECRET_NAME
    assert refuse_names([name], EVERYTHING) is None


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_is_no_name_of_a_variable_is_denied(name: str) -> None:
    """And its text is not repeated: it may hold what a terminal obeys."""
    for denied in (refuse_env([name], EVERYTHING), refuse_names([name], EVERYTHING)):
        assert denied == (Reason.ENV_DENIED, "a name that is no environment variable's")


@pytest.mark.parametrize(
    "name", ["CI", "MONKEY", "TOKENIZERS_PARALLELISM", "KEYBOARD", "PWD", "OLDPWD", "_", "PASSWORDLESS", "A" * 256]
)
def test_ordinary_names_pass_when_the_owner_allows_them(name: str) -> None:
    """The list of secrets is about whole words."""
    assert refuse_env([name], EVERYTHING) is None


def test_the_owner_allows_by_name_or_prefix_and_denies_above_that() -> None:
    """Everything not named is denied."""
    policy = a_policy(env_allow=("CI", "APP_*"), env_deny=("APP_DEBUG",))
    assert refuse_env(["CI", "APP_MODE"], policy) is None
    for name in ("CI_2", "ci", "APP_DEBUG", "OTHER"):
        denied = refuse_env(["CI", name], policy)
        assert denied is not None and denied[0] is Reason.ENV_DENIED
    assert refuse_env(["CI"], a_policy(env_allow=())) is not None
    assert refuse_env([], a_policy(env_allow=())) is None


def test_a_child_inherits_a_fixed_list_and_nothing_of_the_daemon() -> None:
    """The daemon's own secrets stay with it."""
    own = {"HOME": "/h", "PATH": "/p", "LC_ALL": "C", "AWS_SECRET_ACCESS_KEY": "x", "LD_PRELOAD": "x", "RUNNER": "x"}
    assert inherited(own) == {"HOME": "/h", "PATH": "/p", "LC_ALL": "C"}


def test_a_child_always_has_a_path_and_a_utf_8_locale() -> None:
    """A service manager may give neither."""
    assert inherited({}) == {"PATH": DEFAULT_PATH, "LANG": DEFAULT_LANG}
    assert "LANG" not in inherited({"LC_CTYPE": "de_DE.UTF-8"})


def test_a_pattern_is_a_name_or_a_prefix() -> None:
    """Nothing cleverer, so an owner can read it."""
    assert matches("APP_X", ["APP_*"]) and matches("APP_", ["APP_*"]) and matches("X", ["*"])
    assert not matches("APP", ["APP_*"]) and not matches("XAPP_", ["APP_*"]) and not matches("A", [])


@pytest.mark.parametrize(
    ("base", "locale"),
    [
        ({}, {"LANG": "C.UTF-8"}),
        ({"LANG": "C"}, {"LANG": "C.UTF-8"}),
        ({"LANG": "de_DE.UTF-8"}, {"LANG": "de_DE.UTF-8"}),
        ({"LANG": "C", "LC_CTYPE": "en_US.utf8"}, {"LANG": "C", "LC_CTYPE": "en_US.utf8"}),
        ({"LANG": "de_DE.UTF-8", "LC_ALL": "POSIX"}, {"LANG": "C.UTF-8"}),
        ({"LANG": "de_DE.UTF-8", "LC_ALL": ""}, {"LANG": "de_DE.UTF-8", "LC_ALL": ""}),
        ({"LANG": "de_DE@euro", "LC_TIME": "de_DE"}, {"LANG": "C.UTF-8", "LC_TIME": "de_DE"}),
    ],
)
def test_a_terminal_speaks_utf_8(base: dict[str, str], locale: dict[str, str]) -> None:
    """What the machine says stays where that is what it says; else it is ours, and nothing stands above it."""
    assert terminal_env(base) == locale | {"TERM": "xterm-256color", "COLORTERM": "truecolor"}


def test_nothing_of_the_terminal_that_the_daemon_was_started_in_is_passed_on() -> None:
    """Its size, its multiplexer, its editor."""
    own = {"COLUMNS": "80", "LINES": "24", "TMUX": "/tmp/x", "TMUX_PANE": "%1", "STY": "1.tty", "TERM": "dumb"}
    own |= {
        "TERM_PROGRAM": "vscode",
        "TERM_PROGRAM_VERSION": "1",
        "VSCODE_PID": "1",
        "COLORTERM": "no",
        "LANG": "C.UTF-8",
    }
    assert terminal_env({**own, "HOME": "/h"}) == {
        "HOME": "/h",
        "LANG": "C.UTF-8",
        "TERM": "xterm-256color",
        "COLORTERM": "truecolor",
    }
    assert not inherited(own).keys() & (own.keys() - {"LANG"})
