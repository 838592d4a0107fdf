"""Sealed secrets open in their own place only."""

import base64

import pytest

from protocol.errors import Reason
from protocol.limits import SECRET_BYTES_MAX
from protocol.secretbox import SecretRefused, open_secret, recipient_of, seal_secret
from tests.support.builders import an_attempt

SEED = bytes(range(32))
RECIPIENT = recipient_of(SEED)
HERE = ("rnr_1", an_attempt(), "API_TOKEN")


def test_a_secret_opens_where_it_was_sealed_for() -> None:
    """The same key, runner, attempt and name."""
    sealed = seal_secret(b"hunter2", RECIPIENT, *HERE)
    assert open_secret(sealed, SEED, *HERE) == b"hunter2"
    assert b"hunter2" not in base64.b64decode(sealed)
    assert seal_secret(b"hunter2", RECIPIENT, *HERE) != sealed


def test_a_secret_opens_nowhere_else() -> None:
    """Not for another key, runner, attempt, token or name, and not when damaged."""
    sealed = seal_secret(b"hunter2", RECIPIENT, *HERE)
    raw = bytearray(base64.b64decode(sealed))
    raw[-1] ^= 1
    damaged = base64.b64encode(raw).decode()
    attempts = [
        (sealed, bytes(32), *HERE),
        (sealed, SEED, "rnr_2", *HERE[1:]),
        (sealed, SEED, "rnr_1", an_attempt("ex_2"), "API_TOKEN"),
        (sealed, SEED, "rnr_1", an_attempt("ex_1", 2), "API_TOKEN"),
        (sealed, SEED, *HERE[:2], "OTHER"),
        (damaged, SEED, *HERE),
        ("", SEED, *HERE),
        ("AAAA", SEED, *HERE),
        ("é", SEED, *HERE),
        ("not base64!", SEED, *HERE),
    ]
    for attempt in attempts:
        with pytest.raises(SecretRefused) as refused:
            open_secret(*attempt)
        assert refused.value.reason is Reason.SECRET_UNREADABLE


def test_a_secret_is_bounded() -> None:
    """16 KiB, and the sealed form fits a command's field."""
    assert len(seal_secret(b"x" * SECRET_BYTES_MAX, RECIPIENT, *HERE)) <= 32768
    with pytest.raises(ValueError, match="at most"):
        seal_secret(b"x" * (SECRET_BYTES_MAX + 1), RECIPIENT, *HERE)
    with pytest.raises(ValueError, match="base64url"):
        seal_secret(b"x", "short", *HERE)
