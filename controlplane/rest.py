"""The REST side under /v1, as FastAPI routes: read, validate, ask the plane, answer. No decision is made here.

Rule 1: nothing but health, and the files of the pages, answers without the admin token. Rule 2: a body is bounded and strict JSON.
Rule 3: an error names a reason, at most the name of a field, and never repeats a value that was sent.
"""

from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Final, Literal, TypeVar

import structlog
from fastapi import Depends, FastAPI, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.routing import WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from controlplane.errors import Fault, RequestRefused
from controlplane.limits import BODY_BYTES_MAX, IDEMPOTENCY_KEY_CHARS_MAX, LIST_LIMIT, LIST_LIMIT_MAX, WAIT_MS_MAX
from controlplane.pages import PREFIX, routes
from controlplane.plane import ControlPlane
from controlplane.requests import (
    AttachRequest,
    ExecutionRequest,
    InputRequest,
    JoinRequest,
    PtyRequest,
    RemoveRequest,
    RerunRequest,
    SignalRequest,
    StopRequest,
    WorktreeRequest,
)
from controlplane.rows import ExecutionState
from controlplane.store import Idempotency, Reply
from protocol.ids import ID_PATTERN
from protocol.limits import JSON_INT_MAX
from protocol.logselect import CUTS_HEADER, START_HEADER, STREAM_NAMES, Wish, write_cuts
from protocol.wire import Closed

VERSION: Final = "0.1.0"
HEALTH: Final = "/v1/health"
OCTETS: Final = "application/octet-stream"
MOMENT_MS_MAX: Final = 2**63 // 1_000_000
"""The latest time that the clock of a log can say, in ms."""
_BEARER: Final = b"bearer "
_log = structlog.get_logger("controlplane.rest")

Name = Annotated[str, Path(pattern=rf"^{ID_PATTERN.pattern}$")]
NameFilter = Annotated[str | None, Query(pattern=rf"^{ID_PATTERN.pattern}$")]
Limit = Annotated[int, Query(ge=1, le=LIST_LIMIT_MAX)]
WaitMs = Annotated[int, Query(ge=0, le=WAIT_MS_MAX)]
Offset = Annotated[int, Query(ge=0, le=JSON_INT_MAX)]
Token = Annotated[int | None, Query(ge=1, le=JSON_INT_MAX)]
Asked = TypeVar("Asked", bound=Closed)


def _wish(
    near: Annotated[int | None, Query(ge=0, le=JSON_INT_MAX)] = None,
    tail: Annotated[int | None, Query(ge=0, le=JSON_INT_MAX)] = None,
    since_ms: Annotated[int | None, Query(ge=0, le=MOMENT_MS_MAX)] = None,
    stream: Annotated[Literal["stdout", "stderr"] | None, Query()] = None,
) -> Wish | None:
    """Where a log is to begin, when that is not an offset at which a record does: `stream` narrows whose lines `tail` counts."""
    if near is None and tail is None and since_ms is None:
        return None
    since_ns = None if since_ms is None else since_ms * 1_000_000
    return Wish(offset=near or 0, tail=tail, since_ns=since_ns, stream=None if stream is None else STREAM_NAMES[stream])


Wished = Annotated[Wish | None, Depends(_wish)]
Handler = Callable[[Request, Exception], Coroutine[Any, Any, Response]]


def make_app(plane: ControlPlane) -> ASGIApp:
    """The whole application: REST routes and the runners' WebSocket, behind the guard."""
    # The interactive documentation loads its scripts from elsewhere; the schema is enough.
    app = FastAPI(title="control plane", version=VERSION, docs_url=None, redoc_url=None, openapi_url="/v1/openapi.json")
    _add_facts(app, plane)
    _add_executions(app, plane)
    _add_worktrees(app, plane)
    _add_ptys(app, plane)
    app.router.routes.append(WebSocketRoute("/v1/runner", plane.gateway.serve))
    app.router.routes.append(WebSocketRoute("/v1/ptys/{pty}", plane.pty_socket.serve))
    app.router.routes.extend(routes())
    for kind, handler in _HANDLERS.items():
        app.add_exception_handler(kind, handler)
    return Guard(app, plane)


class Guard:
    """Lets a request in by the admin token; runners' sockets authenticate by their own handshake."""

    def __init__(self, app: ASGIApp, plane: ControlPlane) -> None:
        self._app = app
        self._plane = plane

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope."""
        free = scope["type"] != "http" or scope["path"] == HEALTH or scope["path"].startswith(PREFIX)
        if not free and not self._admits(scope):
            refused = _refusal(RequestRefused(Fault.UNAUTHORIZED, "the admin token is wanted: Authorization: Bearer …"))
            refused.headers["WWW-Authenticate"] = "Bearer"
            await refused(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _admits(self, scope: Scope) -> bool:
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(values) != 1 or values[0][: len(_BEARER)].lower() != _BEARER:
            return False
        token: bytes = values[0][len(_BEARER) :]
        return self._plane.keys.is_admin(token.decode("utf-8", "replace"))


def _add_facts(app: FastAPI, plane: ControlPlane) -> None:
    @app.get(HEALTH)
    async def health() -> Any:
        return {"status": "ok", "version": VERSION, "now_ms": plane.now_ms}

    @app.post("/v1/join-tokens", status_code=201)
    async def join_token(request: Request) -> Any:
        wanted, asked = await _asked(request, plane, JoinRequest)
        join = await plane.join_token(wanted.name, dict(wanted.labels), asked=asked)
        return join.model_dump()

    @app.get("/v1/runners")
    async def runners() -> Any:
        return {"runners": [row.model_dump() for row in plane.runners()]}

    @app.get("/v1/runners/{runner}")
    async def one_runner(runner: Name) -> Any:
        return plane.runner(runner).model_dump()

    @app.get("/v1/keys")
    async def keys() -> Any:
        return plane.published_keys()

    @app.get("/v1/receipts/{about}")
    async def receipts(about: Name) -> Any:
        return {"statements": plane.statements(about)}

    @app.get("/v1/events")
    async def events(runner: NameFilter = None, limit: Limit = LIST_LIMIT) -> Any:
        return {"events": plane.events(runner, limit)}


def _add_executions(app: FastAPI, plane: ControlPlane) -> None:
    @app.post("/v1/runners/{runner}/executions", status_code=202)
    async def start(runner: Name, request: Request) -> Response:
        wanted, asked = await _asked(request, plane, ExecutionRequest)
        return _reply(await plane.ask_execution(runner, wanted, asked))

    @app.get("/v1/executions")
    async def executions(
        runner: NameFilter = None, state: ExecutionState | None = None, limit: Limit = LIST_LIMIT
    ) -> Any:
        return {"executions": [row.model_dump() for row in plane.executions(runner, state, limit)]}

    @app.get("/v1/executions/{execution}")
    async def execution(execution: Name, wait_ms: WaitMs = 0) -> Any:
        found = await plane.wait_execution(execution, wait_ms / 1000) if wait_ms else plane.execution(execution)
        return found.model_dump()

    @app.post("/v1/executions/{execution}/stop", status_code=202)
    async def stop(execution: Name, request: Request) -> Response:
        wanted, asked = await _asked(request, plane, StopRequest)
        return _reply(await plane.ask_stop(execution, wanted, asked))

    @app.post("/v1/executions/{execution}/signal", status_code=202)
    async def signal(execution: Name, request: Request) -> Response:
        wanted, asked = await _asked(request, plane, SignalRequest)
        return _reply(await plane.ask_signal(execution, wanted, asked))

    @app.get("/v1/orders/{cmd_id}")
    async def order(cmd_id: Name, wait_ms: WaitMs = 0) -> Any:
        return (await plane.wait_order(cmd_id, wait_ms / 1000)).model_dump()

    @app.post("/v1/executions/{execution}/input")
    async def feed(execution: Name, request: Request) -> Any:
        # Told apart by its offset, not by a key: the same piece again is taken once.
        return (await plane.feed(execution, _parsed(await _body(request), InputRequest))).model_dump()

    @app.get("/v1/executions/{execution}/attempts")
    async def attempts(execution: Name) -> Any:
        return {"attempts": [row.model_dump() for row in plane.attempts(execution)]}

    @app.post("/v1/executions/{execution}/attempts", status_code=202)
    async def rerun(execution: Name, request: Request) -> Response:
        wanted, asked = await _asked(request, plane, RerunRequest)
        return _reply(await plane.ask_rerun(execution, wanted, asked))

    @app.get("/v1/executions/{execution}/log", response_class=StreamingResponse)
    async def log(
        execution: Name,
        wish: Wished,
        offset: Offset = 0,
        follow: Annotated[bool, Query()] = False,
        attempt: Token = None,
    ) -> StreamingResponse:
        end, start, records = await plane.read_log(execution, offset, follow=follow, start_token=attempt, wish=wish)
        headers = {"X-Log-End": str(end), START_HEADER: str(start.offset), CUTS_HEADER: write_cuts(start.cuts)}
        return StreamingResponse(records, media_type=OCTETS, headers=headers)

    @app.get("/v1/executions/{execution}/digests")
    async def digests(execution: Name, attempt: Token = None) -> Any:
        return await plane.digests(execution, attempt)


def _add_ptys(app: FastAPI, plane: ControlPlane) -> None:
    @app.post("/v1/ptys", status_code=202)
    async def open_pty(request: Request) -> Response:
        wanted, asked = await _asked(request, plane, PtyRequest)
        return _reply(await plane.ask_pty(wanted, asked))

    @app.get("/v1/ptys")
    async def ptys(
        runner: NameFilter = None, everything: Annotated[bool, Query(alias="all")] = False, limit: Limit = LIST_LIMIT
    ) -> Any:
        return {"ptys": [row.model_dump() for row in plane.ptys(runner, everything=everything, limit=limit)]}

    @app.get("/v1/ptys/{pty}")
    async def one_pty(pty: Name) -> Any:
        return plane.pty(pty).model_dump()

    @app.post("/v1/ptys/{pty}/close", status_code=202)
    async def close(pty: Name, request: Request) -> Response:
        wanted, asked = await _asked(request, plane, StopRequest)
        return _reply(await plane.ask_close(pty, wanted, asked))

    @app.post("/v1/ptys/{pty}/attach")
    async def attach(pty: Name, request: Request) -> Any:
        # Told apart by the viewer's key: the same one again is the same viewer, with another ticket.
        return (await plane.attach(pty, _parsed(await _body(request), AttachRequest))).model_dump()


def _add_worktrees(app: FastAPI, plane: ControlPlane) -> None:
    @app.post("/v1/runners/{runner}/worktrees", status_code=202)
    async def create(runner: Name, request: Request) -> Response:
        wanted, asked = await _asked(request, plane, WorktreeRequest)
        return _reply(await plane.ask_worktree(runner, wanted, asked))

    @app.get("/v1/worktrees")
    async def worktrees(runner: NameFilter = None, limit: Limit = LIST_LIMIT) -> Any:
        return {"worktrees": [row.model_dump() for row in plane.worktrees(runner, limit)]}

    @app.get("/v1/worktrees/{worktree}")
    async def worktree(worktree: Name, wait_ms: WaitMs = 0) -> Any:
        found = await plane.wait_worktree(worktree, wait_ms / 1000) if wait_ms else plane.worktree(worktree)
        return found.model_dump()

    @app.post("/v1/worktrees/{worktree}/remove", status_code=202)
    async def remove(worktree: Name, request: Request) -> Response:
        wanted, asked = await _asked(request, plane, RemoveRequest)
        return _reply(await plane.ask_removal(worktree, wanted, asked))


async def _asked(request: Request, plane: ControlPlane, model: type[Asked]) -> tuple[Asked, Idempotency]:
    """The body as `model`, and the Idempotency-Key with the digest of all that was asked under it."""
    key = request.headers.get("idempotency-key", "")
    if not 0 < len(key) <= IDEMPOTENCY_KEY_CHARS_MAX or not key.isprintable():
        raise RequestRefused(
            Fault.IDEMPOTENCY_KEY_MISSING, "every POST wants an Idempotency-Key of 1 to 200 characters"
        )
    body = await _body(request)
    wanted = _parsed(body, model)
    return wanted, Idempotency(key=key, request=plane.keys.request_digest(request.url.path.encode() + b"\0" + body))


def _parsed(body: bytes, model: type[Asked]) -> Asked:
    try:
        return model.parse(body or b"{}", BODY_BYTES_MAX)
    except ValueError as exc:
        raise RequestRefused(Fault.BAD_REQUEST, str(exc)[:200]) from None


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for block in request.stream():
        body += block
        if len(body) > BODY_BYTES_MAX:
            raise RequestRefused(Fault.TOO_LARGE, f"a body has at most {BODY_BYTES_MAX} bytes")
    return bytes(body)


def _reply(reply: Reply) -> Response:
    return Response(reply.body, reply.status, media_type="application/json")


def _refusal(refused: RequestRefused) -> JSONResponse:
    return JSONResponse({"error": {"reason": str(refused.reason), "detail": refused.detail}}, refused.status)


async def _on_refused(_request: Request, exc: Exception) -> Response:
    assert isinstance(exc, RequestRefused), "registered for it"
    return _refusal(exc)


async def _on_invalid(_request: Request, exc: Exception) -> Response:
    assert isinstance(exc, RequestValidationError), "registered for it"
    error = exc.errors()[0]
    place = ".".join(str(part) for part in error["loc"] if isinstance(part, str) and part.isidentifier())
    return _refusal(RequestRefused(Fault.BAD_REQUEST, f"{place}: {error['type']}"))


async def _on_http(_request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException), "registered for it"
    reason = Fault.METHOD_NOT_ALLOWED if exc.status_code == 405 else Fault.NOT_FOUND
    return _refusal(RequestRefused(reason))


async def _on_defect(_request: Request, exc: Exception) -> Response:
    _log.error("request.failed", error=type(exc).__name__)
    return _refusal(RequestRefused(Fault.INTERNAL, "a defect of the control plane; its log says more"))


_HANDLERS: Final[dict[type[Exception], Handler]] = {
    RequestRefused: _on_refused,
    RequestValidationError: _on_invalid,
    HTTPException: _on_http,
    Exception: _on_defect,
}
