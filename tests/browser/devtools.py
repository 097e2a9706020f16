"""A headless Chromium driven over its DevTools socket: start, open a page, run script in it, listen, take pictures."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp

__all__ = ["Browser", "PageError", "find_chromium"]

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--disable-extensions", "--mute-audio",
    "--remote-debugging-port=0", "--window-size=2200,1250",
)  # fmt: skip
START_SECONDS = 30
CALL_SECONDS = 60
LARGEST_MESSAGE = 256 * 1024 * 1024


def find_chromium() -> str | None:
    """CHROMIUM, or the browser's usual names on PATH."""
    named = os.environ.get("CHROMIUM")
    return named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class PageError(AssertionError):
    """Script in the page threw."""


class Browser:
    """`with Browser(executable) as browser: browser.open(url); browser.run("1 + 1")`. One page, one thread.

    `errors` collects what the page logged as an error: uncaught exceptions, console.error and failed requests.
    """

    def __init__(self, executable: str):
        self._executable = executable
        self._loop = asyncio.new_event_loop()
        self._profile = tempfile.mkdtemp(prefix="chromium-")
        self._answers: dict[int, asyncio.Future] = {}
        self._calls = 0
        self.errors: list[str] = []

    def __enter__(self) -> Browser:
        command = [self._executable, *FLAGS, f"--user-data-dir={self._profile}", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self._loop.run_until_complete(self._connect(self._wait_for_port()))
        except BaseException:
            self._end()
            raise
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *exc) -> None:
        self._loop.run_until_complete(self._disconnect())
        self._end()

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._loop.close()
        shutil.rmtree(self._profile, ignore_errors=True)

    def _wait_for_port(self) -> str:
        file = Path(self._profile) / "DevToolsActivePort"
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise RuntimeError(f"{self._executable} ended with status {self._process.returncode}")
            if file.exists() and (lines := file.read_text().splitlines()):
                return lines[0]
            time.sleep(0.05)
        raise RuntimeError(f"{self._executable} opened no DevTools port within {START_SECONDS} s")

    async def _connect(self, port: str) -> None:
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            pages = [page for page in await answer.json() if page["type"] == "page"]
        self._socket = await self._session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=LARGEST_MESSAGE)
        self._reader = asyncio.ensure_future(self._read())

    async def _disconnect(self) -> None:
        self._reader.cancel()
        await self._socket.close()
        await self._session.close()

    async def _read(self) -> None:
        async for frame in self._socket:
            message = json.loads(frame.data)
            if "id" in message:
                self._answers.pop(message["id"]).set_result(message)
            else:
                self._note(message["method"], message["params"])

    def _note(self, event: str, data: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            details = data["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif event == "Runtime.consoleAPICalled" and data["type"] == "error":
            self.errors.append(" ".join(str(item.get("value", item.get("description", ""))) for item in data["args"]))
        elif event == "Log.entryAdded" and data["entry"]["level"] == "error":
            self.errors.append(f"{data['entry']['text']} {data['entry'].get('url', '')}")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One DevTools command and its result."""
        return self._loop.run_until_complete(asyncio.wait_for(self._call(method, parameters), CALL_SECONDS))

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._calls += 1
        number = self._calls
        self._answers[number] = self._loop.create_future()
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        message = await self._answers[number]
        if "error" in message:
            raise PageError(f"{method}: {message['error']['message']}")
        return message["result"]

    def open(self, url: str) -> None:
        self.errors.clear()
        self.call("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """The JSON value of an expression, awaited where it is a promise; PageError where it throws."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True)
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise PageError(details.get("exception", {}).get("description") or details["text"])
        return result["result"].get("value")

    def wait(self, script: str, seconds: float = 20) -> Any:
        """Repeat an expression until it is true in JavaScript's sense; returns its value."""
        end = time.monotonic() + seconds
        while True:
            # An element has no JSON value: its presence is what is asked for.
            found = f"(() => {{ try {{ const v = {script}; return v instanceof Node || v }} catch (error) {{ return null }} }})()"
            value = self.run(found)
            if value:
                return value
            if time.monotonic() > end:
                raise PageError(f"still not true after {seconds} s: {script}\nlogged: {self.errors[-5:]}")
            time.sleep(0.1)

    def click(self, x: float, y: float) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, path: Path, *, quality: int = 85) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = "jpeg" if path.suffix == ".jpg" else "png"
        options = {"quality": quality} if kind == "jpeg" else {}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format=kind, **options)["data"]))
