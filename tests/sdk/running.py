"""A real server process with the pocket model, and its clients."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import openai
import pytest
import requests

sys.dont_write_bytecode = True
ROOT = pathlib.Path(__file__).resolve().parents[2]
#: Upper bound for everything in these tests, on a loaded machine.
PATIENCE_SECONDS = 240


def poll(what: str, look):
    """Calls `look` until it returns a result."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (found := look()) is None:
        assert time.monotonic() < deadline, f"{what} did not happen in time"
        time.sleep(0.05)
    return found


class Server:
    """`coar serve` on a free port."""

    def __init__(self, data: pathlib.Path, *flags: str):
        self.data = data
        self.flags = flags
        self.process: subprocess.Popen | None = None
        self.url = ""
        self.key = "none"

    @staticmethod
    def program() -> str:
        return str((ROOT / os.environ.get("COAR_BIN", "target/debug/coar")).resolve())

    def start(self) -> "Server":
        command = [self.program(), "serve", "--listen", "127.0.0.1:0", "--device", "cpu", "--data", str(self.data)]
        with open(self.data.parent / f"{self.data.name}.log", "ab") as log:
            self.process = subprocess.Popen([*command, *self.flags], stdout=subprocess.PIPE, stderr=log, text=True)
        for line in self.process.stdout:
            if found := re.search(r"listening on (http://\S+)", line):
                self.url = found[1]
                break
        assert self.url, "the server has not started"
        poll("readiness", lambda: True if requests.get(f"{self.url}/readyz", timeout=10).ok else None)
        return self

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(PATIENCE_SECONDS) == 0

    def make_key(self, tenant: str, scopes: str = "read,generate,train") -> str:
        command = [self.program(), "keys", "create", "--tenant", tenant, "--scopes", scopes, "--data", str(self.data)]
        made = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=True)
        return re.search(r"coar_[A-Za-z0-9]{8}_[\w-]{43}", made.stdout)[0]

    def client(self, **more) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=more.pop("api_key", self.key), timeout=300, **more)

    def http(self, method: str, path: str, **more) -> requests.Response:
        headers = more.pop("headers", {}) | {"Authorization": f"Bearer {self.key}"}
        return requests.request(method, self.url + path, headers=headers, timeout=60, **more)

    def metric(self, name: str) -> float:
        """One sample of /metrics."""
        text = requests.get(f"{self.url}/metrics", timeout=10).text
        return next(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name + " "))

    def register(self, name: str, steps: int) -> dict:
        """Registers the shipped subject's images, with a short training."""
        files = sorted((ROOT / "concepts" / "rex").glob("*.png"))[:3]
        images = [("images", (file.name, file.read_bytes(), "image/png")) for file in files]
        form = {"name": name, "kind": "subject", "class": "cat", "steps": str(steps)}
        answer = self.http("POST", "/v1/concepts", data=form, files=images)
        assert answer.status_code == 202, answer.text
        return answer.json()

    def until_ready(self, name: str) -> None:
        def look():
            concept = self.http("GET", f"/v1/concepts/{name}").json()
            assert concept["status"] in ("training", "ready"), concept
            return True if concept["status"] == "ready" else None

        poll(f"the training of {name}", look)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A server without keys: every caller is the tenant `default`."""
    running = Server(tmp_path_factory.mktemp("coar") / "data").start()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def rex(server):
    """A trained concept."""
    server.register("rex", steps=4)
    server.until_ready("rex")
    return "rex"


@pytest.fixture
def client(server):
    return server.client(max_retries=0)
