"""docs/protocol.md names everything that the code has, with the values the code has."""

import re
from pathlib import Path
from typing import get_args

import pytest

from protocol import limits, messages
from protocol.commands import STREAM_OF, Command, Kind
from protocol.envelope import PayloadType
from protocol.errors import CloseCode, Reason
from protocol.receipt import Outcome, Receipt, Settlement, Verdict
from tests.vectors.generate import FILES

PAGE = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text()
WORDS = set(re.findall(r"[A-Za-z_0-9.]+", PAGE))


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_has_its_row(reason: Reason) -> None:
    """With whether a number is consumed."""
    assert re.search(rf"^\| `{reason}` \| (yes|no|–) \| .+ \|$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("code", CloseCode)
def test_every_close_code_has_its_row(code: CloseCode) -> None:
    """With whether to dial again."""
    assert f"| {code.value} | {code.name} | {'yes' if code.retryable else 'no'} |" in PAGE


@pytest.mark.parametrize("message", [*get_args(messages.FromRunner), *get_args(messages.FromPlane)])
def test_every_message_is_named(message: type[messages.Hello]) -> None:
    """By its tag."""
    assert f"`{message.model_fields['t'].default}`" in PAGE


@pytest.mark.parametrize("name", [name for name in vars(limits) if name.isupper() and name not in ("KIB", "MIB")])
def test_every_limit_has_its_value(name: str) -> None:
    """As in the code."""
    assert f"| `{name}` | {getattr(limits, name)} |" in PAGE


def test_no_limit_is_told_that_is_none() -> None:
    """Rows of the table are limits of the code."""
    for name in re.findall(r"^\| `([A-Z_]+)` \| \d+ \|$", PAGE, re.MULTILINE):
        assert hasattr(limits, name), name


@pytest.mark.parametrize("model", [Command, Receipt, Settlement])
def test_every_field_of_what_is_signed_is_named(model: type[Command]) -> None:
    """Field by field."""
    assert set(model.model_fields) <= WORDS


def test_every_kind_type_and_outcome_is_named() -> None:
    """With the stream of the kind."""
    for kind in Kind:
        assert f"| `{kind}` | {STREAM_OF[kind]} |" in PAGE
    for word in (*Outcome, *Verdict, *(kind.split(".")[-2].removesuffix(".v1") for kind in PayloadType)):
        assert word in WORDS or word == "v1+json" or f"`{word}`" in PAGE


def test_every_vector_file_is_listed() -> None:
    """And no other."""
    assert set(re.findall(r"^\| `(\w+)\.json` \|", PAGE, re.MULTILINE)) == set(FILES)
