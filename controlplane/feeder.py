"""`exec -i`: what comes on this process's stdin goes to the execution's, piece by piece, signed with a key made for it.

A thread of its own reads and sends, so that output is printed meanwhile. One piece is on its way at a time, and is sent again until
the runner's shim has taken it, so whatever restarts in between, no byte is fed twice or lost.
"""

import os
import sys
import threading
from typing import Final

from controlplane.client import Json, PlaneClient, PlaneRefused, PlaneUnreachable
from controlplane.follow import Patience, tell_on_stderr
from controlplane.reach import path_id
from protocol.ids import Attempt, ExecutionId, FencingToken
from protocol.keys import PrivateKey
from protocol.limits import INPUT_PIECE_BYTES_MAX
from protocol.stdin import sign_piece

KEY_BYTES: Final = 32
_OVER: Final = frozenset({"NOT_RUNNING", "UNKNOWN_EXECUTION", "UNKNOWN_ATTEMPT"})


class Feeder:
    """Feeds one execution; `begin` it once, it ends with this process."""

    def __init__(self, fd: int | None = None) -> None:
        self._key = PrivateKey(os.urandom(KEY_BYTES))
        self._fd = sys.stdin.fileno() if fd is None else fd

    @property
    def public_key(self) -> str:
        """For the order: who may write to its stdin."""
        return self._key.public.x

    def begin(self, url: str, token: str, ordered: Json) -> threading.Thread:
        """Read and send in a thread that does not keep this process alive."""
        attempt = Attempt(ExecutionId(ordered["id"]), FencingToken(ordered["start_token"]))
        thread = threading.Thread(target=self._run, args=(url, token, attempt), name="stdin", daemon=True)
        thread.start()
        return thread

    def _run(self, url: str, token: str, attempt: Attempt) -> None:
        with PlaneClient(url, token) as client:
            try:
                self._feed(client, attempt)
            except (PlaneRefused, PlaneUnreachable) as exc:
                if not (isinstance(exc, PlaneRefused) and exc.reason in _OVER):
                    tell_on_stderr(f"its stdin is not fed any more: {exc}")

    def _feed(self, client: PlaneClient, attempt: Attempt) -> None:
        """Raises PlaneRefused, or PlaneUnreachable when nobody answered for long."""
        offset, end = 0, False
        while not end:
            data = os.read(self._fd, INPUT_PIECE_BYTES_MAX)
            end = not data
            piece = sign_piece(self._key, attempt, offset, data, end=end)
            body = {"offset": offset, "data": piece.data, "end": end, "sig": piece.sig}
            if not self._send(client, attempt, body, offset + len(data)):
                return
            offset += len(data)

    def _send(self, client: PlaneClient, attempt: Attempt, body: Json, until: int) -> bool:
        """Send a piece until it is taken; False when nobody reads any more."""
        path, patience = f"/executions/{path_id(attempt.execution_id)}/input", Patience()
        while True:
            try:
                fed = client.feed(path, body | {"start_token": attempt.start_token})
            except PlaneUnreachable as exc:
                patience.spend(exc)
                continue
            patience.renew()
            if fed["closed"]:
                if fed["reason"] not in (None, *_OVER):
                    tell_on_stderr(f"its stdin is not fed any more: {fed['reason']}")
                return False
            if fed["received"] is not None and fed["received"] >= until:
                return True
