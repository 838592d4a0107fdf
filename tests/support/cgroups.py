"""A cgroup of version 2 for tests to make leaves in, where this machine has one."""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from runner.adapters import cgroups
from runner.shim import cgroup
from tests.support.shim import wait_for

_numbers = itertools.count(1)


def mount_point() -> Path:
    """Where version 2 is mounted; skips where it is not."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, kind = line.partition(" - ")
        if kind.startswith("cgroup2 "):
            return Path(fields.split()[4])
    pytest.skip("needs cgroups of version 2")


@contextmanager
def delegated() -> Iterator[Path]:
    """A cgroup of our own, empty; whatever is left below it is killed and removed. Skips where none can be made."""
    place = mount_point() / f"local-runner-test-{os.getpid()}-{next(_numbers)}"
    try:
        place.mkdir()
    except PermissionError as exc:
        pytest.skip(f"needs the right to make a cgroup: {exc}")
    try:
        if not cgroups.usable(place):
            pytest.skip("needs cgroups that can be killed and frozen whole (Linux 5.14)")
        yield place
    finally:
        # Who was moved out of a leaf and lives on is the test's own to end.
        for leaf in cgroups.leaves(place).values():
            (leaf / "cgroup.freeze").write_text("0")
            cgroups.sweep_leaf(leaf)
        wait_for(lambda: cgroup.remove(os.fsencode(place)), "the cgroup of the tests to be empty")


def inside(leaf: Path) -> list[int]:
    """Who is in a leaf itself."""
    return [int(pid) for pid in (leaf / "cgroup.procs").read_text().split()]
