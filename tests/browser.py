"""Chromium without a window, driven by its DevTools protocol over two pipes: messages of JSON, each ended by a NUL."""

import base64
import json
import os
import shlex
import shutil
import subprocess

PROGRAM = shutil.which("chromium") or shutil.which("google-chrome") or ""
OPTIONS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]


class Browser:
    """One page. errors: what it has complained of."""

    def __init__(self, folder, size=(900, 620)):
        (theirs_in, self._out), (self._in, theirs_out) = os.pipe(), os.pipe()
        command = [PROGRAM, *OPTIONS, f"--user-data-dir={folder}", "--window-size={},{}".format(*size)]
        redirected = f"exec {shlex.join(command)} 3<&{theirs_in} 4>&{theirs_out}"
        self._process = subprocess.Popen(
            ["bash", "-c", redirected], pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer, self._number, self._session, self.errors = b"", 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def call(self, method, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            found = self._read()
            if found.get("method") == "Runtime.exceptionThrown":
                self.errors.append(found["params"]["exceptionDetails"])
            if found.get("method") == "Log.entryAdded" and found["params"]["entry"]["level"] == "error":
                self.errors.append(found["params"]["entry"]["text"])
            if found.get("id") == self._number:
                assert "error" not in found, found
                return found["result"]

    def _read(self):
        while b"\0" not in self._buffer:
            part = os.read(self._in, 65536)
            assert part, "the browser has ended"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def run(self, script):
        """The value of a script's last promise or expression."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, condition):
        """Waits until it is so, at most 10 seconds."""
        wait = f"(async () => {{ for (let n = 0; n < 200; n++) {{ if ({condition}) return true;"
        assert self.run(wait + " await new Promise((go) => setTimeout(go, 50)); } return false; })()"), condition

    def picture(self):
        """PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])
