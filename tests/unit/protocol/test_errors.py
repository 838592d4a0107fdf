"""Reason codes and close codes."""

import pytest

from protocol.errors import CloseCode, LocalError, ProtocolError, Reason, RemoteError


def test_a_reason_is_its_own_name() -> None:
    """What crosses the wire is what the code says."""
    for reason in Reason:
        assert reason.value == reason.name
        assert reason.value.isascii()


def test_close_codes_say_whether_to_dial_again() -> None:
    """Without a change on either side these five never help."""
    permanent = {code for code in CloseCode if not code.retryable}
    assert permanent == {
        CloseCode.BAD_PROOF,
        CloseCode.UNSUPPORTED_VERSION,
        CloseCode.UNKNOWN_RUNNER,
        CloseCode.SESSION_REPLACED,
        CloseCode.IDENTITY_CONFLICT,
    }
    for code in CloseCode:
        assert code in (1000, 1001, 1009) or 4400 <= code < 4600
        assert code < 4500 or code.retryable


@pytest.mark.parametrize("error", [ProtocolError, LocalError, RemoteError])
def test_an_error_says_its_reason_first(error: type[ProtocolError]) -> None:
    """Then what a person may read."""
    assert str(error(Reason.BAD_SIG, "why")) == "BAD_SIG: why"
    assert str(error(Reason.BAD_SIG)) == "BAD_SIG"
    assert error(Reason.BAD_SIG).reason is Reason.BAD_SIG
