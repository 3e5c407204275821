"""A headless Chromium driven through the pipe of its DevTools protocol: no driver and no network client is needed."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE = 240.0  # seconds; a busy machine without a GPU draws slowly


def chromium() -> str | None:
    """The browser's path, if this machine has one; the variable VISION3DGEN_BROWSER comes first."""
    return os.environ.get("VISION3DGEN_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page in a browser of its own; what it says on its console and what it asks the network for is kept."""

    def __init__(self, profile: Path):
        to_browser, our_end = os.pipe()
        from_browser, their_end = os.pipe()
        command = [
            str(chromium()), "--headless=new", "--no-sandbox", "--remote-debugging-pipe", f"--user-data-dir={profile}",
            "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
        ]  # fmt: skip
        # The protocol is spoken on descriptors 3 and 4 of the browser. High numbers first: none is overwritten.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (to_browser, their_end)]
        self.process = subprocess.Popen(
            command,
            pass_fds=(3, 4),
            preexec_fn=lambda: [os.dup2(end, number) for number, end in enumerate(ends, start=3)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (to_browser, their_end, *ends):
            os.close(end)
        self.sink, self.source = os.fdopen(our_end, "wb", buffering=0), from_browser
        os.set_blocking(from_browser, False)
        self.buffer, self.count, self.session = b"", 0, None
        self.console: list[str] = []
        self.requests: list[str] = []
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.sink.close()
        os.close(self.source)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, method: str, **parameters: Any) -> Any:
        self.count += 1
        message: dict[str, Any] = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.sink.write(json.dumps(message).encode() + b"\0")
        limit = time.monotonic() + PATIENCE
        while True:
            answer = self._next(limit)
            if answer.get("id") == self.count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _next(self, limit: float) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            try:
                part = os.read(self.source, 1 << 20)
            except BlockingIOError:
                if time.monotonic() > limit:
                    raise TimeoutError(f"the browser said nothing in {PATIENCE:g} s") from None
                time.sleep(0.005)
                continue
            if not part:
                raise RuntimeError("the browser has ended")
            self.buffer += part
        line, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(line)
        self._note(message)
        return message

    def _note(self, message: dict[str, Any]) -> None:
        known = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.console.append(json.dumps(known["exceptionDetails"])[:2000])
            case "Runtime.consoleAPICalled" if known["type"] in ("error", "warning", "assert"):
                self.console.append(f"{known['type']}: {json.dumps(known['args'])[:500]}")
            case "Log.entryAdded" if known["entry"]["level"] in ("error", "warning"):
                self.console.append(f"{known['entry']['level']}: {known['entry']['text']}")
            case "Network.requestWillBeSent":
                self.requests.append(known["request"]["url"])

    def open(self, path: Path, width: int, height: int = 900) -> None:
        """Load a file in a window of this size, and wait until its scripts have run."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Page.navigate", url=path.as_uri())
        self.wait("document.readyState === 'complete' && document.body.dataset.ready === 'yes'")

    def evaluate(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(json.dumps(result["exceptionDetails"])[:2000])
        return result["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until a condition of the page holds; TimeoutError names it."""
        limit = time.monotonic() + PATIENCE
        while not self.evaluate(f"Boolean({condition})"):
            if time.monotonic() > limit:
                raise TimeoutError(f"{condition} did not come true in {PATIENCE:g} s; console: {self.console}")
            time.sleep(0.05)

    def drag(self, x: float, y: float, dx: float, dy: float, steps: int = 6) -> None:
        """With the left button, from a place of the window by so many pixels."""
        press = {"button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.call("Input.dispatchMouseEvent", type="mousePressed", x=x, y=y, **press)
        for i in range(1, steps + 1):
            place = {"x": x + dx * i / steps, "y": y + dy * i / steps}
            self.call("Input.dispatchMouseEvent", type="mouseMoved", buttons=1, **place)
            time.sleep(0.03)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", x=x + dx, y=y + dy, **press)

    def screenshot(self, *, whole: bool = False) -> bytes:
        """PNG of the window, or of the whole page."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"])
