"""Pieces of stdin on their way from the control plane to shims: verified here, taken in order and once there.

What is refused is answered: nobody resends into the void. An attempt whose shim is not connected answers nothing, since its piece
comes again.
"""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Final

from protocol.errors import EnvelopeError, Reason, RemoteError
from protocol.keys import PublicKey
from protocol.messages import Input, InputFed
from protocol.stdin import open_piece
from runner.adapters.attemptfiles import ATTEMPTS_DIR, read_attempt, read_spec

KEYS_MAX: Final = 1024
"""Keys that are remembered: of attempts that were written to of late; others are read from their specs again."""


class Inlet:
    """`feed` hands bytes to a shim and says whether it is connected; `say` answers the control plane."""

    def __init__(
        self, state_dir: Path, *, feed: Callable[[str, int, bytes, bool], bool], say: Callable[[InputFed], None]
    ) -> None:
        self._root = state_dir / ATTEMPTS_DIR
        self._feed = feed
        self._say = say
        self._keys: OrderedDict[str, PublicKey | None] = OrderedDict()

    def take(self, piece: Input) -> None:
        """Verify a piece and pass it on."""
        try:
            key = self._key(piece.attempt)
            data = open_piece(piece, key)
        except RemoteError as exc:
            self._say(InputFed(attempt=piece.attempt, received=0, credit=0, closed=True, reason=exc.reason))
            return
        if not self._feed(piece.attempt, piece.offset, data, piece.end):
            files = read_attempt(self._root / piece.attempt)
            if files.exit is not None or not files.alive:
                self._say(InputFed(attempt=piece.attempt, received=0, credit=0, closed=True, reason=Reason.NOT_RUNNING))

    def fed(self, attempt: str, received: int, credit: int, closed: bool) -> None:
        """A shim told how far it is: passed on where somebody asked for it."""
        if attempt in self._keys:
            self._say(InputFed(attempt=attempt, received=received, credit=credit, closed=closed))

    def disconnected(self) -> None:
        """The session is over: the next one has not asked for anything."""
        self._keys.clear()

    def _key(self, attempt: str) -> PublicKey:
        key = self._keys.get(attempt)
        if key is None:
            spec = read_spec(self._root / attempt)
            if spec is None:
                raise RemoteError(Reason.UNKNOWN_TARGET, "there is no such attempt")
            named = spec.get("input_key")
            try:
                key = PublicKey.from_b64url(named) if isinstance(named, str) else None
            except EnvelopeError as exc:
                raise RemoteError(exc.reason, exc.detail) from None
            if key is None:
                raise RemoteError(Reason.UNKNOWN_KEY, "its start names no key for its stdin")
            self._keys[attempt] = key
            while len(self._keys) > KEYS_MAX:
                self._keys.popitem(last=False)
        return key
