"""Following an execution from afar: its output as it comes, across restarts of the control plane, to its one end.

Theory of operation. The log is read from an offset that only moves past whole records which were printed; a broken connection is
opened again at that offset. The log's end is not the execution's: its final state is asked for afterwards.
"""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType, MappingProxyType
from typing import Final

from controlplane.client import WAIT_MS_MAX, Json, LogParser, PlaneClient, PlaneRefused, PlaneUnreachable
from protocol.errors import Reason, RemoteError
from protocol.logselect import CUTS_HEADER, START_HEADER, Wish, read_cuts
from protocol.logtext import Piece, View
from protocol.records import Record
from terminal.logs import LogPrinter

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
    text: View,
    write: Callable[[Piece], None],
    attempt: int | None = None,
) -> None:
    """Print the log from `offset` until it is complete. Raises PlaneRefused, PlaneUnreachable or RemoteError."""

    def show(record: Record) -> None:
        for piece in text.show(record):
            write(piece)

    read_log(client, execution_id, LogParser(offset), show, follow=True, attempt=attempt)
    for piece in text.finish():
        write(piece)


def print_log(
    client: PlaneClient, execution_id: str, wish: Wish, printer: LogPrinter, *, follow: bool, attempt: int | None = None
) -> None:
    """Print what is wished for of the log, with `follow` until it is complete, and how it ended.

    Raises PlaneRefused, PlaneUnreachable or RemoteError.
    """
    parser = LogParser()

    def begun(headers: Mapping[str, str]) -> None:
        start, cuts = headers.get(START_HEADER), headers.get(CUTS_HEADER, "")
        try:
            parser.offset = 0 if start is None else int(start)
            printer.begin(read_cuts(cuts))
        except ValueError as exc:
            raise RemoteError(Reason.BAD_FRAME, "the control plane does not say where the log begins") from exc

    since_ms = None if wish.since_ns is None else wish.since_ns // 1_000_000
    query = {
        "near": wish.offset or None,
        "tail": wish.tail,
        "since_ms": since_ms,
        "stream": None if wish.stream is None else wish.stream.word,
    }
    found = read_log(
        client, execution_id, parser, printer.show, follow=follow, attempt=attempt, begun=begun, query=query
    )
    log, over = found["log"], found["state"] in FINAL_STATES
    closed = over and parser.offset >= int(log["end"])
    if closed and log["short_bytes"]:
        printer.gap(int(log["end"]), int(log["end"]) + int(log["short_bytes"]))
    printer.finish(_fate(found) if closed and (log["complete"] or _has_no_end(found) or log["short_bytes"]) else None)


def read_log(
    client: PlaneClient,
    execution_id: str,
    parser: LogParser,
    show: Callable[[Record], None],
    *,
    follow: bool,
    attempt: int | None = None,
    begun: Callable[[Mapping[str, str]], None] | None = None,
    query: Mapping[str, str | int | None] = MappingProxyType({}),
) -> Json:
    """Read the log from where `parser` is, or from where `query` says; gives the attempt as it was found then.

    Raises PlaneRefused, PlaneUnreachable or RemoteError.
    """
    patience = Patience()
    first = dict(query)

    def located(headers: Mapping[str, str]) -> None:
        # Asked for once: what comes after a broken connection goes on from the offset that was reached.
        if begun is not None and first:
            begun(headers)
        first.clear()

    while True:
        try:
            pieces = client.log(execution_id, parser.offset, follow=follow, attempt=attempt, begun=located, **first)
            for data in pieces:
                patience.renew()
                for record in parser.feed(data):
                    show(record)
            found = attempt_of(client, client.get(f"/executions/{execution_id}"), attempt)
            if not follow or _is_complete(found, parser.offset):
                return found
        except PlaneUnreachable as exc:
            if not follow:
                raise
            patience.spend(exc)
        else:
            patience.pause()
        parser.begin_again()


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
            return attempt_of(client, found, attempt)
        if found["state"] in FINAL_STATES:
            return found


def attempt_of(client: PlaneClient, found: Json, attempt: int | None) -> Json:
    """The attempt with this token of an execution that was `found`; without one the current."""
    if attempt is None or found["start_token"] == attempt:
        return found
    every: list[Json] = client.get(f"/executions/{found['id']}/attempts")["attempts"]
    return next(one for one in every if one["start_token"] == attempt)


def _is_complete(found: Json, offset: int) -> bool:
    log = found["log"]
    if found["state"] in FINAL_STATES and _has_no_end(found):
        return True  # refused, cancelled, never started or lost: nobody will say where the log ends
    return bool(log["complete"] or log.get("short_bytes")) and offset >= int(log["end"])


def _has_no_end(found: Json) -> bool:
    return (found["settlement"] or {}).get("log") is None


def _fate(found: Json) -> Json:
    """How it ended: what was signed, or as much as is known where nothing will be."""
    if found["settlement"] is not None:
        settlement: Json = found["settlement"]
        return settlement
    cause = None if found["reason"] is None else {"kind": found["reason"]}
    return {"verdict": found["verdict"] or found["state"], "cause": cause}


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
