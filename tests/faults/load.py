"""The clients, and the ledger of everything that was acknowledged to them."""

import collections
import hashlib
import http.client
import json
import random
import threading
import time

from client import Client, form, key

# Training steps: few, so that a training takes seconds.
STEPS = 4


class Ledger:
    """What was acknowledged: by a 2xx response or an event that a client has read completely."""

    def __init__(self):
        self.lock = threading.RLock()
        self.generations: dict[str, dict] = {}
        self.concepts: dict[str, dict] = {}
        # By the client's own identifier of a request, which is in its metadata: each must be executed once.
        self.requests: dict[str, dict] = {}
        self.retrainings: dict[str, int] = collections.Counter()  # by the concept's id
        self.counts: dict[str, int] = collections.Counter()
        self.surprises: list[str] = []

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1

    def surprise(self, what: str) -> None:
        with self.lock:
            self.surprises.append(what)

    def generation(self, body: dict, tenant: str, asked: dict) -> None:
        """Records a generation object that a client has read."""
        with self.lock:
            known = self.generations.setdefault(body["id"], {"tenant": tenant, "asked": asked, "images": {}, "ended": None})
            if body["status"] not in ("queued", "running"):
                if known["ended"] not in (None, body["status"]):
                    self.surprise(f"{body['id']} ended twice: {known['ended']}, {body['status']}")
                known["ended"] = body["status"]
                known["error"] = body["error"]
            for image in body["images"]:
                self.image(body["id"], image)

    def image(self, generation: str, image: dict) -> None:
        with self.lock:
            images = self.generations[generation]["images"]
            before = images.setdefault(image["index"], image["content_hash"])
            if before != image["content_hash"]:
                self.surprise(f"picture {image['index']} of {generation} has changed")

    def mark(self, generation: str, word: str) -> None:
        """`cancelling`, `deleting`: requested, with unknown outcome; `deleted`: acknowledged."""
        with self.lock:
            self.generations[generation][word] = True


class Load:
    """Clients of all tenants, with a random mix of operations."""

    def __init__(self, ports: list[int], keys: dict[str, str], pictures: list[bytes], seed: int, clients: int = 5):
        self.ledger, self.pictures = Ledger(), pictures
        self.clients = {tenant: Client(ports, secret) for tenant, secret in keys.items()}
        self.stop, self.paused = threading.Event(), threading.Event()
        self.busy = 0
        self.trainings = threading.Semaphore(2)
        self.threads = [threading.Thread(target=self.work, args=(seed * 1000 + n,), daemon=True) for n in range(clients)]

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def finish(self) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(180)
            if thread.is_alive():
                self.ledger.surprise("a client did not end within 180 s")

    def work(self, seed: int) -> None:
        generator = random.Random(seed)
        actions = [
            (self.waited, 30),
            (self.background, 30),
            (self.stream, 15),
            (self.openai, 5),
            (self.duplicate, 10),
            (self.cancel, 5),
            (self.delete, 5),
            (self.register, 8),
            (self.retrain, 2),
            (self.delete_concept, 2),
            (self.change, 8),
            (self.import_concept, 4),
            (self.look, 10),
        ]
        while not self.stop.is_set():
            if self.paused.is_set():
                time.sleep(0.1)
                continue
            tenant = generator.choice(list(self.clients))
            action = generator.choices([a for a, _ in actions], [w for _, w in actions])[0]
            try:
                action(tenant, generator)
            except (KeyError, ValueError, TypeError) as error:
                self.ledger.surprise(f"{action.__name__}: {type(error).__name__} {error}")
            time.sleep(generator.random() * 0.5)

    def asked(self, tenant: str, generator: random.Random) -> dict:
        word = key()
        asked = {
            "prompt": f"a photo of a {generator.choice(['cat', 'dog', 'car', 'mug'])} {generator.randrange(10**9)}",
            "n": generator.choice([1, 1, 2]),
            "size": generator.choice(["96x96", "64x112"]),
            "seed": generator.randrange(2**40),
            "metadata": {"client": word},
        }
        with self.ledger.lock:
            ready = [c["name"] for c in self.ledger.concepts.values() if c.get("ready") and not c.get("deleting") and c["tenant"] == tenant]
            self.ledger.requests[word] = {"tenant": tenant, "kind": "generation"}
        if ready and generator.random() < 0.3:
            asked["concepts"] = [generator.choice(ready)]
        return asked

    def ended(self, tenant: str, asked: dict, answer) -> None:
        if answer is None:
            return self.ledger.count("no answer")
        self.ledger.count(f"generation {answer.status}" + (f" {answer.code}" if answer.status >= 300 else ""))
        if answer.status in (200, 202):
            self.ledger.generation(answer.json, tenant, asked)

    def waited(self, tenant, generator) -> None:
        asked = self.asked(tenant, generator)
        headers = {"Idempotency-Key": key()}
        if generator.random() < 0.5:
            headers["Prefer"] = f"wait={generator.choice([1, 5, 20])}"
        self.ended(tenant, asked, self.clients[tenant].send("POST", "/v1/generations", asked, headers))

    def background(self, tenant, generator) -> None:
        asked = self.asked(tenant, generator)
        headers = {"Idempotency-Key": key(), "Prefer": "respond-async"}
        answer = self.clients[tenant].send("POST", "/v1/generations", asked, headers)
        self.ended(tenant, asked, answer)
        if answer is not None and answer.status == 202 and generator.random() < 0.5:
            seen = self.clients[tenant].send("GET", f"/v1/generations/{answer.json['id']}?wait=30")
            if seen is not None and seen.status == 200:
                self.ledger.generation(seen.json, tenant, asked)

    def duplicate(self, tenant, generator) -> None:
        """Concurrent identical POSTs with one idempotency key."""
        asked = self.asked(tenant, generator)
        headers = {"Idempotency-Key": key(), "Prefer": generator.choice(["respond-async", "wait=20"])}
        answers = []

        def send():
            answers.append(self.clients[tenant].send("POST", "/v1/generations", asked, headers))

        threads = [threading.Thread(target=send) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ids = {answer.json["id"] for answer in answers if answer is not None and answer.status in (200, 202)}
        if len(ids) > 1:
            self.ledger.surprise(f"one key, several generations: {ids}")
        for answer in answers:
            self.ended(tenant, asked, answer)

    def openai(self, tenant, generator) -> None:
        asked = self.asked(tenant, generator)
        asked.pop("metadata")
        answer = self.clients[tenant].send("POST", "/v1/images/generations", {**asked, "response_format": "b64_json"})
        self.ledger.count(f"image {answer.status if answer else 'none'}")

    def stream(self, tenant, generator) -> None:
        asked = {**self.asked(tenant, generator), "partial_images": generator.choice([0, 2])}
        leaves = generator.random() < 0.2
        client = self.clients[tenant]
        connection = http.client.HTTPConnection("127.0.0.1", generator.choice(client.ports), timeout=60)
        try:
            headers = {"Accept": "text/event-stream", "Content-Type": "application/json", "Authorization": f"Bearer {client.key}"}
            connection.request("POST", "/v1/generations", json.dumps(asked), headers)
            answer = connection.getresponse()
            if answer.status != 200:
                answer.read()
                return self.ledger.count(f"stream {answer.status}")
            self.read_events(answer, tenant, asked, leaves)
        except (OSError, http.client.HTTPException):
            self.ledger.count("stream broke off")
        finally:
            connection.close()

    def read_events(self, answer, tenant: str, asked: dict, leaves: bool) -> None:
        event, generation = None, None
        while line := answer.readline():
            text = line.decode().rstrip("\n")
            if text.startswith("event: "):
                event = text[7:]
            elif text.startswith("data: "):
                data = json.loads(text[6:])
                if event == "queued":
                    generation = data["generation"]["id"]
                    with self.ledger.lock:
                        # Not acknowledged: disconnecting from the stream cancels the generation.
                        self.ledger.generations[generation] = {
                            "tenant": tenant, "asked": asked, "images": {}, "ended": None, "listened": True,
                        }
                elif event == "image":
                    self.ledger.image(generation, data)
                    if leaves:
                        return self.ledger.count("stream left")
                elif event in ("completed", "failed", "cancelled"):
                    self.ledger.generation(data["generation"], tenant, asked)
                    return self.ledger.count(f"stream {event}")
        return self.ledger.count("stream broke off")

    def some(self, tenant: str, generator, want) -> str | None:
        with self.ledger.lock:
            found = [id for id, g in self.ledger.generations.items() if g["tenant"] == tenant and want(g)]
        return generator.choice(found[-40:]) if found else None

    def cancel(self, tenant, generator) -> None:
        asked = self.asked(tenant, generator)
        asked["n"] = 4
        answer = self.clients[tenant].send("POST", "/v1/generations", asked, {"Idempotency-Key": key(), "Prefer": "respond-async"})
        self.ended(tenant, asked, answer)
        if answer is None or answer.status != 202:
            return
        id = answer.json["id"]
        self.ledger.mark(id, "cancelling")
        time.sleep(generator.random())
        cancelled = self.clients[tenant].send("POST", f"/v1/generations/{id}/cancel")
        if cancelled is not None:
            self.ledger.count(f"cancel {cancelled.status} {cancelled.code}")
            if cancelled.status == 200:
                self.ledger.generation(cancelled.json, tenant, asked)

    def delete(self, tenant, generator) -> None:
        id = self.some(tenant, generator, lambda g: g["ended"] == "succeeded" and not g.get("deleting"))
        if id is None:
            return
        self.ledger.mark(id, "deleting")
        answer = self.clients[tenant].send("DELETE", f"/v1/generations/{id}")
        if answer is not None:
            self.ledger.count(f"delete {answer.status}")
            if answer.status in (200, 204, 404):
                self.ledger.mark(id, "deleted")

    def look(self, tenant, generator) -> None:
        """Acknowledged results can be read at any time, unless an error says that they are temporarily unavailable."""
        id = self.some(tenant, generator, lambda g: g["ended"] == "succeeded" and g["images"] and not g.get("deleting"))
        if id is None:
            return
        answer = self.clients[tenant].send("GET", f"/v1/generations/{id}", patience=30)
        with self.ledger.lock:
            known = dict(self.ledger.generations[id])
        if answer is None or answer.status >= 500 or known.get("deleting"):
            return
        if answer.status != 200:
            return self.ledger.surprise(f"{id} was acknowledged and is answered with {answer.status} {answer.code}")
        for image in answer.json["images"]:
            path = image["url"][image["url"].index("/v1/"):]
            file = self.clients[tenant].send("GET", path, patience=30)
            if file is None or file.status >= 500:
                continue
            if file.status == 403:
                # A process whose clock is ahead considers links expired.
                self.ledger.count(f"picture {file.code}")
                continue
            digest = hashlib.sha256(file.body).hexdigest()
            with self.ledger.lock:
                gone = self.ledger.generations[id].get("deleting")
            if not gone and digest != known["images"].get(image["index"], digest):
                self.ledger.surprise(f"picture {image['index']} of {id}: {file.status}, other bytes")
            self.ledger.count("picture read")

    def register(self, tenant, generator) -> None:
        if not self.trainings.acquire(blocking=False):
            return
        try:
            self.train(tenant, generator)
        finally:
            self.trainings.release()

    def train(self, tenant, generator) -> None:
        name, word = f"c{generator.randrange(10**12)}", key()
        fields = [("name", name), ("kind", "style"), ("steps", STEPS), ("layers", 1), ("seed", generator.randrange(1000))]
        fields += [("metadata", json.dumps({"client": word})), ("images", generator.choice(self.pictures))]
        body, content_type = form(fields)
        answer = self.clients[tenant].send("POST", "/v1/concepts", body, {"Content-Type": content_type, "Idempotency-Key": key()})
        if answer is None:
            return self.ledger.count("concept none")
        self.ledger.count(f"concept {answer.status} {answer.code}")
        if answer.status != 202:
            return None
        made = answer.json
        with self.ledger.lock:
            self.ledger.requests[word] = {"tenant": tenant, "kind": "concept"}
            self.ledger.concepts[made["id"]] = entry = {"name": name, "tenant": tenant, "trainings": [made["training"]["id"]]}
        self.follow(tenant, entry, generator)
        return None

    def follow(self, tenant: str, entry: dict, generator) -> None:
        """Polls the concept until its training, or this run, has ended."""
        while not self.stop.is_set():
            seen = self.clients[tenant].send("GET", f"/v1/concepts/{entry['name']}", stop=self.stop)
            if seen is not None and seen.status == 404:
                return self.ledger.surprise(f"concept {entry['name']} was acknowledged and is gone")
            if seen is not None and seen.status == 200 and seen.json["training"]["status"] not in ("queued", "running"):
                status = seen.json["training"]["status"]
                if status == "succeeded" and seen.json["version"] is None:
                    # Concept and training are read separately: the training ended in between.
                    continue
                self.ledger.count(f"training {status}")
                if status == "succeeded":
                    entry["ready"] = True
                    entry["hash"] = seen.json["version"]["hash"]
                return None
            if generator.random() < 0.003:
                with self.ledger.lock:
                    entry["cancelling"] = True
                self.clients[tenant].send("POST", f"/v1/trainings/{entry['trainings'][-1]}/cancel")
            time.sleep(0.5)
        return None

    def concept(self, generator, want=lambda entry: True) -> tuple[str, dict] | None:
        """A ready concept of any tenant that no other client is changing; it is reserved until `give_back`."""
        with self.ledger.lock:
            found = [
                (id, entry)
                for id, entry in self.ledger.concepts.items()
                if entry.get("ready") and not entry.get("deleting") and not entry.get("taken") and want(entry)
            ]
            if not found:
                return None
            id, entry = generator.choice(found)
            entry["taken"] = True
            return id, entry

    def give_back(self, entry: dict) -> None:
        with self.ledger.lock:
            entry["taken"] = False

    def retrain(self, tenant, generator) -> None:
        if not self.trainings.acquire(blocking=False):
            return
        taken = self.concept(generator, lambda entry: not entry.get("imported"))
        try:
            if taken is None:
                return
            id, entry = taken
            tenant = entry["tenant"]
            self.ledger.retrainings[id] += 1
            answer = self.clients[tenant].send("POST", f"/v1/concepts/{entry['name']}/trainings", {}, {"Idempotency-Key": key()})
            if answer is not None and answer.status == 202:
                with self.ledger.lock:
                    entry["trainings"].append(answer.json["id"])
                self.follow(tenant, entry, generator)
        finally:
            if taken is not None:
                self.give_back(taken[1])
            self.trainings.release()

    def delete_concept(self, tenant, generator) -> None:
        taken = self.concept(generator)
        if taken is None:
            return
        _, entry = taken
        entry["deleting"] = True
        answer = self.clients[entry["tenant"]].send("DELETE", f"/v1/concepts/{entry['name']}")
        self.ledger.count(f"concept deleted {answer.status if answer else 'none'}")
        if answer is not None and answer.status in (200, 204, 404):
            entry["deleted"] = True

    def change(self, tenant, generator) -> None:
        """PATCH of the description, and of the name for imported concepts. Without an answer, both outcomes are valid."""
        taken = self.concept(generator)
        if taken is None:
            return
        id, entry = taken
        tenant = entry["tenant"]
        try:
            wanted = {"description": f"changed {generator.randrange(10**9)}"}
            if entry.get("imported"):
                wanted["name"] = f"r{generator.randrange(10**12)}"
            before = {"name": entry["name"], "description": entry.get("described", [None])[-1]}
            # From the time of sending, both values are possible.
            with self.ledger.lock:
                entry["described"] = [before["description"], wanted["description"]]
                entry["named"] = [before["name"], wanted.get("name", before["name"])]
            answer = self.clients[tenant].send("PATCH", f"/v1/concepts/{before['name']}", wanted)
            self.ledger.count(f"change {answer.status if answer else 'none'} {answer.code if answer else ''}".rstrip())
            if answer is not None and answer.status == 200:
                now = answer.json
                if now["description"] != wanted["description"] or now["name"] != entry["named"][1]:
                    self.ledger.surprise(f"change of {id} was answered with {now['name']}, {now['description']}")
            elif answer is None or answer.status >= 500 or answer.status == 404:
                # An answer was lost: if the rename succeeded, the retry did not find the old name.
                now = self.read_back(tenant, id, reversed(entry["named"]))
                if now is None:
                    entry["ready"] = False
                    return
            else:
                return self.ledger.surprise(f"change of {id} was refused: {answer.status} {answer.code}")
            with self.ledger.lock:
                entry["name"], entry["named"], entry["described"] = now["name"], [now["name"]], [now["description"]]
        finally:
            self.give_back(entry)

    def read_back(self, tenant: str, id: str, names) -> dict | None:
        for name in names:
            seen = self.clients[tenant].send("GET", f"/v1/concepts/{name}")
            if seen is not None and seen.status == 200 and seen.json["id"] == id:
                return seen.json
        return None

    def import_concept(self, tenant, generator) -> None:
        """Imports the file of a trained concept under another name."""
        taken = self.concept(generator)
        if taken is None:
            return
        _, entry = taken
        tenant = entry["tenant"]
        try:
            file = self.clients[tenant].send("GET", f"/v1/concepts/{entry['name']}/weights")
        finally:
            self.give_back(entry)
        if file is None or file.status != 200:
            return self.ledger.count(f"weights {file.status if file else 'none'}")
        name = f"i{generator.randrange(10**12)}"
        headers = {"Content-Type": "application/octet-stream", "Idempotency-Key": key()}
        answer = self.clients[tenant].send("POST", f"/v1/concepts/import?name={name}", file.body, headers)
        self.ledger.count(f"import {answer.status if answer else 'none'} {answer.code if answer else ''}".rstrip())
        if answer is not None and answer.status == 201:
            with self.ledger.lock:
                self.ledger.concepts[answer.json["id"]] = {
                    "name": name, "tenant": tenant, "trainings": [], "imported": True, "ready": True, "hash": answer.json["version"]["hash"],
                }
        return None
