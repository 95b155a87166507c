"""What every attack needs: many threads that send, connections that are held open, and a count of the answers.

`attacker.py` is a process of its own, with less of the processor's time than the server and its neighbour: a real attacker brings a
machine of its own. It reads one JSON object, makes what the attack needs, says `ready`, waits for a line, attacks, and prints counts.
"""

import base64
import collections
import http.client
import json
import os
import resource
import socket
import sys
import threading
import time

import system

from client import Answer, form, key

# After a 429. The answer asks for more patience than that.
BACK_OFF = 0.05
SETUP = 20.0


class Attack:
    """Base of all attacks. `draws`: it has images of its own drawn; `trains`: a training of its own runs meanwhile."""

    draws = False
    trains = False

    def __init__(self, ports: list[int], secret: str, file: bytes):
        self.ports, self.key, self.file = ports, secret, file
        self.stop = threading.Event()
        self.lock, self.counts = threading.Lock(), collections.Counter()
        self.local = threading.local()
        self.number = 0
        self.held: list[socket.socket] = []

    # ---- for subclasses

    def setup(self) -> None:
        """Before the neighbour's own time is measured; it must leave nothing at work."""

    def begin(self) -> None:
        """When the attack begins."""

    def workers(self) -> list:
        """Functions that are called again and again, each on a thread of its own."""
        raise NotImplementedError

    def next(self) -> int:
        with self.lock:
            self.number += 1
            return self.number

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1

    def send(self, method: str, path: str, body=None, headers=None, timeout: float = 90.0) -> Answer | None:
        """One request on this thread's connection; None where there is no answer."""
        connection = getattr(self.local, "connection", None)
        if connection is None:
            number = self.next()
            connection = http.client.HTTPConnection("127.0.0.1", self.ports[number % len(self.ports)], timeout=timeout)
            self.local.connection = connection
        sent = {"Authorization": f"Bearer {self.key}", **(headers or {})}
        if isinstance(body, (dict, list)):
            body, sent["Content-Type"] = json.dumps(body).encode(), "application/json"
        try:
            connection.request(method, path, body=body, headers=sent)
            answer = connection.getresponse()
            got = Answer(answer.status, dict(answer.getheaders()), answer.read())
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            self.local.connection = None
            # A refusal before the body has been sent ends the connection: seen from here, a broken pipe.
            self.count(f"none {type(error).__name__}")
            self.stop.wait(BACK_OFF)
            return None
        self.count(f"{got.status} {got.code}".strip())
        if got.status in (429, 503):
            self.stop.wait(BACK_OFF)
        return got

    def register(self, name: str, images: list[bytes], steps: int = 20_000, **more) -> Answer | None:
        fields = [("name", name), ("kind", "style"), ("steps", steps), *more.items()]
        body, content_type = form(fields + [("images", image) for image in images])
        return self.send("POST", "/v1/concepts", body, {"Content-Type": content_type})

    def take(self, name: str, file: bytes) -> Answer | None:
        return self.send("POST", f"/v1/concepts/import?name={name}", file, {"Content-Type": "application/octet-stream"})

    def queue(self, **more) -> Answer | None:
        """A generation that goes on by itself."""
        asked = {"prompt": f"a photo of a dog {self.next()}", **more}
        return self.send("POST", "/v1/generations", asked, {"Prefer": "respond-async"})

    def hold(self, head: str, body: bytes = b"", wait: bool = True) -> socket.socket | None:
        """A connection that stays open after its request; with `wait`, once an answer with 200 has begun."""
        port = self.ports[self.next() % len(self.ports)]
        try:
            connection = socket.create_connection(("127.0.0.1", port), timeout=10)
            connection.settimeout(30)
            connection.sendall(f"{head}\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {self.key}\r\n".encode() + b"\r\n" + body)
            first = connection.recv(256) if wait else b"HTTP/1.1 200"
        except OSError as error:
            self.count(f"none {type(error).__name__}")
            self.stop.wait(BACK_OFF)
            return None
        status = first[9:12].decode(errors="replace") or "none closed"
        if wait:
            self.count(status)
        if status != "200":
            connection.close()
            self.stop.wait(BACK_OFF)
            return None
        with self.lock:
            self.held.append(connection)
        return connection

    # ---- the process

    def run(self, seconds: float) -> dict:
        self.counts.clear()
        self.begin()
        threads = [threading.Thread(target=self.repeat, args=(work,), daemon=True) for work in self.workers()]
        for thread in threads:
            thread.start()
        self.stop.wait(seconds)
        self.stop.set()
        with self.lock:
            held = len(self.held)
            for connection in self.held:
                connection.close()
        return {"counts": dict(self.counts), "held": held}

    def repeat(self, work) -> None:
        while not self.stop.is_set():
            try:
                work()
            except (KeyError, ValueError, TypeError, IndexError) as error:
                self.count(f"attacker {type(error).__name__} {error}")
                self.stop.wait(1)


def lower_priority() -> None:
    """A real attacker has a machine of its own. Where the kernel groups processes by session, nice values are compared within
    a session only, so this process gets a session and lowers that."""
    os.nice(10)
    os.setsid()
    system.lower_session(os.getpid(), 10)


def main(table: dict[str, type[Attack]]) -> None:
    lower_priority()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asked = json.loads(sys.stdin.readline())
    attack = table[asked["attack"]](asked["ports"], asked["key"], base64.b64decode(asked["file"]))
    begun = time.monotonic()
    attack.setup()
    print(json.dumps({"ready": time.monotonic() - begun, "setup": dict(attack.counts)}), flush=True)
    sys.stdin.readline()
    print(json.dumps(attack.run(asked["seconds"])), flush=True)
    # Threads may wait for an answer.
    os._exit(0)


__all__ = ["Attack", "SETUP", "form", "key", "main"]
