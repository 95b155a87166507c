"""Processes and requests for the operations tests."""

import hashlib
import http.client
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
import uuid


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """A running `coar serve`; its output goes to a file."""

    def __init__(self, coar, arguments, env=None, port_flag="--listen"):
        self.port = free_port()
        self.log = f"{os.environ.get('TMPDIR', '/tmp')}/coar-{self.port}.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [coar, "serve", port_flag, f"127.0.0.1:{self.port}", "--threads", "1", *arguments],
                env={**os.environ, **(env or {})}, stdout=log, stderr=log)

    def ready(self, seconds=90):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise SystemExit(f"the server ended with {self.process.returncode}:\n{open(self.log).read()[-3000:]}")
            try:
                if self.request("GET", "/readyz")[0] == 200:
                    return self
            except OSError:
                pass
            time.sleep(0.05)
        raise SystemExit(f"not ready:\n{open(self.log).read()[-3000:]}")

    def request(self, method, path, body=None, headers=None, key=None):
        headers = dict(headers or {})
        if isinstance(body, dict):
            body, headers["Content-Type"] = json.dumps(body), "application/json"
        if key:
            headers["Authorization"] = f"Bearer {key}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        is_json = "json" in (answer.getheader("content-type") or "")
        return answer.status, json.loads(data) if is_json else data

    def get(self, path, key=None):
        status, body = self.request("GET", path, key=key)
        assert status == 200, (path, status, body)
        return body

    def stop(self):
        begun = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(100) == 0, open(self.log).read()[-3000:]
        return time.monotonic() - begun

    def kill(self):
        self.process.kill()
        self.process.wait()


def form(fields, files):
    boundary = uuid.uuid4().hex
    parts = []
    for name, value in fields.items():
        parts.append(f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode())
    for path in files:
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="images"; filename="x.png"\r\n\r\n'
        parts.append(head.encode() + open(path, "rb").read() + b"\r\n")
    parts.append(f"--{boundary}--\r\n".encode())
    return b"".join(parts), {"Content-Type": f"multipart/form-data; boundary={boundary}"}


def register(server, name, steps, key=None, pictures=("concepts/rex/1.png", "concepts/rex/2.png")):
    body, headers = form({"name": name, "kind": "subject", "class": "cat", "steps": steps}, pictures)
    status, concept = server.request("POST", "/v1/concepts", body, headers, key)
    assert status == 202, (status, concept)
    return concept


def wait_concept(server, name, key=None, seconds=120):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        concept = server.get(f"/v1/concepts/{name}", key)
        if concept["status"] == "ready":
            return concept
        assert concept["status"] == "training", concept
        time.sleep(0.1)
    raise SystemExit(f"{name} is not trained")


def draw(server, prompt, seed, key=None):
    """The image's bytes and the path of its URL."""
    body = {"prompt": prompt, "seed": seed, "response_format": "url"}
    status, answer = server.request("POST", "/v1/images/generations", body, key=key)
    assert status == 200, (status, answer)
    path = "/" + answer["data"][0]["url"].split("/", 3)[3]
    status, picture = server.request("GET", path)
    assert status == 200, (path, status)
    return picture, path


def pixels_hash(picture):
    return hashlib.sha256(picture).hexdigest()


def run(coar, *arguments, env=None, fails=False):
    done = subprocess.run([coar, *arguments], env={**os.environ, **(env or {})}, capture_output=True, text=True)
    assert (done.returncode != 0) == fails, (arguments, done.returncode, done.stdout, done.stderr)
    return done.stdout + done.stderr


def said(what):
    print(f"ok    {what}", flush=True)
