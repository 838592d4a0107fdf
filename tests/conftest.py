"""Settings that every test shares."""

import os
import signal

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("base", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
# The same examples each time: whoever changes a line wants to hear of that line. What is new is looked for with the other one.
settings.register_profile("check", settings.get_profile("base"), derandomize=True)
settings.register_profile("long", settings.get_profile("base"), max_examples=2000, stateful_step_count=200)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "check"))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background of a shell: programs under test would inherit it, and those that are interrupted here would hang.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long go first: whoever runs several at once is not left with one of them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_report_header() -> str:
    """Say how the generated tests can be run for longer and repeated."""
    profile = os.environ.get("HYPOTHESIS_PROFILE", "check")
    return f"hypothesis profile: {profile} (HYPOTHESIS_PROFILE=long for more and other ones)"
