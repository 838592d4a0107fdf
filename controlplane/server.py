"""The control plane on a port: REST and the runners' WebSocket on uvicorn, for a process of its own or inside another loop."""

import asyncio
import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio
import structlog
import uvicorn
import uvloop

from controlplane.errors import StartRefused
from controlplane.limits import SHUTDOWN_GRACE_S, WS_PING_S
from controlplane.plane import ControlPlane
from controlplane.rest import make_app
from protocol.groups import ungrouped
from protocol.limits import FRAME_BYTES_MAX

LOG_FORMATS: Final = ("json", "console")
_BACKLOG: Final = 1024


@dataclass(frozen=True, slots=True)
class Announcement:
    """Where a control plane listens, and what its first start gave away once."""

    host: str
    port: int
    root_fingerprint: str
    join: str | None
    data_dir: Path


def serve(
    data_dir: Path,
    db: Path,
    host: str,
    port: int,
    *,
    allow_remote: bool,
    log_format: str,
    announce: Callable[[Announcement], None],
    origins: Collection[str] = (),
) -> None:
    """Serve until SIGTERM or SIGINT; pages of `origins` may look at PTYs, beside our own. Raises StartRefused."""
    configure_logging(log_format)
    uvloop.run(_serve(data_dir, db, host, port, allow_remote=allow_remote, announce=announce, origins=origins))


async def _serve(
    data_dir: Path,
    db: Path,
    host: str,
    port: int,
    *,
    allow_remote: bool,
    announce: Callable[[Announcement], None],
    origins: Collection[str],
) -> None:
    refuse_remote(host, allow_remote=allow_remote)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with ControlPlane.open(data_dir, db=db) as plane, run_embedded(plane, host, port) as bound:
        plane.pty_socket.origins = frozenset(origins)
        join = (await plane.join_token()).join if plane.keys.first_start else None
        announce(Announcement(host, bound, plane.keys.root.fingerprint, join, data_dir))
        await stop.wait()


def refuse_remote(host: str, *, allow_remote: bool) -> None:
    """Refuse an address that others can reach: REST has one token and no TLS. Raises StartRefused."""
    if allow_remote or host == "localhost":
        return
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise StartRefused(f"it listens on loopback only, and has no TLS for others: --allow-remote allows {host!r}")


@asynccontextmanager
async def run_embedded(plane: ControlPlane, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[int]:
    """Serve `plane` inside the running loop; yields the port. Raises StartRefused when the port is taken."""
    listener = _listen(host, port)
    bound: int = listener.getsockname()[1]
    plane.set_address(_dialled(host), bound)
    server = _Server(
        uvicorn.Config(
            make_app(plane),
            ws="websockets-sansio",
            ws_max_size=FRAME_BYTES_MAX,
            ws_per_message_deflate=False,
            ws_ping_interval=WS_PING_S,
            ws_ping_timeout=WS_PING_S,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=SHUTDOWN_GRACE_S,
        )
    )
    try:
        with ungrouped():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(server.serve, [listener])
                await server.listening.wait()
                try:
                    yield bound
                finally:
                    plane.end_sessions()
                    server.should_exit = True
    finally:
        listener.close()


class _Server(uvicorn.Server):
    """Signals belong to whoever owns the loop; `listening` is set once connections are accepted."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening: Final = anyio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        self.listening.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def configure_logging(log_format: str) -> None:
    """Structured lines on stderr, as JSON or for a person; what uvicorn has to say goes the same way."""
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer() if log_format == "json" else structlog.dev.ConsoleRenderer()
    )
    structlog.configure(
        processors=[
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
    )
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named, since asyncio sets TCP_NODELAY only where it sees it: else every small answer waits 40 ms for an ack.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as exc:
        listener.close()
        raise StartRefused(f"cannot listen on {host}:{port}: {exc.strerror}") from exc
    return listener


def _dialled(host: str) -> str:
    """The host a runner dials for what we listen on."""
    if host in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host
