"""Effects run serially per resource and concurrently otherwise: who may begin now, and who waits for whom.

Rule 1: claims are granted in the order they were made; nobody overtakes on a resource they share.
Rule 2: an owner holds all its resources or none, so there is no order in which two could wait for each other.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Owner = TypeVar("Owner", bound=Hashable)


@dataclass(slots=True)
class Claims(Generic[Owner]):
    """Claims on named resources, each exclusive (True) or shared (False)."""

    _wanted: dict[Owner, Mapping[str, bool]] = field(default_factory=dict)
    """In order of arrival."""
    _granted: set[Owner] = field(default_factory=set)

    def __len__(self) -> int:
        """Owners that hold or wait."""
        return len(self._wanted)

    def want(self, owner: Owner, resources: Mapping[str, bool]) -> bool:
        """Ask for `resources` (name → exclusive); True when granted at once, else `drop` of another will name it."""
        assert owner not in self._wanted, "an owner claims once"
        self._wanted[owner] = resources
        if self._free(owner):
            self._granted.add(owner)
            return True
        return False

    def drop(self, owner: Owner) -> list[Owner]:
        """Give up what `owner` holds or waits for; returns those that hold theirs now, in order."""
        resources = self._wanted.pop(owner, None)
        self._granted.discard(owner)
        if resources is None:
            return []
        woken = [
            other
            for other, theirs in self._wanted.items()
            if other not in self._granted and theirs.keys() & resources.keys()
        ]
        now_free = []
        for other in woken:
            if self._free(other):
                self._granted.add(other)
                now_free.append(other)
        return now_free

    def holds(self, owner: Owner) -> bool:
        """Whether `owner` holds its resources."""
        return owner in self._granted

    def _free(self, owner: Owner) -> bool:
        """Whether nobody before `owner` holds or waits for something in conflict."""
        mine = self._wanted[owner]
        for other, theirs in self._wanted.items():
            if other == owner:
                return True
            if any(exclusive or theirs[name] for name, exclusive in mine.items() if name in theirs):
                return False
        raise AssertionError("an owner is among the wanting")
