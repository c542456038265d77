"""A headless Chromium driven over WebDriver's plain HTTP (W3C WebDriver), as little of it as the tests need."""

import base64
import json
import shutil
import socket
import subprocess
import time
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
DRIVER = shutil.which("chromedriver")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
KEYS = {"left": "\ue012", "up": "\ue013", "right": "\ue014", "down": "\ue015", "backspace": "\ue003", "home": "\ue011"}


class Browser:
    """One window. Use as a context; `evaluate` runs a function's body in the page."""

    def __init__(self, width: int = 1000, height: int = 800):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.driver = subprocess.Popen([str(DRIVER), f"--port={port}"], **quiet)
        self.address = f"http://127.0.0.1:{port}"
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        options = {"binary": CHROMIUM, "args": [*arguments, f"--window-size={width},{height}"]}
        asked = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        try:
            self._until_ready()
            session = self.call("POST", "/session", {"capabilities": {"alwaysMatch": asked}})
        except BaseException:
            self.driver.kill()
            raise
        self.address += f"/session/{session['sessionId']}"

    def _until_ready(self, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while True:
            try:
                if self.call("GET", "/status")["ready"]:
                    return
            except (URLError, ConnectionError):
                pass
            if time.monotonic() > end:
                raise TimeoutError("chromedriver does not answer")
            time.sleep(0.05)

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """A WebDriver command's value. RuntimeError with what the driver says where it refuses."""
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = Request(self.address + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from None

    def open(self, url: str) -> None:
        self.call("POST", "/url", {"url": url})

    def evaluate(self, body: str, *arguments: Any) -> Any:
        return self.call("POST", "/execute/sync", {"script": body, "args": list(arguments)})

    def find(self, selector: str) -> str:
        return self.call("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]

    def click(self, selector: str) -> None:
        self.call("POST", f"/element/{self.find(selector)}/click")

    def type(self, selector: str, *keys: str) -> None:
        text = "".join(KEYS.get(key, key) for key in keys)
        self.call("POST", f"/element/{self.find(selector)}/value", {"text": text})

    def label(self, selector: str) -> tuple[str, str]:
        """The role and the name that a screen reader is told."""
        element = self.find(selector)
        role, name = (self.call("GET", f"/element/{element}/computed{what}") for what in ("role", "label"))
        return role, name

    def drag(self, selector: str, start: float, end: float) -> None:
        """Presses at a share of an element's width, moves to another, and lets go."""
        self.evaluate("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector)
        box = self.call("GET", f"/element/{self.find(selector)}/rect")
        origin = {ELEMENT: self.find(selector)}
        moves = [
            {"type": "pointerMove", "origin": origin, "x": round((x - 0.5) * box["width"]), "y": 0, "duration": 50}
            for x in (start, (start + end) / 2, end)
        ]
        down, up = {"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}
        actions = [moves[0], down, *moves[1:], up]
        pointer = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": actions}
        self.call("POST", "/actions", {"actions": [pointer]})

    def cdp(self, command: str, **parameters: Any) -> Any:
        return self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def look(self, width: int, scheme: str = "light") -> None:
        """The page as a screen of that width has it, in light or dark."""
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        self.cdp("Emulation.setDeviceMetricsOverride", **metrics)
        self.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self) -> bytes:
        """The whole page as a PNG."""
        return base64.b64decode(self.cdp("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def complaints(self) -> list[str]:
        """What the page's console said."""
        return [entry["message"] for entry in self.call("POST", "/se/log", {"type": "browser"})]

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.call("DELETE", "")
        finally:
            self.driver.terminate()
            self.driver.wait(10)
