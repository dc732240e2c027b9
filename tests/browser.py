"""A headless Chromium that says what a page did: its console, its errors, its requests.

Spoken to in the DevTools protocol over a pair of pipes, a message a null byte:
https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import fcntl
import functools
import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from typing import Any

BINARIES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_PATIENCE = 60.0
"""Seconds a call may take: a busy machine is slow."""

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
    *("--disable-dev-shm-usage", "--disable-extensions", "--disable-background-networking"),
    *("--remote-debugging-pipe", "--force-color-profile=srgb"),
)


@functools.cache
def binary() -> str | None:
    """Chromium's program, where there is one."""
    return next((found for name in BINARIES if (found := shutil.which(name))), None)


@dataclass
class Page:
    """A page that was opened, and what it did."""

    browser: Browser
    session: str
    console: list[str] = field(default_factory=list)
    """What it wrote to the console, its errors, and what the browser complains of: violations of
    its content security policy among them."""
    requests: list[str] = field(default_factory=list)
    """What it asked for, itself aside."""

    def call(self, method: str, **parameters: Any) -> Any:
        """A call of the protocol."""
        return self.browser.call(method, parameters, self.session)

    def run(self, expression: str) -> Any:
        """The value of JavaScript in the page."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press a key: its name, its number, what it writes."""
        about = {"key": key, "code": key, "windowsVirtualKeyCode": code, "text": text}
        self.call("Input.dispatchKeyEvent", type="keyDown", **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def show(self, width: int, height: int = 900, *, dark: bool = False) -> None:
        """Give the window a size, and the system a colour scheme."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, file: Path) -> None:
        """The whole page as a PNG."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=self._all())
        file.write_bytes(base64.b64decode(answer["data"]))

    def _all(self) -> dict[str, Any]:
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}


class Browser:
    """Chromium behind two pipes."""

    def __init__(self, reads: int, writes: int) -> None:
        self._out = os.fdopen(writes, "wb", buffering=0)
        self._in = os.fdopen(reads, "rb")
        self._calls = 0
        self._answers: dict[int, Queue[Any]] = {}
        self._loaded: dict[str, threading.Event] = {}
        self._pages: dict[str, Page] = {}
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def open(self, url: str, *, javascript: bool = True) -> Page:
        """Open a page, and wait until it has loaded."""
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        attached = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})
        session = attached["sessionId"]
        page = self._pages[session] = Page(self, session)
        loaded = self._loaded[session] = threading.Event()
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.call("Emulation.setScriptExecutionDisabled", value=not javascript)
        loaded.clear()
        page.call("Page.navigate", url=url)
        assert loaded.wait(_PATIENCE), "the page did not load"
        page.call("Runtime.evaluate", expression="0")  # what came before has been heard by now
        return page

    def call(self, method: str, parameters: Mapping[str, Any], session: str | None = None) -> Any:
        """A call of the protocol, and its result."""
        self._calls += 1
        number = self._calls
        answer = self._answers[number] = Queue()
        message = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        self._out.write(json.dumps(message).encode() + b"\0")
        try:
            found = answer.get(timeout=_PATIENCE)
        except Empty:
            raise TimeoutError(f"{method}: no answer in {_PATIENCE:g} s") from None
        assert "error" not in found, (method, found.get("error"))
        return found["result"]

    def _listen(self) -> None:
        left = b""
        while chunk := self._in.raw.read(1 << 16):  # type: ignore[attr-defined]
            *messages, left = (left + chunk).split(b"\0")
            for message in map(json.loads, messages):
                if "id" in message:
                    self._answers.pop(message["id"]).put(message)
                elif message.get("sessionId") in self._pages:
                    self._heard(message["sessionId"], message["method"], message["params"])

    def _heard(self, session: str, method: str, about: Any) -> None:
        page = self._pages[session]
        if method == "Page.loadEventFired":
            self._loaded[session].set()
        elif method == "Runtime.consoleAPICalled":
            page.console.append(" ".join(str(one.get("value")) for one in about["args"]))
        elif method == "Runtime.exceptionThrown":
            page.console.append(str(about["exceptionDetails"].get("exception", about)))
        elif method == "Log.entryAdded":
            page.console.append(about["entry"]["text"])
        elif method == "Network.requestWillBeSent" and about["type"] != "Document":
            page.requests.append(about["request"]["url"])

    def close(self) -> None:
        """End the program."""
        self.call("Browser.close", {})
        self._thread.join(_PATIENCE)
        self._out.close()
        self._in.close()


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Start Chromium, with a profile of its own that is gone afterwards."""
    program = binary()
    assert program is not None
    (reads, answers), (commands, writes) = os.pipe(), os.pipe()
    # The program takes commands from descriptor 3 and answers on 4: ours must be neither.
    theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands, answers)]
    for end in (commands, answers):
        os.close(end)
    shell = f'exec "$0" "$@" 3<&{theirs[0]} 4>&{theirs[1]}'
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        started = subprocess.Popen(
            ["bash", "-c", shell, program, *_FLAGS, f"--user-data-dir={profile}"],
            pass_fds=theirs,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in theirs:
            os.close(end)
        browser = Browser(reads, writes)
        try:
            yield browser
            browser.close()
            started.wait(_PATIENCE)
        finally:
            if started.poll() is None:
                started.kill()
                started.wait()
