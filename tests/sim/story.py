"""What happened in a world, in order: short lines for a person, made into text only when somebody reads them."""

import hashlib
from typing import Any

from protocol.ids import Attempt
from tests.sim.timeline import MS_US, Timeline

LINES_MAX = 200_000


def short(attempt: Attempt) -> str:
    """An attempt as a story names it."""
    return f"{attempt.execution_id[-4:]}.{attempt.start_token}"


class InvariantBroken(BaseException):
    """Something that must never happen has happened; not an Exception, so that no product code takes it for its own failure."""


class Story:
    """The lines so far. `say` formats nothing: thousands of worlds are never told."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._lines: list[tuple[int, str, str, tuple[Any, ...]]] = []
        self.over = False
        """Nothing that happens from here on belongs to it."""
        self.broken: str | None = None
        """The invariant that broke first."""

    def say(self, who: str, what: str, *args: Any) -> None:
        """One event: `what` is a %-format of `args`."""
        if self.over:
            return
        self._lines.append((self._timeline.now_us, who, what, args))

    def fail(self, rule: str, *args: Any) -> None:
        """An invariant broke: the first one counts. Raises InvariantBroken."""
        text = rule % args if args else rule
        if self.broken is None and not self.over:
            self.broken = text
            self.say("INVARIANT", "%s", text)
            self._timeline.stop()
        raise InvariantBroken(text)

    def must(self, held: bool, rule: str, *args: Any) -> None:
        """As `fail`, unless it held."""
        if not held:
            self.fail(rule, *args)

    def lines(self) -> list[str]:
        """All of it, one line for each event: seconds, who, what."""
        return [
            f"{at_us / MS_US / 1000:9.3f} {who:<9} {what % args if args else what}"
            for at_us, who, what, args in self._lines
        ]

    def digest(self) -> str:
        """The whole story as a short hash: two runs of a seed tell the same."""
        return hashlib.sha256("\n".join(self.lines()).encode()).hexdigest()[:16]
