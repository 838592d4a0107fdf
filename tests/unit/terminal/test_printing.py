"""What both command lines print: tables, facts, JSON, complaints, logs; nothing in them steers a terminal."""

import json
from collections.abc import Callable
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from protocol.records import Record, RecordKind
from terminal.printing import (
    complain,
    log_text,
    print_facts,
    print_json,
    print_table,
    shell_words,
    wants_colour,
    write_piece,
)

HOSTILE = "\x1b]0;owned\x07"


def printed(write: Callable[[], None], **more: Any) -> Result:
    """What a command that calls `write` leaves on its streams."""
    return CliRunner().invoke(click.command()(write), **more)


def test_tables_end_where_their_words_end() -> None:
    """No blanks behind the last column, which a pipe would carry."""
    rows = [("a", "make"), ("b", "make a long name")]
    lines = printed(lambda: print_table({}, ("ID", "COMMAND"), rows)).stdout.splitlines()
    assert len(lines) == 3 and [line for line in lines if line != line.rstrip()] == []


def test_a_table_in_a_pipe_is_never_cut() -> None:
    """The last column is as long as its words."""
    assert "x" * 3000 in printed(lambda: print_table({}, ("ID", "COMMAND"), [("a", "x" * 3000)])).stdout


def test_words_of_strangers_are_made_visible() -> None:
    """In tables, facts and complaints no control character comes out, and markup stays as it was written."""
    table = printed(lambda: print_table({}, ("A", "B"), [(HOSTILE, f"[red]{HOSTILE}")]), color=True).stdout
    assert "[red]" in table and "\x1b]" not in table and "\x07" not in table
    facts = printed(lambda: print_facts([("a", HOSTILE), ("long", "b")])).stdout
    assert "\x1b" not in facts and facts.splitlines()[1] == "long  b"
    told = printed(lambda: complain("runner", HOSTILE)).stderr
    assert told.startswith("runner: ") and "\x1b" not in told and "next:" not in told


def test_a_complaint_names_the_command_and_the_next_step() -> None:
    """On stderr; stdout is for what was asked for."""
    done = printed(lambda: complain("runner-control", "no such runner", "runner-control runners"))
    assert (done.stdout, done.stderr) == ("", "runner-control: no such runner\nnext: runner-control runners\n")


def test_json_is_ascii() -> None:
    """It comes back as it was, and a terminal can obey nothing in it."""
    out = printed(lambda: print_json({"said": HOSTILE + "\u202e"})).stdout
    assert out.isascii() and "\x1b" not in out and json.loads(out) == {"said": HOSTILE + "\u202e"}


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, None),
        ({"NO_COLOR": ""}, None),
        ({"NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
        ({"TERM": "vt"}, None),
    ],
)
def test_no_colours_for_whoever_wants_none(environ: dict[str, str], wanted: bool | None) -> None:
    """An empty NO_COLOR says nothing."""
    assert wants_colour(environ) is wanted


def test_a_log_in_a_pipe_is_byte_exact_and_apart() -> None:
    """Each piece goes to its own stream, and no byte of it is changed."""

    def write() -> None:
        text = log_text(raw=False)
        for kind, payload in ((RecordKind.STDOUT, b"\x1b[31m\xff\n"), (RecordKind.STDERR, b"err\n")):
            for piece in text.show(Record(0, kind, 0, payload)):
                write_piece(piece)

    done = printed(write)
    assert (done.exit_code, done.stdout_bytes, done.stderr_bytes) == (0, b"\x1b[31m\xff\n", b"err\n")


def test_arguments_show_where_each_begins_and_ends() -> None:
    """As a shell would take them again."""
    assert shell_words(["echo", "a b", "$x", ""]) == "echo 'a b' '$x' ''"
