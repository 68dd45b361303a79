"""Real browsers that show webrtc.html, for the tests and for measure.py: Chromium by Playwright, Firefox by Marionette.

A page of either has the same methods: it hosts, joins, says, and tells what stands in its log.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
PAGE = (HERE / "webrtc.html").as_uri()
WAIT = 20       # seconds after which a thing that must happen counts as one that does not
CHROMIUM, FIREFOX, TURNSERVER = map(shutil.which, ("chromium", "firefox-esr", "turnserver"))


def wait_until(condition, seconds=WAIT):
    """What condition() gives once that is something."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)
    return found


@contextlib.contextmanager
def run(*command, **options):
    """A process that ends with the block."""
    process = subprocess.Popen(command, text=True, **options)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(WAIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def run_server(*flags):
    """The server, as a process on a free port, if the flags name none; its URL."""
    command = [sys.executable, HERE.parent / "p2pserver.py", "--port", "0", "--log-level", "warning", *flags]
    with run(*command, stdout=subprocess.PIPE) as process, process.stdout:
        yield re.search(r"http://\S+?(?=/)", process.stdout.readline())[0]


def hears(port):
    """Whether something on this machine takes TCP connections at a port."""
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        return True


@contextlib.contextmanager
def run_turn(secret):
    """A real TURN server, coturn, on a free port of this machine; its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [TURNSERVER, "-n", "--no-cli", "--no-tls", "--no-dtls", "--realm=test", "--use-auth-secret", f"--static-auth-secret={secret}",
               "--listening-ip=127.0.0.1", f"--listening-port={port}", "--allow-loopback-peers", "--log-file=stdout", "--pidfile=/dev/null"]
    with run(*command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        wait_until(lambda: hears(port))
        yield f"turn:127.0.0.1:{port}"


class Page:
    """What both kinds have in common. url: of the rendezvous server."""

    def wait_for(self, line, seconds=WAIT):
        """The match of a regular expression with a whole line of the log, once there is one."""
        return wait_until(lambda: re.search(f"^{line}$", self.log(), re.MULTILINE), seconds)


class ChromiumPage(Page):
    def __init__(self, context, url, address=PAGE):
        self.page = context.new_page()
        self.page.goto(f"{address}#{url}")

    def host(self, name):
        self.page.fill("#title", name)
        self.page.click("text=Host")

    def join(self, name):
        self.page.select_option("#games", name)     # Playwright waits until the list has it
        self.page.click("text=Join")

    def say(self, line):
        self.page.fill("#text", line)
        self.page.click("text=Say")

    def log(self):
        return self.page.text_content("#log")

    def tab(self):
        """What the page keeps in sessionStorage."""
        return self.page.evaluate("JSON.parse(sessionStorage.p2pserver)")

    def close(self):
        self.page.close(run_before_unload=False)


class FirefoxPage(Page):
    """Marionette is Firefox's own remote control: JSON over TCP, with WebDriver's commands.

    https://firefox-source-docs.mozilla.org/testing/marionette/Protocol.html
    """

    def __init__(self, port, url):
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._stream = self._socket.makefile("rb")
        self._receive()     # a greeting
        self._command("WebDriver:NewSession")
        self._command("WebDriver:Navigate", url=f"{PAGE}#{url}")

    def _receive(self):
        """A message is its length in decimal, a colon, and JSON."""
        length = b"".join(iter(lambda: self._stream.read(1), b":"))
        return json.loads(self._stream.read(int(length)))

    def _command(self, name, **parameters):
        message = json.dumps([0, 1, name, parameters]).encode()
        self._socket.sendall(b"%d:%s" % (len(message), message))
        _, _, error, result = self._receive()
        assert error is None, error
        return result

    def _script(self, script, *arguments):
        return self._command("WebDriver:ExecuteScript", script=script, args=arguments)["value"]

    def _submit(self, form, field, value):
        """Give a field its value and submit the form. A list may not have the value yet."""
        script = "const [id, value] = arguments, field = document.getElementById(id); field.value = value; return field.value"
        wait_until(lambda: self._script(script, field, value))
        self._script("document.getElementById(arguments[0]).requestSubmit()", form)

    def host(self, name):
        self._submit("hosting", "title", name)

    def join(self, name):
        self._submit("joining", "games", name)

    def say(self, line):
        self._submit("chat", "text", line)

    def log(self):
        return self._script("return document.getElementById('log').textContent")

    def reload(self):
        self._command("WebDriver:Refresh")

    def close(self):
        self._stream.close()
        self._socket.close()


@contextlib.contextmanager
def run_chromium(playwright):
    """A Chromium as people have it, but for the sandbox, which root cannot have."""
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    try:
        yield browser
    finally:
        browser.close()


@contextlib.contextmanager
def run_firefox(url):
    """A page in a Firefox of its own."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        pathlib.Path(folder, "user.js").write_text('user_pref("marionette.port", 0);\n')
        port = pathlib.Path(folder, "MarionetteActivePort")
        command = [FIREFOX, "--headless", "--no-remote", "--marionette", "--profile", folder]
        with run(*command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), contextlib.ExitStack() as stack:
            wait_until(lambda: port.exists() and port.read_text(), 60)
            page = FirefoxPage(int(port.read_text()), url)
            stack.callback(page.close)
            yield page
