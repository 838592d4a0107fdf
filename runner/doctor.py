"""What is well and what is not on this machine: a list of small checks, each with a stable id, a measured value and a fix.

A check looks and never repairs; its fix is a command for a person. Ids are added, never reused: scripts name them.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from runner.errors import ConfigError, NotEnrolled

if TYPE_CHECKING:
    from runner.adapters.keystore import Identity
    from runner.config import Settings


class Verdict(StrEnum):
    """What a check thinks of what it measured."""

    OK = "ok"
    WARN = "warn"
    """It works, and will not for ever or not for all."""
    FAIL = "fail"
    """The daemon cannot do its work like this."""
    SKIP = "skip"
    """There is nothing to measure here."""


class Measured(NamedTuple):
    """The outcome of one check."""

    verdict: Verdict
    value: str
    fix: str = ""
    """The next command, where there is something to do."""


@dataclass(frozen=True)
class Scene:
    """What checks look at. `problem` is set instead of `found` where the settings could not be read."""

    found: "Settings | None"
    problem: ConfigError | None = None
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    @property
    def settings(self) -> "Settings":
        """The settings; checks are only run where there are any, but for the one that reports that there are none."""
        assert self.found is not None, "checks are skipped without settings"
        return self.found

    @cached_property
    def identity(self) -> "Identity | NotEnrolled | ConfigError":
        """Who this machine is, or why that is not known."""
        from runner.adapters.keystore import Keystore

        try:
            return Keystore(self.settings.state_dir / "identity").load()
        except (NotEnrolled, ConfigError) as exc:
            return exc


class Check(NamedTuple):
    """One check."""

    id: str
    title: str
    measure: Callable[[Scene], Measured]


class Finding(NamedTuple):
    """What one check found."""

    id: str
    title: str
    measured: str
    verdict: Verdict
    fix: str


def examine(scene: Scene, checks: Iterable[Check]) -> Iterator[Finding]:
    """Run the checks one after the other."""
    for check in checks:
        measured = _measure(check, scene)
        yield Finding(check.id, check.title, measured.value, measured.verdict, measured.fix)


def _measure(check: Check, scene: Scene) -> Measured:
    try:
        return check.measure(scene)
    except OSError as exc:
        # What the check did not foresee is a finding like any other: the next checks still have their say.
        place = f"{exc.filename}: " if isinstance(exc.filename, str) else ""
        return Measured(Verdict.FAIL, f"{place}{exc.strerror or exc}", "runner doctor --only " + check.id)


def ok(value: str) -> Measured:
    """All is well."""
    return Measured(Verdict.OK, value)


def skip(value: str) -> Measured:
    """Nothing to measure."""
    return Measured(Verdict.SKIP, value)
