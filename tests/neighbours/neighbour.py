"""The tenant that works: generates with a concept, lists, reads, now and then registers a concept and changes its mind.

A process of its own, so that the attacker's threads take none of its time. It reads one JSON object with ports, key and concept, then
for every line `SECONDS` on its standard input it works for so long and answers with one line of JSON.
"""

import base64
import http.client
import http.server
import itertools
import json
import sys
import threading
import time

from system import ROOT

from client import Client, form

# Below the limit of requests per minute of one tenant: seven requests a second at most.
GENERATION_PAUSE = 0.5
OTHER_PAUSE = 0.2
# What has not been answered then counts as not answered.
PATIENCE = 20.0
# For webhooks that are still on their way when the time is over.
HOOKS = 3.0
IMAGE = (ROOT / "concepts/rex/1.png").read_bytes()


class Hooks:
    """Receives this tenant's webhooks: when the one for a generation came."""

    def __init__(self):
        self.lock, self.came, self.sent = threading.Lock(), {}, {}
        hooks = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with hooks.lock:
                    hooks.came.setdefault(body["data"]["id"], time.monotonic())
                self.send_response(204)
                self.end_headers()

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{server.server_address[1]}/"

    def expect(self, generation: str) -> None:
        with self.lock:
            self.sent[generation] = time.monotonic()

    def times(self) -> tuple[list[float], int]:
        """Seconds from a generation's answer to its webhook, and how many have not come. One that has not come has taken at least
        until now."""
        until = time.monotonic() + HOOKS
        while time.monotonic() < until and not self.sent.keys() <= self.came.keys():
            time.sleep(0.02)
        with self.lock:
            now = time.monotonic()
            taken = [max(0.0, self.came.get(id, now) - since) for id, since in self.sent.items()]
            missing = len(self.sent.keys() - self.came.keys())
            self.sent.clear()
        return taken, missing


class Neighbour:
    def __init__(self, ports: list[int], key: str | None, concept: str):
        self.client, self.concept, self.hooks = Client(ports, key, PATIENCE), concept, Hooks()
        self.ports = itertools.cycle(ports)
        self.numbers = itertools.count()
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.clear()

    def clear(self) -> None:
        self.times, self.problems, self.counts = {}, [], {"5xx": 0, "refused": 0, "unanswered": 0, "wrong": 0}

    def ask(self, kind: str, method: str, path: str, body=None, headers=None, expect=(200,)):
        """One timed request; the answer, or None where there is none."""
        with self.lock:
            port = next(self.ports)
        begun = time.monotonic()
        try:
            answer = self.client.once(port, method, path, body, headers)
        except (OSError, http.client.HTTPException) as error:
            answer = None
            what, problem = "unanswered", f"{kind}: {type(error).__name__} {error}"
        taken = time.monotonic() - begun
        if answer is not None and answer.status not in expect:
            what = "5xx" if answer.status >= 500 else "refused" if answer.status in (403, 408, 409, 429) else "wrong"
            problem = f"{kind}: {answer.status} {answer.code}"
        with self.lock:
            if answer is not None and answer.status in expect:
                self.times.setdefault(kind, []).append(taken)
                return answer
            # A quick refusal is no short time; what was never answered took at least this long.
            if answer is None:
                self.times.setdefault(kind, []).append(max(taken, PATIENCE))
            self.counts[what] += 1
            self.problems.append(problem)
        return None

    def generate(self) -> None:
        asked = {"prompt": f"a photo of a cat {next(self.numbers)}", "concepts": [self.concept], "seed": 7, "webhook_url": self.hooks.url}
        answer = self.ask("generation", "POST", "/v1/generations", asked, expect=(200, 202))
        if answer is None:
            return
        if answer.json["status"] != "succeeded":
            with self.lock:
                self.counts["wrong"] += 1
                self.problems.append(f"generation: {answer.json['status']} {answer.json['error']}")
            return
        self.hooks.expect(answer.json["id"])

    def others(self):
        """One request at each step, for ever."""
        while True:
            for _ in range(3):
                yield self.ask("list", "GET", "/v1/concepts?limit=20")
                yield self.ask("read", "GET", f"/v1/concepts/{self.concept}")
            uploaded = []
            # Two at once: one alone would find a place that just became free in a queue that another tenant fills.
            for _ in range(2):
                name = f"new-{next(self.numbers)}"
                body, content_type = form([("name", name), ("kind", "style"), ("steps", 4), ("layers", 1), ("images", IMAGE)])
                made = self.ask("upload", "POST", "/v1/concepts", body, {"Content-Type": content_type}, (202,))
                if made is not None:
                    uploaded.append((name, made.json["training"]["id"]))
                yield made
            for name, training in uploaded:
                # It may have been trained in the meantime.
                yield self.ask("cancel", "POST", f"/v1/trainings/{training}/cancel", expect=(200, 409))
                yield self.ask("delete", "DELETE", f"/v1/concepts/{name}", expect=(200, 204))

    def loop(self, step, pause: float, until: float) -> None:
        while (begun := time.monotonic()) < until:
            step()
            time.sleep(max(0.0, min(begun + pause, until) - time.monotonic()))

    def work(self, seconds: float) -> dict:
        self.clear()
        until = time.monotonic() + seconds
        others = self.others()
        threads = [
            threading.Thread(target=self.loop, args=(self.generate, GENERATION_PAUSE, until)),
            threading.Thread(target=self.loop, args=(lambda: next(others), OTHER_PAUSE, until)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.times["webhook"], missing = self.hooks.times()
        return {"times": self.times, "counts": {**self.counts, "hooks missing": missing}, "problems": self.problems}


def main() -> None:
    asked = json.loads(sys.stdin.readline())
    neighbour = Neighbour(asked["ports"], asked["key"], asked["concept"])
    if "file" in asked:
        file = base64.b64decode(asked["file"])
        headers = {"Content-Type": "application/octet-stream"}
        made = neighbour.client.once(asked["ports"][0], "POST", f"/v1/concepts/import?name={asked['concept']}", file, headers)
        assert made.status == 201, (made.status, made.body)
    for line in sys.stdin:
        print(json.dumps(neighbour.work(float(line))), flush=True)


if __name__ == "__main__":
    main()
