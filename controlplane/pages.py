"""The pages for people, under /ui: files that are the same for everybody, so they need no token; the program in them asks for it.

Rule 1: what is served is in a table; no path of a request ever becomes a path of a file. Rule 2: nothing comes from elsewhere, and
nothing is framed: the header of each answer says so to the browser.
"""

import hashlib
from functools import cache, partial
from pathlib import Path
from typing import Final, NamedTuple

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

PREFIX: Final = "/ui/"
_PLACE: Final = Path(__file__).with_name("ui")
_HTML: Final = "text/html; charset=utf-8"
_FILES: Final = {
    "adapter.js": "text/javascript; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "vendor/addon-fit.mjs": "text/javascript; charset=utf-8",
    "vendor/xterm.css": "text/css; charset=utf-8",
    "vendor/xterm.mjs": "text/javascript; charset=utf-8",
    "viewer.js": "text/javascript; charset=utf-8",
}
_HEADERS: Final = {
    # xterm.js makes style elements for its colours and cells.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Asked for again each time, and answered with 304: a page is never older than its control plane.
    "Cache-Control": "no-cache",
}


class _File(NamedTuple):
    content: bytes
    etag: str


def routes() -> list[Route]:
    """What is served under PREFIX: pages, and the files that they name."""
    page = partial(_serve, "page.html", _HTML)
    found = [Route(f"{PREFIX}ptys", page), Route(f"{PREFIX}ptys/{{pty}}", page)]
    for name, media_type in _FILES.items():
        found.append(Route(f"{PREFIX}files/{name.rpartition('/')[2]}", partial(_serve, name, media_type)))
    return found


async def _serve(name: str, media_type: str, request: Request) -> Response:
    file = _file(name)
    headers = {**_HEADERS, "ETag": file.etag}
    if file.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=media_type)


@cache
def _file(name: str) -> _File:
    """A file of ours, read once."""
    content = (_PLACE / name).read_bytes()
    return _File(content, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
