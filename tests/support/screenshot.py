"""A picture of the page of a PTY: `.venv/bin/python -m tests.support.screenshot docs/images/pty-page.png`."""

import asyncio
import sys
from pathlib import Path

from tests.support.browser import browsing
from tests.support.stand import RUNNER, stand

_SHOWN = r"""
tty; stty size
ls -x --color=always /usr/share | head -6
for i in {0..69}; do printf '\e[48;2;%d;%d;%dm ' $((i*3)) $((90+i)) $((255-i*3)); done; printf '\e[m\n'
printf '\e[1mbold\e[m \e[3mitalic\e[m \e[4munderline\e[m  räksmörgås ✓\n'
"""


async def _take(path: Path) -> None:
    async with stand() as system, browsing() as browser:
        token = (system.home / "plane" / "admin.token").read_text().strip()
        body = {
            "runner": RUNNER,
            "argv": ["bash", "--norc"],
            "cwd": str(system.home),
            "env": {"PS1": r"\[\e[32m\]laptop\[\e[m\] $ "},
            "size": {"rows": 24, "cols": 80},
        }
        pty = (await system.post("/ptys", body))["id"]
        pages = [await browser.page() for _ in range(2)]
        for page in pages:
            await page.size(860, 420)
            await page.open(f"http://127.0.0.1:{system.port}/ui/ptys/{pty}#token={token}")
            await page.until("document.querySelector('.xterm-rows')?.innerText.includes('laptop')", "the prompt")
        await pages[1].run("document.getElementById('readonly').click()")
        for number, line in enumerate(_SHOWN.strip().splitlines(), 2):
            await pages[0].type(f"{line}\n")
            prompts = "document.querySelector('.xterm-rows').innerText.split('laptop').length - 1"
            await pages[0].until(f"{prompts} === {number}", "the next prompt")
        await pages[0].until("document.querySelector('header').innerText.includes('2 here, 1 may type')", "the other")
        await pages[0].picture(path)


if __name__ == "__main__":
    asyncio.run(_take(Path(sys.argv[1])))
