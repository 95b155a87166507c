"""Every way in which a tenant with the scopes `read`, `generate` and `train` can take more than its share, one class each.

`attacks.py` is run by main.py, as a process of its own for each attack: see attacker.py.
"""

import itertools
import json
import random
import socket
import threading
import time

import material
from attacker import BACK_OFF, SETUP, Attack, form, key, main
from neighbour import IMAGE

# To each API process: more than the connections that it accepts.
STREAMS = 1100
WAITS = 600
# `metadata` may have so much.
METADATA = {f"{n:064}": "x" * 512 for n in range(16)}
ENDED = ("succeeded", "failed", "cancelled")


def names(prefix: str):
    return (f"{prefix}-{number}" for number in itertools.count())


class Uploads(Attack):
    """Forms of 190 MiB, images of 40 million pixels, forms that are never completed."""

    trains = True

    def setup(self):
        self.bomb, self.noise = material.bomb(), material.noise()
        self.take("taken", self.file)
        self.names = names("upload")

    def large(self):
        self.register(next(self.names), [self.noise] * 10)

    def junk(self):
        """Ten files that are no images, in a form without a name."""
        body, content_type = form([("images", bytes(19 << 20))] * 10)
        self.send("POST", "/v1/concepts", body, {"Content-Type": content_type})

    def decoded(self):
        self.register(next(self.names), [self.bomb])

    def refused(self):
        """The name is taken, so that nothing of it counts against a quota."""
        self.register("taken", [self.bomb] * 10)

    def open(self):
        """All but the end of a form; then one byte now and then."""
        body, content_type = form([("name", "slow"), ("kind", "style"), *[("images", self.noise)] * 10])
        head = f"POST /v1/concepts HTTP/1.1\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}"
        connection = self.hold(head, body[:-100], wait=False)
        for byte in body[-100:-1]:
            if connection is None or self.stop.wait(5):
                return
            try:
                connection.sendall(bytes([byte]))
            except OSError:
                self.count("none a held form was closed")
                return

    def workers(self):
        return [self.large, self.junk, self.decoded, self.decoded, *[self.refused] * 4, *[self.open] * 4]


class Imports(Attack):
    """Concept files as large as is allowed, and broken ones."""

    def setup(self):
        self.large, self.wordy = material.inflated(self.file), material.wordy(self.file)
        self.broken = material.broken(self.file)
        self.names = names("import")

    def big(self):
        name = next(self.names)
        self.take(name, self.large)

    def small(self):
        name = next(self.names)
        self.take(name, random.choice([self.file, self.wordy]))
        if random.random() < 0.5:
            self.send("DELETE", f"/v1/concepts/{name}")

    def bad(self):
        self.take(next(self.names), random.choice(self.broken))

    def workers(self):
        return [self.big, self.big, self.small, *[self.bad] * 4]


class Streams(Attack):
    """More event streams of one training than there are connections, none of them read."""

    trains = True

    def begin(self):
        made = self.register("streamed", [IMAGE])
        self.training = made.json["training"]["id"] if made is not None and made.status == 202 else "none"

    def stream(self):
        if len(self.held) >= STREAMS * len(self.ports):
            self.stop.wait(0.1)
            return
        self.hold(f"GET /v1/trainings/{self.training}/events HTTP/1.1\r\nAccept: text/event-stream")

    def workers(self):
        return [self.stream] * 8


class Partials(Attack):
    """Event streams of generations with every partial image, half of them not read."""

    draws = True

    def stream(self):
        asked = json.dumps({"prompt": f"a dog {self.next()}", "n": 10, "partial_images": 3}).encode()
        head = "POST /v1/generations HTTP/1.1\r\nAccept: text/event-stream\r\nContent-Type: application/json"
        connection = self.hold(f"{head}\r\nContent-Length: {len(asked)}", asked)
        if connection is None:
            return
        if self.next() % 2:
            self.stop.wait(10)
        else:
            try:
                while not self.stop.is_set() and connection.recv(65536):
                    pass
            except OSError:
                pass
        connection.close()

    def workers(self):
        return [self.stream] * 12


class Waits(Attack):
    """Hundreds of requests that wait for the end of one generation."""

    draws = True
    generation = ""

    def draw(self):
        made = self.queue(n=10)
        if made is None or made.status != 202:
            return
        self.generation = made.json["id"]
        while not self.stop.is_set():
            seen = self.send("GET", f"/v1/generations/{made.json['id']}?wait=60")
            if seen is not None and seen.status == 200 and seen.json["status"] in ENDED:
                return

    def wait(self):
        """Some hundred connections at once on one thread: asked together, then read together."""
        waiting = []
        for _ in range(WAITS // 6):
            if self.stop.is_set() or not self.generation:
                break
            connection = self.hold(f"GET /v1/generations/{self.generation}?wait=60 HTTP/1.1\r\nConnection: close", wait=False)
            if connection is not None:
                waiting.append(connection)
        for connection in waiting:
            try:
                first = connection.recv(4096)
                self.count(f"waited {first[9:12].decode(errors='replace')}")
            except OSError:
                self.count("none a wait was closed")
            with self.lock:
                self.held.remove(connection)
            connection.close()
        self.stop.wait(BACK_OFF)

    def workers(self):
        return [self.draw, *[self.wait] * 6]


class Queue(Attack):
    """As many trainings and generations as the quotas admit, each as large as is allowed."""

    draws = trains = True

    def begin(self):
        self.names = names("queued")

    def train(self):
        self.register(next(self.names), [IMAGE])

    def draw(self):
        self.queue(n=10, priority=100)

    def workers(self):
        return [self.train, self.train, self.draw, self.draw]


class Silent:
    """Takes webhooks and never answers."""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/"
        self.taken = []
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            self.taken.append(self.listener.accept())


class Webhooks(Attack):
    """Webhooks without end for a receiver that takes them and never answers."""

    draws = True

    def setup(self):
        self.silent = Silent()

    def hook(self):
        made = self.queue(webhook_url=self.silent.url)
        if made is not None and made.status == 202:
            self.send("POST", f"/v1/generations/{made.json['id']}/cancel")

    def workers(self):
        return [self.hook] * 4


class Lists(Attack):
    """Every list, every filter, from the first page to the last."""

    def setup(self):
        until = time.monotonic() + SETUP
        for number in range(100):
            made = self.take(f"listed-{number}", self.file)
            if time.monotonic() > until or made is None or made.status == 429:
                break
        for _ in range(50):
            made = self.queue(metadata=METADATA)
            if made is None or made.status != 202:
                break
            self.send("POST", f"/v1/generations/{made.json['id']}/cancel")

    def pages(self):
        path = random.choice([
            "/v1/generations?limit=100",
            "/v1/generations?limit=1",
            f"/v1/generations?limit=100&status={random.choice(ENDED)}",
            "/v1/concepts?limit=100",
            "/v1/concepts?limit=1",
            "/v1/concepts?limit=100&kind=style&status=ready",
            "/v1/concepts?limit=100&kind=subject&status=failed",
            "/v1/trainings?limit=100&status=queued",
            "/v1/trainings?limit=100&concept=listed-1",
            "/v1/models",
        ])
        after = ""
        while not self.stop.is_set():
            answer = self.send("GET", path + after)
            if answer is None or answer.status != 200:
                return
            page = answer.json
            if not page.get("has_more"):
                return
            after = f"&after={page['data'][-1]['id']}"

    def workers(self):
        return [self.pages] * 8


class Prompts(Attack):
    """The longest prompts, with every concept that there is, planned and not drawn."""

    def setup(self):
        self.names, self.prompts = [], material.prompts()
        large = material.inflated(self.file)
        for number in range(24):
            # Where the large file is refused, the small one has to do.
            for file in (large, self.file):
                made = self.take(f"p-{number}", file)
                if made is not None and made.status == 201:
                    self.names.append(f"p-{number}")
                    break
                if made is not None and made.status == 429:
                    return
                large = self.file

    def plan(self):
        asked = {"prompt": random.choice(self.prompts), "concepts": random.choice([self.names, self.names[:8], [], self.names * 40])}
        self.send("POST", "/v1/generations?validate_only=true", asked)

    def nested(self):
        long = 1_000_000
        bodies = [b"[" * long, b'{"a":' * (long // 5), b'{"prompt": "' + b"x" * long + b'"}', b'{"n": ' + b"9" * long + b"}"]
        self.send("POST", "/v1/generations?validate_only=true", random.choice(bodies), {"Content-Type": "application/json"})

    def workers(self):
        return [*[self.plan] * 6, *[self.nested] * 2]


class Cancellations(Attack):
    """Generations that are made, cancelled and some of them deleted, with as much metadata as is allowed."""

    draws = True

    def draw(self):
        made = self.queue(n=10, metadata=METADATA)
        if made is None or made.status != 202:
            return
        self.send("POST", f"/v1/generations/{made.json['id']}/cancel")
        if random.random() < 0.3:
            self.send("DELETE", f"/v1/generations/{made.json['id']}")

    def workers(self):
        return [self.draw] * 6


class Retries(Attack):
    """A training that is cancelled and begun again."""

    trains = True
    training = ""

    def again(self):
        if not self.training:
            made = self.register("retried", [IMAGE])
            if made is None or made.status != 202:
                return
            self.training = made.json["training"]["id"]
        self.send("POST", f"/v1/trainings/{self.training}/cancel")
        self.send("POST", f"/v1/trainings/{self.training}/retry")

    def workers(self):
        return [self.again]


class Idempotent(Attack):
    """Answers with images in them, each kept for its own idempotency key."""

    draws = True

    def draw(self):
        asked = {"prompt": f"a dog {self.next()}", "n": random.choice([1, 10]), "response_format": "b64_json", "output_format": "png"}
        self.send("POST", "/v1/images/generations", asked, {"Idempotency-Key": key()})

    def workers(self):
        return [self.draw] * 16


class Previews(Attack):
    """Files in a loop, and by clients that do not read them."""

    def setup(self):
        self.paths = ["/v1/concepts/seen/weights", "/v1/concepts/seen/images/0", "/v1/concepts/seen/versions"]
        made = self.register("seen", [material.noise(4)], steps=4)
        if made is None or made.status != 202:
            return
        until = time.monotonic() + SETUP
        while time.monotonic() < until:
            training = self.send("GET", f"/v1/trainings/{made.json['training']['id']}")
            if training is not None and training.status == 200 and training.json["status"] in ENDED:
                self.paths += [preview["url"] for preview in training.json["previews"]]
                return
            time.sleep(0.3)

    def read(self):
        self.send("GET", random.choice(self.paths))

    def ignore(self):
        if len(self.held) > 200:
            self.stop.wait(0.1)
            return
        self.hold(f"GET {self.paths[1]} HTTP/1.1")

    def workers(self):
        return [*[self.read] * 6, *[self.ignore] * 2]


class Versions(Attack):
    """Trains again, and switches between versions that are drawn with."""

    draws = trains = True

    def setup(self):
        self.take("switched", self.file)
        self.register("trained", [IMAGE], steps=1)

    def retrain(self):
        self.send("POST", "/v1/concepts/trained/trainings", {})
        self.stop.wait(BACK_OFF)

    def switch(self):
        self.send("PATCH", "/v1/concepts/trained", {"version": random.choice([1, 2, 3]), "metadata": METADATA})

    def draw(self):
        self.send("POST", "/v1/generations", {"prompt": "a dog", "concepts": [random.choice(["trained", "switched"])]})

    def workers(self):
        return [self.retrain, *[self.switch] * 4, *[self.draw] * 2]


ATTACKS = {
    "uploads": Uploads,
    "imports": Imports,
    "streams": Streams,
    "partials": Partials,
    "waits": Waits,
    "queue": Queue,
    "webhooks": Webhooks,
    "lists": Lists,
    "prompts": Prompts,
    "cancellations": Cancellations,
    "retries": Retries,
    "idempotent": Idempotent,
    "previews": Previews,
    "versions": Versions,
}

if __name__ == "__main__":
    main(ATTACKS)
