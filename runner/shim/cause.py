"""Why an attempt ended: kept with its first cause."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

DETAIL_MAX: Final = 512


class Cause:
    """Why an attempt ended, as in `exit.json`."""

    __slots__ = ("by", "detail", "kind", "reason")

    def __init__(self, kind: str, by: str = "", reason: str | None = None, detail: str = "") -> None:
        self.kind = kind
        self.by = by[:DETAIL_MAX]
        self.reason = reason
        self.detail = detail[:DETAIL_MAX]
