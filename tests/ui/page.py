"""Shared parts of the UI tests: the server, a browser that records faults, and the checks."""

import contextlib
import json
import os
import re
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from axe_playwright_python.sync_playwright import Axe

ROOT = Path(__file__).resolve().parents[2]
SHOTS = ROOT / "target" / "ui"
# Enough for a training and some images on a loaded machine.
PATIENCE_MS = int(os.environ.get("PATIENCE", 240_000))
STILL = """Promise.allSettled(document.getAnimations()
    .filter((animation) => animation.effect.getTiming().iterations !== Infinity).map((animation) => animation.finished)).then(() => null)"""
SERIOUS = ("serious", "critical")


@contextlib.contextmanager
def running(server: str):
    """Runs the built server on a free port with a new data folder; yields its URL when it is ready."""
    with tempfile.TemporaryDirectory() as folder:
        command = [server, "serve", "--listen", "127.0.0.1:0", "--device", "cpu", "--threads", "2"]
        with open(SHOTS / "server.log", "w") as log:
            process = subprocess.Popen([*command, "--data", folder], stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            for line in process.stdout:
                if found := re.search(r"listening on (http://\S+)", line):
                    break
            else:
                raise AssertionError("the server has not said where it listens; see target/ui/server.log")
            # The page is served immediately; it shows that the model is still loading.
            with urllib.request.urlopen(found[1], timeout=PATIENCE_MS / 1000) as answer:
                assert answer.headers["Content-Type"].startswith("text/html"), answer.headers
            until_ready(found[1])
            yield found[1]
        finally:
            process.terminate()
            process.wait(60)


def until_ready(url: str):
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while True:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5):
                return
        except OSError:
            assert time.monotonic() < deadline, "the server has not become ready"
            time.sleep(0.1)


def close(url: str) -> str:
    """Creates the server's first key, waits until the server requires one, and returns the key."""
    body = json.dumps({"tenant": "default"}).encode()
    request = urllib.request.Request(f"{url}/v1/admin/keys", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE_MS / 1000) as answer:
        secret = json.load(answer)["secret"]
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while True:
        try:
            with urllib.request.urlopen(f"{url}/v1/models", timeout=PATIENCE_MS / 1000):
                assert time.monotonic() < deadline, "the server still lets everybody in"
                time.sleep(0.1)
        except urllib.error.HTTPError as refused:
            assert refused.code == 401, refused
            return secret


class Faults:
    """Collects everything that a user would see in the browser's console."""

    def __init__(self, page):
        self.found = []
        self.expected = []
        page.on("console", lambda message: message.type == "error" and self.add(f"console: {message.text}"))
        page.on("pageerror", lambda error: self.add(f"script: {error}"))
        page.on("requestfailed", self.failed)
        page.on("response", lambda answer: answer.status >= 400 and self.add(f"{answer.status}: {answer.request.method} {answer.url}"))

    def add(self, text):
        if not any(re.search(pattern, text) for pattern in self.expected):
            self.found.append(text)

    def failed(self, request):
        # Requests aborted by the page: a stream after its last event, and requests of a view that is left.
        if request.failure != "net::ERR_ABORTED":
            self.add(f"failed: {request.method} {request.url}: {request.failure}")

    @contextlib.contextmanager
    def expecting(self, *patterns):
        """Messages that match the patterns are expected inside: a rejected form logs a 4xx in the console."""
        self.expected = [*patterns, r"Failed to load resource"]
        yield
        self.expected = []


class Visit:
    """A browser window: its size, its colour scheme, its name in the screenshots."""

    def __init__(self, browser, url, name, size, colours):
        self.name, self.size = name, size
        self.context = browser.new_context(
            base_url=url, viewport={"width": size[0], "height": size[1]}, color_scheme=colours,
            has_touch=size[0] < 700, reduced_motion="no-preference",
        )
        self.page = self.context.new_page()
        # The same timeout as everything else: on two shared cores, a single screenshot has taken more than 30 seconds.
        self.page.set_default_timeout(PATIENCE_MS)
        self.faults = Faults(self.page)
        self.count = 0

    def pictures_are_there(self, selector):
        """Waits until every image is loaded; the page's content security policy blocks `wait_for_function`."""
        # Images below the window are loaded lazily, when they are scrolled into view.
        script = """(selector) => {
            const missing = [...document.querySelectorAll(selector)].find((image) => !image.complete || image.naturalWidth === 0);
            (missing ?? document.body).scrollIntoView();
            return missing === undefined;
        }"""
        deadline = time.monotonic() + PATIENCE_MS / 1000
        while not self.page.evaluate(script, selector):
            assert time.monotonic() < deadline, f"some of `{selector}` have not come"
            self.page.wait_for_timeout(50)

    def shot(self, what):
        """Takes a screenshot, and checks the axe rules and that the page does not scroll horizontally."""
        page = self.page
        self.count += 1
        print(f"{self.name}: {what}", flush=True)
        # Animations are finished before the screenshot and the checks.
        page.evaluate(STILL)
        page.screenshot(path=SHOTS / f"{self.name}-{self.count:02}-{what}.png", full_page=True)
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        if wide > 0:
            self.faults.add(f"{what}: the page is {wide} px wider than the window")
        for finding in Axe().run(page).response["violations"]:
            if finding["impact"] in SERIOUS:
                nodes = "; ".join(node["html"][:140] + " " + json.dumps(node["any"][:1])[:200] for node in finding["nodes"][:3])
                self.faults.add(f"{what}: axe {finding['id']} ({finding['impact']}): {nodes}")


def launch(playwright, chromium, *more):
    # Chromium's sandbox does not run as root.
    arguments = [*more, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    return playwright.chromium.launch(executable_path=chromium, args=arguments)
