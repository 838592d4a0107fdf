"""What a request to the control plane can be refused for; the reason is stable text that clients match on."""

from enum import StrEnum
from http import HTTPStatus


class Fault(StrEnum):
    """Why a request was refused. Stable for ever."""

    BAD_REQUEST = "BAD_REQUEST"
    UNAUTHORIZED = "UNAUTHORIZED"
    NOT_FOUND = "NOT_FOUND"
    METHOD_NOT_ALLOWED = "METHOD_NOT_ALLOWED"
    UNKNOWN_RUNNER = "UNKNOWN_RUNNER"
    UNKNOWN_EXECUTION = "UNKNOWN_EXECUTION"
    UNKNOWN_WORKTREE = "UNKNOWN_WORKTREE"
    WORKTREE_EXISTS = "WORKTREE_EXISTS"
    WORKTREE_NOT_READY = "WORKTREE_NOT_READY"
    UNKNOWN_ATTEMPT = "UNKNOWN_ATTEMPT"
    UNKNOWN_ORDER = "UNKNOWN_ORDER"
    NOT_RUNNING = "NOT_RUNNING"
    BUSY = "BUSY"
    NOT_A_PTY = "NOT_A_PTY"
    DUPLICATE_VIEWER = "DUPLICATE_VIEWER"
    ATTACH_REFUSED = "ATTACH_REFUSED"
    RUNNER_SILENT = "RUNNER_SILENT"
    BAD_TICKET = "BAD_TICKET"
    FOREIGN_ORIGIN = "FOREIGN_ORIGIN"
    NOT_MOVABLE = "NOT_MOVABLE"
    NOT_REPEATABLE = "NOT_REPEATABLE"
    SECRETS_WANTED = "SECRETS_WANTED"
    IDEMPOTENCY_KEY_MISSING = "IDEMPOTENCY_KEY_MISSING"
    IDEMPOTENCY_MISMATCH = "IDEMPOTENCY_MISMATCH"
    TOO_LARGE = "TOO_LARGE"
    TOO_MANY_INTENTS = "TOO_MANY_INTENTS"
    BAD_OFFSET = "BAD_OFFSET"
    STORE_FAILED = "STORE_FAILED"
    INTERNAL = "INTERNAL"


STATUS = {
    Fault.BAD_REQUEST: HTTPStatus.UNPROCESSABLE_ENTITY,
    Fault.UNAUTHORIZED: HTTPStatus.UNAUTHORIZED,
    Fault.NOT_FOUND: HTTPStatus.NOT_FOUND,
    Fault.METHOD_NOT_ALLOWED: HTTPStatus.METHOD_NOT_ALLOWED,
    Fault.UNKNOWN_RUNNER: HTTPStatus.NOT_FOUND,
    Fault.UNKNOWN_EXECUTION: HTTPStatus.NOT_FOUND,
    Fault.UNKNOWN_WORKTREE: HTTPStatus.NOT_FOUND,
    Fault.WORKTREE_EXISTS: HTTPStatus.CONFLICT,
    Fault.WORKTREE_NOT_READY: HTTPStatus.CONFLICT,
    Fault.UNKNOWN_ATTEMPT: HTTPStatus.NOT_FOUND,
    Fault.UNKNOWN_ORDER: HTTPStatus.NOT_FOUND,
    Fault.NOT_RUNNING: HTTPStatus.CONFLICT,
    Fault.BUSY: HTTPStatus.CONFLICT,
    Fault.NOT_A_PTY: HTTPStatus.CONFLICT,
    Fault.DUPLICATE_VIEWER: HTTPStatus.CONFLICT,
    Fault.ATTACH_REFUSED: HTTPStatus.CONFLICT,
    Fault.RUNNER_SILENT: HTTPStatus.GATEWAY_TIMEOUT,
    Fault.BAD_TICKET: HTTPStatus.FORBIDDEN,
    Fault.FOREIGN_ORIGIN: HTTPStatus.FORBIDDEN,
    Fault.NOT_MOVABLE: HTTPStatus.CONFLICT,
    Fault.NOT_REPEATABLE: HTTPStatus.CONFLICT,
    Fault.SECRETS_WANTED: HTTPStatus.CONFLICT,
    Fault.IDEMPOTENCY_KEY_MISSING: HTTPStatus.BAD_REQUEST,
    Fault.IDEMPOTENCY_MISMATCH: HTTPStatus.CONFLICT,
    Fault.TOO_LARGE: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    Fault.TOO_MANY_INTENTS: HTTPStatus.TOO_MANY_REQUESTS,
    Fault.BAD_OFFSET: HTTPStatus.UNPROCESSABLE_ENTITY,
    Fault.STORE_FAILED: HTTPStatus.SERVICE_UNAVAILABLE,
    Fault.INTERNAL: HTTPStatus.INTERNAL_SERVER_ERROR,
}


class ControlPlaneError(Exception):
    """The root of this room's errors."""


class RequestRefused(ControlPlaneError):
    """A request that takes no effect; `detail` never repeats what was sent."""

    def __init__(self, reason: Fault, detail: str = "") -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}" if detail else str(reason))

    @property
    def status(self) -> int:
        """The HTTP status that goes with the reason."""
        return int(STATUS[self.reason])


class StoreFailed(RequestRefused):
    """The database did not take a transaction: nothing of it happened."""

    def __init__(self, detail: str) -> None:
        super().__init__(Fault.STORE_FAILED, detail)


class StartRefused(ControlPlaneError):
    """The control plane cannot start here; the text names the file and what to do."""


class AnotherPlane(StartRefused):
    """The data directory is another control plane's."""
