"""A headless Chromium, driven over its DevTools protocol: pages, their scripts, keys, sizes and pictures."""

import asyncio
import base64
import itertools
import json
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
from websockets.asyncio.client import ClientConnection, connect

WAIT_S = 30.0
"""A bound for whatever a page is to do: generous, since two cores run everything at once."""
POLL_S = 0.05
_NAMES = ("chromium", "chromium-browser", "google-chrome")
_OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-proxy-server",
    "--remote-debugging-port=0",
)


def chromium() -> str:
    """Where it is; skips the test where there is none."""
    for name in _NAMES:
        if (found := shutil.which(name)) is not None:
            return found
    pytest.skip("no Chromium here (Debian: apt-get install chromium)")


class Page:
    """A page in a tab of its own."""

    def __init__(self, browser: "Browser", session: str) -> None:
        self._browser = browser
        self._session = session

    async def call(self, method: str, **params: Any) -> Any:
        """Call a method of the DevTools protocol on this tab."""
        return await self._browser.call(method, params, self._session)

    async def run(self, script: str) -> Any:
        """The value of an expression, or of its promise. Raises AssertionError when it throws."""
        found = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    async def open(self, url: str) -> None:
        """Go to an address."""
        await self.call("Page.navigate", url=url)

    async def reload(self) -> None:
        """Load it anew; what it was is gone when this returns."""
        await self.run("window.before = true")
        await self.call("Page.reload")
        await self.until("!window.before", "the page anew")

    async def until(self, script: str, what: str) -> Any:
        """Wait until an expression is true; gives it."""
        return await self.settled(lambda: self.run(script), bool, what)

    async def settled(self, ask: Callable[[], Awaitable[Any]], holds: Callable[[Any], bool], what: str) -> Any:
        """Ask until the answer `holds`."""
        found = None
        try:
            with anyio.fail_after(WAIT_S):
                while True:
                    # A page that is being left has no answer.
                    with suppress(AssertionError, Refused):
                        found = await ask()
                        if holds(found):
                            return found
                    await anyio.sleep(POLL_S)
        except TimeoutError:
            raise AssertionError(f"{what} did not happen: {found!r}\n{await self._told()}") from None

    async def type(self, text: str) -> None:
        """Press keys: a newline is Enter, a control character its letter with Ctrl."""
        for letter in text:
            pressed: dict[str, Any] = {"key": letter, "text": letter}
            if letter == "\n":
                pressed = {"key": "Enter", "code": "Enter", "text": "\r", "windowsVirtualKeyCode": 13}
            elif letter < " ":
                key = chr(ord(letter) | 0x60)
                code = {"code": f"Key{key.upper()}", "windowsVirtualKeyCode": ord(key.upper())}
                pressed = {"key": key, "modifiers": 2, **code}
            await self.call("Input.dispatchKeyEvent", type="keyDown", **pressed)
            await self.call("Input.dispatchKeyEvent", type="keyUp", key=pressed["key"])

    async def size(self, width: int, height: int) -> None:
        """Give the window another size."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    async def picture(self, path: Path) -> None:
        """Save what it shows, as PNG."""
        found = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(found["data"]))

    async def _told(self) -> str:
        with suppress(AssertionError, Refused):
            return str(await self.run("document.body.innerText"))
        return "(no page)"


class Refused(Exception):
    """The browser did not take a call."""


class Browser:
    """One browser: an empty profile, and a connection to it."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.complaints: list[str] = []
        """What pages wrote on their console as errors, and what they threw and did not catch."""
        self.asked: list[str] = []
        """Every address that pages asked for."""

    async def page(self) -> Page:
        """A new tab, with storage of its own."""
        context = await self.call("Target.createBrowserContext", {})
        target = await self.call(
            "Target.createTarget", {"url": "about:blank", "browserContextId": context["browserContextId"]}
        )
        attached = await self.call("Target.attachToTarget", {"targetId": target["targetId"], "flatten": True})
        page = Page(self, attached["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Network"):
            await page.call(f"{domain}.enable")
        # Keys reach a page only while its window has the focus, and there are many windows.
        await page.call("Emulation.setFocusEmulationEnabled", enabled=True)
        return page

    async def call(self, method: str, params: dict[str, Any], session: str | None = None) -> Any:
        """Call a method of the DevTools protocol. Raises Refused."""
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        said = {"id": number, "method": method, "params": params, **({"sessionId": session} if session else {})}
        await self._socket.send(json.dumps(said))
        with anyio.fail_after(WAIT_S):
            found = await answer
        if "error" in found:
            raise Refused(found["error"]["message"])
        return found["result"]

    async def hear(self) -> None:
        """Take what it says, until the connection ends."""
        async for frame in self._socket:
            said = json.loads(frame)
            if "id" in said:
                answer = self._waiting.pop(said["id"])
                if not answer.done():
                    answer.set_result(said)
            elif said["method"] == "Runtime.exceptionThrown":
                self.complaints.append(str(said["params"]["exceptionDetails"]))
            elif said["method"] == "Log.entryAdded" and said["params"]["entry"]["level"] == "error":
                self.complaints.append(said["params"]["entry"]["text"])
            elif said["method"] == "Network.requestWillBeSent":
                self.asked.append(said["params"]["request"]["url"])
            elif said["method"] == "Network.webSocketCreated":
                self.asked.append(said["params"]["url"])


@asynccontextmanager
async def browsing() -> AsyncIterator[Browser]:
    """Start a browser. Skips the test where there is none."""
    program = chromium()
    profile = Path(tempfile.mkdtemp(prefix="runner-browser-"))
    process = await asyncio.create_subprocess_exec(
        program,
        *_OPTIONS,
        f"--user-data-dir={profile}",
        env={**os.environ, "HOME": str(profile)},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        async with connect(await _address(profile), compression=None, max_size=None, proxy=None) as socket:
            browser = Browser(socket)
            hearing = asyncio.ensure_future(browser.hear())
            try:
                yield browser
            finally:
                hearing.cancel()
                with suppress(asyncio.CancelledError):
                    await hearing
    finally:
        # It is many processes: they are a session of their own.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        shutil.rmtree(profile, ignore_errors=True)


async def _address(profile: Path) -> str:
    """Where it listens: it writes that into its profile once it does."""
    place = profile / "DevToolsActivePort"
    with anyio.fail_after(WAIT_S):
        while not (place.exists() and (lines := place.read_text().split())[1:]):
            await anyio.sleep(POLL_S)
    return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
