"""Following an execution from afar: its output as it comes, across restarts of the control plane, to its one end.

Theory of operation. The log is read from an offset that only moves past whole records which were printed; a broken connection is
opened again at that offset. The log's end is not the execution's: its final state is asked for afterwards.
"""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

from controlplane.client import WAIT_MS_MAX, Json, LogParser, PlaneClient, PlaneRefused, PlaneUnreachable
from protocol.logtext import LogText, Piece

RECONNECT_S_MAX: Final = 120.0
"""Without a control plane for this long a follower leaves; what it follows goes on."""
RECONNECT_DELAY_S: Final = 0.5
FINAL_STATES: Final = frozenset({"settled", "refused", "cancelled"})


class Left(Exception):
    """The second ^C: the follower leaves at once."""


def follow_log(
    client: PlaneClient,
    execution_id: str,
    offset: int,
    text: LogText,
    write: Callable[[Piece], None],
    attempt: int | None = None,
) -> None:
    """Print the log from `offset` until it is complete. Raises PlaneRefused, PlaneUnreachable or RemoteError."""
    parser = LogParser(offset)
    patience = Patience()
    while True:
        try:
            for data in client.log(execution_id, parser.offset, follow=True, attempt=attempt):
                patience.renew()
                _print(parser, data, text, write)
            if _is_complete(client, execution_id, parser.offset, attempt):
                break
        except PlaneUnreachable as exc:
            patience.spend(exc)
        else:
            patience.pause()
        parser.begin_again()
    for piece in text.finish():
        write(piece)


def print_log(
    client: PlaneClient,
    execution_id: str,
    offset: int,
    text: LogText,
    write: Callable[[Piece], None],
    attempt: int | None = None,
) -> None:
    """Print what there is of the log from `offset` on. Raises PlaneRefused, PlaneUnreachable or RemoteError."""
    parser = LogParser(offset)
    for data in client.log(execution_id, offset, follow=False, attempt=attempt):
        _print(parser, data, text, write)
    for piece in text.finish():
        write(piece)


def wait_for_end(client: PlaneClient, execution_id: str, attempt: int | None = None) -> Json:
    """The execution once it is final, or the attempt as it is once a later one took its place.

    Raises PlaneRefused or PlaneUnreachable.
    """
    patience = Patience()
    wait_ms = 0  # how it is now, first: whose place was taken has nothing to wait for
    while True:
        try:
            found = client.get(f"/executions/{execution_id}", wait_ms=wait_ms)
            wait_ms = WAIT_MS_MAX
        except PlaneUnreachable as exc:
            patience.spend(exc)
            continue
        patience.renew()
        if attempt is not None and found["start_token"] != attempt:
            return _attempt(client, found, attempt)
        if found["state"] in FINAL_STATES:
            return found


def _attempt(client: PlaneClient, found: Json, attempt: int | None) -> Json:
    """The attempt with this token of an execution that was `found`; without one the current."""
    if attempt is None or found["start_token"] == attempt:
        return found
    every: list[Json] = client.get(f"/executions/{found['id']}/attempts")["attempts"]
    return next(one for one in every if one["start_token"] == attempt)


def _print(parser: LogParser, data: bytes, text: LogText, write: Callable[[Piece], None]) -> None:
    for record in parser.feed(data):
        for piece in text.show(record):
            write(piece)


def _is_complete(client: PlaneClient, execution_id: str, offset: int, attempt: int | None) -> bool:
    found = _attempt(client, client.get(f"/executions/{execution_id}"), attempt)
    log, settlement = found["log"], found["settlement"] or {}
    if found["state"] in FINAL_STATES and settlement.get("log") is None:
        return True  # refused, cancelled, never started or lost: nobody will say where the log ends
    return bool(log["complete"]) and offset >= int(log["end"])


class Patience:
    """How long a follower goes on without an answer."""

    def __init__(self) -> None:
        self._since: float | None = None

    def renew(self) -> None:
        """There was an answer."""
        self._since = None

    def spend(self, exc: PlaneUnreachable) -> None:
        """There was none: wait a little, or raise it again when it has been too long."""
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        if now - self._since > RECONNECT_S_MAX:
            raise exc
        self.pause()

    def pause(self) -> None:
        """Wait a little."""
        time.sleep(RECONNECT_DELAY_S)


@contextmanager
def stop_at_interrupt(stop: Callable[[], None], tell: Callable[[str], None]) -> Iterator[None]:
    """While this lasts the first ^C calls `stop` beside the work under way, the second raises Left."""
    asked = 0

    def interrupted(_signal: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked += 1
        if asked > 1:
            raise Left
        # A read that is under way goes on untouched, so that no byte of output is lost or doubled.
        threading.Thread(target=stop, name="stop", daemon=True).start()
        tell("stopping; ^C again to leave")

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def stop_aside(url: str, token: str, execution_id: str, attempt: int, tell: Callable[[str], None]) -> None:
    """Order the stop of an attempt on a connection of its own."""
    try:
        with PlaneClient(url, token) as client:
            client.post(f"/executions/{execution_id}/stop", {"start_token": attempt})
    except (PlaneRefused, PlaneUnreachable) as exc:
        tell(f"the stop was not ordered: {exc}")


def tell_on_stderr(sentence: str) -> None:
    """A note between the command's own lines."""
    sys.stderr.write(f"\nrunner-control: {sentence}\n")
    sys.stderr.flush()
