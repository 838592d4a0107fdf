"""One exception out of the groups that task groups put it in."""

import pytest

from protocol.groups import ungrouped


def test_a_lone_exception_comes_out_of_all_its_groups() -> None:
    """Callers catch it as it is, and its cause is still known."""
    cause = KeyError("why")
    lone = ValueError("x")
    lone.__cause__ = cause
    with pytest.raises(ValueError, match="x") as caught, ungrouped():
        raise BaseExceptionGroup("outer", [BaseExceptionGroup("inner", [lone])])
    assert caught.value is lone and lone.__cause__ is cause


def test_several_exceptions_stay_together() -> None:
    """None of them is dropped; only the groups around them are."""
    both = ExceptionGroup("inner", [ValueError("x"), KeyError("y")])
    with pytest.raises(ExceptionGroup) as caught, ungrouped():
        raise ExceptionGroup("outer", [both])
    assert caught.value is both


def test_what_is_in_no_group_passes() -> None:
    """As it was raised."""
    with pytest.raises(KeyError), ungrouped():
        raise KeyError("z")
