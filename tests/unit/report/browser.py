"""A page in a real headless Chromium, looked at through its DevTools protocol.

python tests/unit/report/browser.py PAGE FOLDER      screenshots at 1400 and 390 px, both schemes
"""

import asyncio
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
# what a script in the page finds wrong; texts must be of 11 pixels
_LOOK = """(() => {
  const width = document.documentElement.clientWidth;
  const beyond = [...document.body.querySelectorAll('*')].filter(e => {
    const box = e.getBoundingClientRect();
    return box.width && box.right > width + 1 && !e.closest('.wide, svg, .skip');
  }).map(e => e.tagName + '.' + e.className).slice(0, 5);
  const named = e => e.getAttribute('aria-label') || e.getAttribute('alt') || e.textContent.trim();
  const mute = [...document.querySelectorAll('img, [role=img], a, summary, figure')]
    .filter(e => !named(e)).map(e => e.outerHTML.slice(0, 80));
  const unreachable = [...document.querySelectorAll('.wide')]
    .filter(e => e.scrollWidth > e.clientWidth && e.tabIndex < 0).length;
  const scale = e => e.getScreenCTM ? Math.hypot(e.getScreenCTM().a, e.getScreenCTM().b) : 1;
  const size = e => parseFloat(getComputedStyle(e).fontSize) * scale(e);
  const small = [...document.body.querySelectorAll('*')].filter(e => size(e) < SMALLEST &&
    [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && e.checkVisibility()
  ).map(e => size(e).toFixed(1) + ' ' + e.textContent.trim()).slice(0, 5);
  return {scroll: document.documentElement.scrollWidth, width, beyond, mute, unreachable, small,
          tiles: [...document.querySelectorAll('.seen img')].map(e => e.clientWidth),
          background: getComputedStyle(document.body).backgroundColor};
})()""".replace("SMALLEST", "10.95")


def find_chromium():
    """Path of a Chromium; None where there is none."""
    named = os.environ.get("MOCE_TEST_CHROMIUM")
    return named or next(filter(None, map(shutil.which, NAMES)), None)


@dataclass
class Look:
    """What was seen of a page: messages of its console, requests, and what `_LOOK` measured."""

    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    found: dict = field(default_factory=dict)
    tab_stops: list[str] = field(default_factory=list)
    screenshot: bytes = b""


class _Session:
    """One page of a browser: commands are answered, events collected."""

    def __init__(self, socket):
        self._socket, self._number, self.look = socket, 0, Look()

    async def send(self, method, **parameters):
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = json.loads((await self._socket.receive(timeout=120)).data)
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def _note(self, event):
        method, said = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            url = said["request"]["url"]
            if not url.startswith(("data:", "about:")):
                self.look.requests.append(url)
        elif method == "Runtime.exceptionThrown":
            self.look.messages.append(str(said["exceptionDetails"].get("text")))
        elif method == "Runtime.consoleAPICalled":
            self.look.messages.append(f"{said['type']}: {said['args']}")
        elif method == "Log.entryAdded":
            self.look.messages.append(f"{said['entry']['level']}: {said['entry']['text']}")


async def _look(address, page, width, scheme, tabs):
    async with aiohttp.ClientSession() as client:
        async with client.get(f"{address}/json/list") as answer:
            [target, *_] = [t for t in await answer.json() if t["type"] == "page"]
        async with client.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            session = _Session(socket)
            for domain in ("Page", "Runtime", "Log", "Network"):
                await session.send(f"{domain}.enable")
            await session.send(
                "Emulation.setDeviceMetricsOverride",
                width=width,
                height=900,
                deviceScaleFactor=1,
                mobile=width < 600,
            )
            await session.send(
                "Emulation.setEmulatedMedia",
                features=[{"name": "prefers-color-scheme", "value": scheme}],
            )
            await session.send("Page.navigate", url=page.resolve().as_uri())
            for _ in range(600):
                ready = await _evaluate(session, "document.readyState")
                if (
                    ready == "complete"
                    and await _evaluate(session, "location.href") != "about:blank"
                ):
                    break
                await asyncio.sleep(0.1)
            session.look.found = await _evaluate(session, _LOOK)
            for _ in range(tabs):
                for kind in ("keyDown", "keyUp"):
                    await session.send(
                        "Input.dispatchKeyEvent", type=kind, key="Tab", windowsVirtualKeyCode=9
                    )
                stop = (
                    "document.activeElement.getAttribute('href') || document.activeElement.tagName"
                )
                session.look.tab_stops.append(await _evaluate(session, stop))
            shot = await session.send("Page.captureScreenshot", captureBeyondViewport=True)
            session.look.screenshot = base64.b64decode(shot["data"])
            await session.send("Page.navigate", url="about:blank")
            return session.look


async def _evaluate(session, expression):
    answer = await session.send("Runtime.evaluate", expression=expression, returnByValue=True)
    return answer["result"].get("value")


class Browser:
    """A headless Chromium; a context manager."""

    def __init__(self):
        self._folder = tempfile.mkdtemp(prefix="moce-chromium-")
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        # whatever the browser itself wants from the network is none of the page's business
        flags += ["--remote-debugging-port=0", "--disable-background-networking", "--no-first-run"]
        self._process = subprocess.Popen(
            [find_chromium(), *flags, f"--user-data-dir={self._folder}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def __enter__(self):
        port, end = Path(self._folder) / "DevToolsActivePort", time.monotonic() + 120
        while not (port.is_file() and len(port.read_text().splitlines()) == 2):
            assert self._process.poll() is None, "Chromium did not start"
            assert time.monotonic() < end, "Chromium opened no port"
            time.sleep(0.1)
        self._address = f"http://127.0.0.1:{port.read_text().splitlines()[0]}"
        return self

    def __exit__(self, *_):
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def look(self, page, *, width, scheme, tabs=0):
        """Open a page `width` pixels wide in a colour scheme, press Tab some times, look at it."""
        return asyncio.run(_look(self._address, page, width, scheme, tabs))


if __name__ == "__main__":
    with Browser() as browser:
        for width in (1400, 390):
            for scheme in ("light", "dark"):
                seen = browser.look(Path(sys.argv[1]), width=width, scheme=scheme)
                path = Path(sys.argv[2]) / f"{width}-{scheme}.png"
                path.write_bytes(seen.screenshot)
                sys.stdout.write(f"{path} {seen.messages} {seen.requests} {seen.found}\n")
