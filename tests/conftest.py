"""Settings that every test shares."""

import os
import signal

from hypothesis import HealthCheck, settings

settings.register_profile("check", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("long", settings.get_profile("check"), max_examples=2000, stateful_step_count=200)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "check"))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background of a shell: programs under test would inherit it, and those that are interrupted here would hang.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    """Say how the generated tests can be run for longer and repeated."""
    profile = os.environ.get("HYPOTHESIS_PROFILE", "check")
    return f"hypothesis profile: {profile} (HYPOTHESIS_PROFILE=long for more); repeat a run with --hypothesis-seed=N"
