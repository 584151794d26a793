"""Headless Chromium, for the tests of the two pages."""

import base64
import io
import json
import os
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

NAMES = "chromium", "chromium-browser", "google-chrome"
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
FLAGS += "--disable-background-networking --disable-component-update --disable-sync "
FLAGS += "--remote-debugging-pipe --window-size=1100,1100"

needed = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")


class Browser:
    """A page of Chromium, driven through its own pipe: JSON, a zero byte after each message."""

    def __init__(self, folder):
        (there, self.writing), (self.reading, back) = os.pipe(), os.pipe()
        command = (
            f'exec 3<&{there} 4>&{back}; exec "$0" {FLAGS} --user-data-dir={folder} about:blank'
        )
        self.process = subprocess.Popen(
            ["bash", "-c", command, CHROMIUM], pass_fds=(there, back), stderr=subprocess.DEVNULL
        )
        os.close(there), os.close(back)
        self.rest, self.number, self.session, self.events = b"", 0, None, []
        targets = self("Target.getTargets")["targetInfos"]
        page = next(t["targetId"] for t in targets if t["type"] == "page")
        self.session = self("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]

    def __call__(self, method, **params):
        self.number += 1
        message = dict(id=self.number, method=method, params=params)
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.writing, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                part = os.read(self.reading, 2**20)
                assert part, "Chromium is gone"
                self.rest += part
            told, self.rest = self.rest.split(b"\0", 1)
            answer = json.loads(told)
            if "method" in answer:
                self.events.append(answer)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def js(self, code):
        told = self("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def screenshot(self):
        told = self("Page.captureScreenshot")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(told["data"]))).convert("RGB"))

    def choose(self, name, value):
        self.js(
            f"(() => {{ const x = document.getElementById({name!r}); x.value = {value!r};"
            " x.dispatchEvent(new Event('input', {bubbles: true})) })()"
        )

    def key(self, key):
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, text=key if len(key) == 1 else "")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.process.kill()
    browser.process.wait()
