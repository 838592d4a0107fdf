"""The pages for people: what is served without a token, and what never is."""

import hashlib
import re
from pathlib import Path

import anyio
import pytest

from controlplane import pages
from tests.support.control_plane import running

pytestmark = pytest.mark.slow
VENDOR = Path(pages.__file__).with_name("ui") / "vendor"


async def test_the_pages_and_all_that_they_name_are_served_to_anybody(tmp_path: Path) -> None:
    """From the page through every file it loads: each is there, of its type, and closed to everything from elsewhere."""
    async with running(tmp_path) as cp:
        cp.http.headers.pop("Authorization")
        todo, seen = ["/ui/ptys", "/ui/ptys/ex_1"], dict[str, str]()
        while todo:
            path = todo.pop()
            answer = await cp.http.get(path)
            assert answer.status_code == 200, path
            seen[path] = answer.headers["content-type"].partition(";")[0]
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; script-src 'self';") and "frame-ancestors 'none'" in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["referrer-policy"] == "no-referrer"
            named = re.findall(r'(?:href|src)="(/ui/files/[^"]+)"', answer.text if path.startswith("/ui/ptys") else "")
            named += [f"/ui/files/{name}" for name in re.findall(r'^import .* from "\./([^"]+)"', answer.text, re.M)]
            todo += [name for name in named if name not in seen]
        assert set(seen.values()) == {"text/html", "text/javascript", "text/css", "image/svg+xml"}
        assert {"/ui/files/xterm.mjs", "/ui/files/adapter.js"} <= seen.keys()


async def test_a_file_that_is_had_is_not_sent_again(tmp_path: Path) -> None:
    """304 for its tag, and the whole for another."""
    async with running(tmp_path) as cp:
        first = await cp.http.get("/ui/files/xterm.mjs")
        tag = first.headers["etag"]
        again = await cp.http.get("/ui/files/xterm.mjs", headers={"If-None-Match": tag})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        other = await cp.http.get("/ui/files/xterm.mjs", headers={"If-None-Match": '"other"'})
        assert (other.status_code, other.content) == (200, first.content)
        assert first.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize(
    "path",
    [
        "/ui/files/",
        "/ui/files/page.html",
        "/ui/files/README.md",
        "/ui/files/vendor/xterm.mjs",
        "/ui/files/../pages.py",
        "/ui/files/%2e%2e/pages.py",
        "/ui/files/..%2fpages.py",
        "/ui/files/vendor%2fREADME.md",
        "/ui/files/page.js%00",
        "/ui//etc/passwd",
        "/ui/../v1/runners",
        "/ui/%2e%2e/v1/runners",
        "/ui/ptys/a/b",
    ],
)
async def test_nothing_else_is_there(tmp_path: Path, path: str) -> None:
    """What is not in the table is not found, however it is spelled; and no way round leads under /v1."""
    # As it stands: an HTTP client would tidy it up.
    async with running(tmp_path) as cp, await anyio.connect_tcp("127.0.0.1", cp.port) as stream:
        await stream.send(f"GET {path} HTTP/1.0\r\nHost: 127.0.0.1:{cp.port}\r\n\r\n".encode())
        answer = b"".join([block async for block in stream])
        assert answer.startswith(b"HTTP/1.1 404") and b"NOT_FOUND" in answer


async def test_the_pages_are_only_read(tmp_path: Path) -> None:
    """And everything beside them still wants the token."""
    async with running(tmp_path) as cp:
        cp.http.headers.pop("Authorization")
        assert (await cp.http.post("/ui/ptys")).status_code == 405
        for path in ("/ui", "/uix/ptys", "/v1/ptys"):
            assert (await cp.http.get(path)).status_code == 401


def test_what_is_not_ours_is_as_its_authors_built_it() -> None:
    """The sums in its README are those of the files, and no source map is asked for."""
    listed = dict(re.findall(r"\[([\w.-]+)\]\(\1\).*`([0-9a-f]{64})`", (VENDOR / "README.md").read_text()))
    there = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in VENDOR.glob("*.[mc]*s")}
    assert listed == there and len(there) == 3
    assert [
        path.name for path in VENDOR.iterdir() if b"sourceMappingURL=" in path.read_bytes() and path.suffix != ".md"
    ] == []
