"""Spellings of secrets, against the programs that write them so."""

import base64
import html
import json
import shlex
import subprocess
import urllib.parse

import pytest

from runner.core.needles import (
    EVERYTHING,
    NEEDLE_BYTES_MIN,
    NEEDLES_MAX,
    PIECE_BYTES,
    Needles,
    needles_of,
    secret_values,
    spellings,
)

AWKWARD = "p4$s `w'o\"r\\d/ü?&<x>\t=%"
WRITTEN = {
    "itself": AWKWARD,
    "json": json.dumps({"key": AWKWARD}),
    "json, as it is": json.dumps({"key": AWKWARD}, ensure_ascii=False),
    "a path of a URL": urllib.parse.quote(AWKWARD),
    "a query": urllib.parse.urlencode({"key": AWKWARD}),
    "encodeURIComponent": urllib.parse.quote(AWKWARD, safe="-_.!~*'()"),
    "shell quotes": shlex.quote(AWKWARD),
    "html": html.escape(AWKWARD),
    "hex": AWKWARD.encode().hex(),
    "base64": base64.b64encode(AWKWARD.encode()).decode(),
    "base64 for URLs": base64.urlsafe_b64encode(b"user:" + AWKWARD.encode()).decode(),
}


@pytest.mark.parametrize("written", WRITTEN.values(), ids=WRITTEN)
def test_what_encoders_write_is_a_spelling(written: str) -> None:
    """But for a last character of base64, which what follows has a share in."""
    assert any(spelling in written.encode() for spelling in spellings(AWKWARD.encode()))


@pytest.mark.parametrize("value", [AWKWARD, "a b'c$d", "tab\tand\nline", "back\\slash \x01\x7f"])
@pytest.mark.parametrize(
    "script", ['printf %q "$1"', 'set -x; : "$1"', "declare -p 1 2>/dev/null || x=$1; declare -p x"]
)
def test_what_a_shell_writes_is_a_spelling(value: str, script: str) -> None:
    """`%q`, `set -x` and `declare -p` of bash."""
    done = subprocess.run(
        ["bash", "-c", script, "bash", value], capture_output=True, env={"LC_ALL": "C.UTF-8"}, check=False, timeout=30
    )
    assert any(spelling in done.stdout + done.stderr for spelling in spellings(value.encode()))


def test_each_line_of_a_value_is_looked_for() -> None:
    """Without what stands around it; short ones are not."""
    found = needles_of([b"-----BEGIN KEY-----\r\n  abcdefgh\nxyz\n-----END KEY-----\n"]).spellings
    assert {b"-----BEGIN KEY-----", b"abcdefgh", b"-----END KEY-----"} <= set(found)
    assert b"xyz" not in found and all(len(spelling) >= NEEDLE_BYTES_MIN for spelling in found)


def test_what_is_short_is_nothing() -> None:
    """Nothing is masked for it, not even a longer spelling of it."""
    assert not needles_of([b"12345", b" abc\n", b""])


def test_a_long_value_is_looked_for_in_pieces() -> None:
    """Together they are all of it, and no spelling is longer than six times a piece."""
    value = bytes(range(33, 127)) * 100
    needles = needles_of([value])
    text, hidden = value, set()
    for spelling in needles.spellings:
        at = text.find(spelling)
        while at >= 0:
            hidden |= set(range(at, at + len(spelling)))
            at = text.find(spelling, at + 1)
    assert hidden == set(range(len(value))) and needles.longest <= 6 * (PIECE_BYTES + NEEDLE_BYTES_MIN)


def test_too_many_needles_hide_everything() -> None:
    """What cannot be looked for is not shown."""
    assert needles_of([b"secret-%d" % number for number in range(NEEDLES_MAX)]) == EVERYTHING


def test_values_are_secrets_by_origin_or_by_name() -> None:
    """Sealed values all, others for the names they have."""
    env = {"PATH": "/usr/bin", "LC_API_KEY": "in the clear", "HOME": "/home/dev"}
    assert secret_values(env, {"PLAIN_NAME": b"sealed"}) == [b"sealed", b"in the clear"]


def test_needles_print_nothing_of_a_secret() -> None:
    """Not in a traceback, not in a log."""
    assert repr(needles_of([b"tr0ub4dor"])).startswith("Needles(") and "tr0ub4dor" not in repr(
        needles_of([b"tr0ub4dor"])
    )
    assert not Needles() and EVERYTHING
