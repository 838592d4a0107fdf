"""The page of a PTY in a real browser, through the whole system, whose parts die in the middle."""

import json
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio

from tests.support.browser import Browser, Page, browsing
from tests.support.stand import RUNNER, Stand, poll, stand

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]
PROMPT = "ready>"
WINDOW = (900, 500)
Seen = Callable[[str], bool]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    """One browser for all; each test has a tab with storage of its own."""
    async with browsing() as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system(browser: Browser) -> AsyncIterator[Stand]:
    """One plane and one runner for all, where there is a browser."""
    async with stand() as running:
        yield running


class Shown:
    """A PTY on a page."""

    def __init__(self, page: Page, pty: str) -> None:
        self.page = page
        self.pty = pty

    async def rows(self) -> str:
        """What the terminal shows, without what pads it."""
        found: str = await self.page.run(
            "[...document.querySelector('.xterm-rows').children].map(row => row.textContent.trimEnd()).join('\\n').trimEnd()"
        )
        return found.replace("\xa0", " ")

    async def shows(self, text: str, *, times: int = 1) -> str:
        """Wait until it shows this, so often."""
        found: str = await self.page.settled(
            self.rows, lambda rows: rows.count(text) >= times, f"{text!r} on the screen"
        )
        assert found.count(text) == times
        return found

    async def says(self, text: str) -> None:
        """Wait until the line at the top has this word."""
        await self.page.until(f"document.querySelector('header').innerText.includes({json.dumps(text)})", text)

    async def enter(self, line: str) -> None:
        """Type a line."""
        await self.page.type(f"{line}\n")


def token(system: Stand) -> str:
    """The admin token."""
    return (system.home / "plane" / "admin.token").read_text().strip()


async def opened(system: Stand, browser: Browser, *argv: str) -> Shown:
    """A new PTY with a shell, and a page that shows it."""
    body = {
        "runner": RUNNER,
        "argv": list(argv) or ["bash", "--norc"],
        "cwd": str(system.home),
        "env": {"PS1": f"{PROMPT} "},
        "size": {"rows": 24, "cols": 80},
    }
    pty = (await system.post("/ptys", body))["id"]
    page = await browser.page()
    await page.size(*WINDOW)
    await page.open(f"http://127.0.0.1:{system.port}/ui/ptys/{pty}#token={token(system)}")
    shown = Shown(page, pty)
    await shown.says("connected")
    return shown


async def test_one_types_resizes_and_comes_back(system: Stand, browser: Browser) -> None:
    """The PTY has the size of the window and follows it; after a reload the same screen is there, and typing goes on."""
    shown = await opened(system, browser)
    await shown.shows(PROMPT)
    await shown.enter("echo räksmörgås-€-$((40+2)); stty size")
    before = (await shown.shows("räksmörgås-€-42")).splitlines()
    rows, cols = map(int, (await shown.shows(PROMPT, times=2)).splitlines()[2].split())
    assert len(before) < rows and 20 < rows < 40 and 80 < cols < 140
    await shown.page.size(600, 300)
    await shown.enter("clear; stty size")

    def smaller(screen: str) -> bool:
        lines = screen.splitlines()
        return len(lines) == 2 and lines[1].startswith(PROMPT) and int(lines[0].split()[0]) < rows

    found = await shown.page.settled(shown.rows, smaller, "a smaller size")
    assert int(found.split()[1]) < cols
    await shown.page.reload()
    assert await shown.page.settled(shown.rows, lambda screen: screen == found, "the same screen") == found
    await shown.enter("echo again-$((1+1))")
    await shown.shows("again-2")
    assert browser.complaints == []


async def test_a_full_screen_program_is_the_same_after_a_reload(system: Stand, browser: Browser) -> None:
    """Its screen is there again, it goes on, and it gives the terminal back as it was."""
    (system.home / "long.txt").write_text("".join(f"line {number:03}\n" for number in range(200)))
    shown = await opened(system, browser)
    await shown.shows(PROMPT)
    await shown.enter("less long.txt")
    await shown.shows("line 010")
    await shown.page.type(" ")
    full = await shown.page.settled(shown.rows, lambda screen: "line 050" in screen, "the next page")
    await shown.page.reload()
    assert await shown.page.settled(shown.rows, lambda screen: screen == full, "the same screen") == full

    async def back() -> str:
        # It forgets a key that comes while the size of its window changes, which is how it was made to draw.
        await shown.page.type("b")
        return await shown.rows()

    await shown.page.settled(back, lambda screen: "line 010" in screen, "the first page")
    await shown.page.type("q")
    await shown.shows(PROMPT)
    await shown.enter("echo after-$((2+2))")
    assert "line 0" not in await shown.shows("after-4")


async def test_who_only_looks_on_types_nothing(system: Stand, browser: Browser) -> None:
    """The switch turns the keyboard off and says so to all; what others do is seen; switched back, one types again."""
    shown = await opened(system, browser)
    await shown.shows(PROMPT)
    other = Shown(await browser.page(), shown.pty)
    await other.page.size(*WINDOW)
    await other.page.open(f"http://127.0.0.1:{system.port}/ui/ptys/{shown.pty}#token={token(system)}")
    await other.says("2 here, 2 may type")
    await shown.page.run("document.getElementById('readonly').click()")
    await shown.says("connected, read only")
    await other.says("2 here, 1 may type")
    await shown.enter("echo never-$((1+2))")
    await other.enter("echo other-$((2+2))")
    assert "never" not in await shown.shows("other-4")
    await shown.page.run("document.getElementById('readonly').click()")
    await other.says("2 here, 2 may type")
    await shown.page.until("!document.getElementById('status').innerText.includes('read only')", "the keyboard")
    await shown.says("connected")
    await shown.enter("echo mine-$((3+2))")
    assert "never" not in await other.shows("mine-5")


async def test_typing_goes_on_over_a_dead_daemon_and_a_dead_plane(system: Stand, browser: Browser) -> None:
    """What is typed while one of them is dead runs once when it is back, and the page says meanwhile what is wrong."""
    shown = await opened(system, browser)
    await shown.shows(PROMPT)
    await shown.enter("n=1")
    await shown.shows(PROMPT, times=2)
    await system.kill("daemon")
    await shown.says("cannot be reached")
    await shown.enter("n=$((n+1)); echo daemon-$n")
    await system.start_daemon()
    await shown.says("connected")
    await shown.shows("daemon-2")
    await system.kill("daemon")
    await shown.says("cannot be reached")
    await shown.enter("n=$((n+1)); echo sent-$n")
    await system.kill("plane")
    await shown.says("again in")
    await system.start_plane()
    await system.start_daemon()
    await shown.shows("sent-3")
    await system.kill("plane")
    await shown.says("again in")
    await shown.enter("n=$((n+1)); echo held-$n")
    await system.start_plane()
    await shown.shows("held-4")
    await shown.shows("sent-3")
    await shown.enter("exit 7")
    await shown.says("ended with status 7")
    assert "daemon-2" in await shown.rows()


async def test_a_paste_comes_whole_and_an_interrupt_acts_at_once(system: Stand, browser: Browser) -> None:
    """A hundred kilobytes arrive in order, each once; and ^C ends a flood of output that is far ahead of the page."""
    shown = await opened(system, browser)
    await shown.shows(PROMPT)
    await shown.enter("bind 'set enable-bracketed-paste off'; clear; stty -echo; echo on-$((1+1)); cat > pasted")
    await shown.shows("on-2")
    lines = "".join(f"{number:06} äöü\n" for number in range(8_000))
    await shown.page.run(
        "(text => { const data = new DataTransfer(); data.setData('text/plain', text);"
        " document.querySelector('.xterm-helper-textarea').dispatchEvent(new ClipboardEvent('paste',"
        f" {{clipboardData: data, bubbles: true}})); }})({json.dumps(lines)})"
    )

    async def pasted() -> bool:
        return (system.home / "pasted").read_text() == lines

    await poll(pasted, "the paste")
    await shown.page.type("\x04")
    await shown.enter("stty echo; clear; yes flood")
    await shown.page.settled(shown.rows, lambda screen: screen.count("flood\n") > 20, "the flood")
    await shown.page.type("\x03")
    await shown.page.settled(shown.rows, lambda screen: screen.endswith(PROMPT), "the prompt")
    await shown.enter("echo done-$((1+2))")
    await shown.shows("done-3")


async def test_the_token_is_asked_for_and_never_sent_in_an_address(system: Stand, browser: Browser) -> None:
    """A wrong one is asked for again; the right one shows a list, whose links lead on without another question."""
    shown = await opened(system, browser)
    page = await browser.page()
    await page.open(f"http://127.0.0.1:{system.port}/ui/ptys")
    for said in ("wrong", token(system)):
        await page.until("document.getElementById('token')?.matches(':focus')", "the question")
        await page.type(f"{said}\n")
        await page.until(
            "document.getElementById('status').innerText !== '' || !document.getElementById('list').hidden", "a word"
        )
    await page.until(f"document.body.innerText.includes({json.dumps(shown.pty)})", "the list")
    await page.run(f"document.querySelector('a[href$={json.dumps(shown.pty)}]').click()")
    await Shown(page, shown.pty).says("2 here")
    assert await shown.page.run("location.href") == await page.run("location.href")
    assert any("/attach" in url for url in browser.asked) and any("ticket=" in url for url in browser.asked)
    assert [url for url in browser.asked if token(system) in url.partition("#")[0]] == []
