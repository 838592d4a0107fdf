"""Log lines: registered names only, one line each, nothing a terminal would obey, no secrets."""

import json
import logging
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from runner import logs
from runner.logs import Event, Secret

NAUGHTY = (
    "two\nlines",
    "\x1b]52;c;Y2xpcA==\x07",
    "\x1b[2J\x9b31m",
    "\r\x08\x7f\x00",
    "\u202eevil\u2066",
    "\u2028\u2029\x85",
    '", "level": "info", "x": "',
    "\ud800",
    "",
    "a b=c",
)
LEVEL_AND_EVENT = re.compile(r"\S+ info daemon\.started")


class Lines:
    """What went to stderr."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self._text = ""

    def getvalue(self) -> str:
        """All of it so far."""
        self._text += self._capsys.readouterr().err
        return self._text


@pytest.fixture
def stderr(capsys: pytest.CaptureFixture[str]) -> Iterator[Lines]:
    """What goes to stderr; the configuration of before comes back afterwards."""
    handlers, level = logging.root.handlers[:], logging.root.level
    logging.root.handlers[:] = []
    yield Lines(capsys)
    structlog.reset_defaults()
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def test_every_event_is_a_noun_and_a_past_verb() -> None:
    """The names have one form."""
    assert all(re.fullmatch(r"[a-z]+\.[a-z_]+", name) for name in logs.EVENTS)


def test_every_event_in_the_code_is_registered() -> None:
    """Notes of the engine, and what the daemon says itself."""
    said = re.compile(r'(?:\bNote|log\.(?:debug|info|warning|error))\(\s*"([^"]+)"')
    sources = Path(logs.__file__).parent.rglob("*.py")
    names = {name for path in sources for name in said.findall(path.read_text())}
    assert names
    assert names <= logs.EVENTS


def test_a_line_is_one_json_object(stderr: Lines) -> None:
    """With a UTC time, the level and the event."""
    logs.configure("info", "json", strict=True)
    logs.logger(runner="rnr_1").info(Event.DAEMON_STARTED, pid=7, paths=("/a",))
    line = json.loads(stderr.getvalue())
    assert line.pop("timestamp").endswith("Z")
    assert line == {"event": "daemon.started", "level": "info", "pid": 7, "paths": ["/a"], "runner": "rnr_1"}


def test_lines_below_the_level_are_not_written(stderr: Lines) -> None:
    """info is silent at warning."""
    logs.configure("warning", "json")
    logs.logger().info(Event.DAEMON_STARTED)
    assert stderr.getvalue() == ""


def test_an_unknown_event_is_an_error_where_strict(stderr: Lines) -> None:
    """Tests find a wrong name; a daemon marks its line and lives on."""
    logs.configure("info", "json", strict=True)
    with pytest.raises(ValueError, match=r"made\.up"):
        logs.logger().info("made.up")
    logs.configure("info", "json")
    logs.logger().info("made.up")
    assert json.loads(stderr.getvalue())["unregistered"] is True


@pytest.mark.parametrize("form", ["json", "console"])
@pytest.mark.parametrize("naughty", NAUGHTY)
def test_a_naughty_string_stays_inside_its_line(stderr: Lines, form: str, naughty: str) -> None:
    """As a value, as a key, nested: one printable ASCII line comes out."""
    logs.configure("info", form)
    logs.logger().info(Event.DAEMON_STARTED, value=naughty, nested={naughty: [naughty]}, **{naughty or "x": 1})
    line = stderr.getvalue()
    assert line.endswith("\n")
    assert line[:-1].isprintable()
    assert line.isascii()


@given(st.text(), st.dictionaries(st.text().filter(lambda key: key not in ("event", "exc_info")), st.text()))
def test_any_text_renders_printable(event: str, fields: dict[str, str]) -> None:
    """Both forms, whatever is in them."""
    for render in (logs.render_json, logs.render_console):
        line = render(None, "info", {"event": event, **{k: v for k, v in fields.items() if k != "exception"}})
        assert line.isascii()
        assert line.isprintable()


def test_a_console_line_reads_well(stderr: Lines) -> None:
    """Plain values bare, others quoted."""
    logs.configure("info", "console")
    logs.logger().info(Event.DAEMON_STARTED, pid=7, state="/var/lib/runner", note="two words", none=None)
    line = stderr.getvalue()
    assert LEVEL_AND_EVENT.match(line)
    assert line.endswith('pid=7 state=/var/lib/runner note="two words" none=null\n')


def test_auto_is_json_where_nobody_looks(stderr: Lines) -> None:
    """A pipe gets JSON."""
    logs.configure("info", "auto")
    logs.logger().info(Event.DAEMON_STARTED)
    assert json.loads(stderr.getvalue())["event"] == "daemon.started"


@pytest.mark.parametrize("form", ["json", "console"])
def test_a_traceback_is_written_safely(stderr: Lines, form: str) -> None:
    """Its lines are escaped one by one."""
    logs.configure("info", form)
    try:
        raise ValueError("\x1b[31mred\nnext")
    except ValueError:
        logs.logger().error(Event.JOURNAL_BROKEN, exc_info=True)
    text = stderr.getvalue()
    assert "ValueError" in text
    assert "\x1b" not in text
    assert all(line.isprintable() for line in text.splitlines())


def test_secrets_never_print(stderr: Lines) -> None:
    """Not in a line, not in a repr, not in a format, not in a pickle."""
    secret = Secret("hunter2")
    logs.configure("info", "json")
    logs.logger().info(Event.DAEMON_STARTED, token=secret, nested={"deep": [secret]})
    assert "hunter2" not in stderr.getvalue() + f"{secret} {secret!r}" + f"{ {'k': secret} }"
    assert json.loads(stderr.getvalue())["token"] == "***"
    with pytest.raises(TypeError):
        pickle.dumps(secret)
    assert secret.reveal() == "hunter2"


def test_what_libraries_say_comes_in_the_same_form(stderr: Lines) -> None:
    """Warnings of the standard logging become events; a bad format string does not hurt."""
    logs.configure("debug", "json", strict=True)
    logging.getLogger("websockets").warning("slow %s", "peer")
    logging.getLogger("websockets").info("not of interest")
    logging.getLogger("asyncio").error("%d", "no number")
    lines = [json.loads(line) for line in stderr.getvalue().splitlines()]
    assert [(line["event"], line["level"], line["logger"]) for line in lines] == [
        ("library.warned", "warning", "websockets"),
        ("library.warned", "error", "asyncio"),
    ]
    assert lines[0]["message"] == "slow peer"


def test_a_long_value_is_cut_and_says_so() -> None:
    """A log is no place for payloads."""
    line = logs.render_json(None, "info", {"event": "daemon.started", "value": "x" * 10_000})
    assert len(line) < 2 * logs.VALUE_CHARS_MAX
    assert "(10000 characters)" in line
