"""Tickets: each opens one connection of one viewer of a PTY, within TICKET_TTL_MS. A ticket itself is nowhere kept, only its hash."""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from controlplane.errors import Fault, RequestRefused
from controlplane.limits import TICKET_TTL_MS, TICKETS_MAX
from protocol.commands import ViewerMode
from protocol.ids import Attempt
from protocol.keys import b64url

_TICKET_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Ticket:
    """Whom a ticket lets in."""

    attempt: Attempt
    viewer: str
    mode: ViewerMode
    until_ms: int


class Tickets:
    """The tickets that are good now. `clock_ms` is monotonic."""

    def __init__(self, clock_ms: Callable[[], int], entropy: Callable[[int], bytes]) -> None:
        self._clock_ms = clock_ms
        self._entropy = entropy
        self._known: dict[bytes, Ticket] = {}
        """By hash, the oldest first."""

    def issue(self, attempt: Attempt, viewer: str, mode: ViewerMode) -> str:
        """A new ticket. Raises RequestRefused(BUSY) when too many are out."""
        now_ms = self._clock_ms()
        while self._known and next(iter(self._known.values())).until_ms <= now_ms:
            del self._known[next(iter(self._known))]
        if len(self._known) >= TICKETS_MAX:
            raise RequestRefused(Fault.BUSY, "too many tickets are out")
        secret = b64url(self._entropy(_TICKET_BYTES))
        self._known[_hash(secret)] = Ticket(attempt, viewer, mode, now_ms + TICKET_TTL_MS)
        return secret

    def redeem(self, secret: str) -> Ticket | None:
        """Whom it lets in, once; None: it was used, is too old, or never was."""
        ticket = self._known.pop(_hash(secret), None)
        return ticket if ticket is not None and self._clock_ms() < ticket.until_ms else None


def _hash(secret: str) -> bytes:
    return sha256(secret.encode("utf-8", "replace")).digest()
