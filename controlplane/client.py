"""The REST interface of a control plane as its command line uses it: bounded waits, stable errors, idempotent posts."""

import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Final, Self

if "httpx" not in sys.modules:
    # httpx would load a command line of its own, with a library for colours: twice the time of the rest of it.
    sys.modules["httpx._main"] = None  # type: ignore[assignment]
    import httpx

    del sys.modules["httpx._main"]
else:
    import httpx

from protocol.logtext import gap_of
from protocol.records import Record, records

TIMEOUT_S: Final = 15.0
"""One request and its answer on a network that works; a request that waits says for how long and gets that on top."""
WAIT_MS_MAX: Final = 30_000
"""The longest `wait_ms` a control plane takes."""
SILENCE_S_MAX: Final = 60.0
"""A log that is followed is asked for again after this long without a byte: a connection may be dead without a word."""
FEED_WAIT_S: Final = 20.0
"""A control plane waits so long for a stdin to take a piece."""
RETRY_DELAYS_S: Final = (0.1, 0.4, 1.0)
"""A request that met a broken connection is sent again after these: a control plane restarts within a second or two."""

Json = dict[str, Any]


class PlaneRefused(Exception):
    """The control plane said no: `reason` is its stable code."""

    def __init__(self, status: int, reason: str, detail: str) -> None:
        self.status = status
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}" if detail else reason)


class PlaneUnreachable(Exception):
    """No control plane answered; nothing is known of what became of the request."""

    def __init__(self, url: str, detail: str) -> None:
        self.url = url
        self.detail = detail
        super().__init__(f"the control plane at {url} does not answer: {detail}")


class PlaneClient:
    """A connection to a control plane; `with` closes it. Not for use by two threads at once."""

    def __init__(
        self,
        url: str,
        token: str,
        *,
        transport: httpx.BaseTransport | None = None,
        rest: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url = url.rstrip("/")
        self.token = token
        self._rest = rest
        # No proxy of the environment gets to see the admin token.
        self._http = httpx.Client(
            base_url=f"{self.url}/v1",
            headers={"Authorization": f"Bearer {token}"},
            timeout=TIMEOUT_S,
            transport=transport,
            trust_env=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def get(self, path: str, *, wait_ms: int = 0, **query: str | int | None) -> Json:
        """Ask. Raises PlaneRefused or PlaneUnreachable."""
        params = {name: value for name, value in query.items() if value is not None}
        if wait_ms:
            params["wait_ms"] = min(wait_ms, WAIT_MS_MAX)
        return self._send("GET", path, params=params, timeout=TIMEOUT_S + wait_ms / 1000)

    def post(self, path: str, body: Mapping[str, Any]) -> Json:
        """Order something once: a second try after a broken connection carries the same Idempotency-Key.

        Raises PlaneRefused or PlaneUnreachable.
        """
        headers = {"Idempotency-Key": secrets.token_hex(16)}
        return self._send("POST", path, json=dict(body), headers=headers)

    def feed(self, path: str, piece: Mapping[str, Any]) -> Json:
        """Hand over a piece of stdin and wait until it is taken. Raises PlaneRefused or PlaneUnreachable."""
        return self._send("POST", path, json=dict(piece), timeout=TIMEOUT_S + FEED_WAIT_S)

    def log(
        self,
        execution_id: str,
        offset: int,
        *,
        follow: bool,
        attempt: int | None = None,
        begun: Callable[[Mapping[str, str]], None] | None = None,
        **query: str | int | None,
    ) -> Iterator[bytes]:
        """Pieces of the log from `offset` on, with `follow` until it is complete.

        `query` narrows where it begins; `begun` is told the headers of the answer, which say where that is.
        Raises PlaneRefused or PlaneUnreachable.
        """
        given = {"offset": offset, "follow": int(follow), "attempt": attempt, **query}
        params = {name: value for name, value in given.items() if value is not None}
        timeout = httpx.Timeout(TIMEOUT_S, read=SILENCE_S_MAX)
        try:
            with self._http.stream("GET", f"/executions/{execution_id}/log", params=params, timeout=timeout) as answer:
                if answer.is_error:
                    answer.read()
                    raise refusal(answer)
                if begun is not None:
                    begun(answer.headers)
                yield from answer.iter_raw()
        except httpx.TransportError as exc:
            raise PlaneUnreachable(self.url, str(exc) or type(exc).__name__) from exc

    def _send(self, method: str, path: str, **request: Any) -> Json:
        tries = iter(RETRY_DELAYS_S)
        while True:
            try:
                answer = self._http.request(method, path, **request)
                break
            except httpx.TransportError as exc:
                if (delay := next(tries, None)) is None:
                    raise PlaneUnreachable(self.url, str(exc) or type(exc).__name__) from exc
                self._rest(delay)
        if answer.is_error:
            raise refusal(answer)
        try:
            found = answer.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise PlaneUnreachable(self.url, "what answers there is no control plane")
        return found


def refusal(answer: httpx.Response) -> PlaneRefused:
    """What an answer that is an error says."""
    try:
        error = answer.json()["error"]
        return PlaneRefused(answer.status_code, str(error["reason"]), str(error["detail"]))
    except (ValueError, KeyError, TypeError):
        return PlaneRefused(answer.status_code, "INTERNAL", f"HTTP status {answer.status_code} without a reason")


class LogParser:
    """Cuts the bytes of a log into records and knows the offset to go on from after a broken connection."""

    def __init__(self, offset: int = 0) -> None:
        self.offset = offset
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Record]:
        """Whole records at their offsets; `offset` moves as each is taken. Raises RemoteError when the bytes are no log."""
        self._rest += data
        used = 0
        try:
            for record in records(self._rest, 0):
                used = record.end
                at, hole = self.offset, gap_of(record)
                # One that stands for a hole has no place of its own in the log.
                self.offset = at + record.end - record.offset if hole is None else hole[1]
                yield record._replace(offset=at)
        finally:
            self._rest = self._rest[used:]

    def begin_again(self) -> None:
        """Forget a record that was cut off with its connection."""
        self._rest = b""
