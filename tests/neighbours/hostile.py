"""`hostile.py CHROMIUM`: a server without keys, a page of another origin that is open in the same machine's browser, a local client.

The page tries every route that changes something, in every way that a browser sends without asking first, and to read. A server
without keys believes every caller on its machine, so it must tell pages apart: each attempt gets 403, and nothing has changed.
"""

import base64
import collections
import http.server
import json
import pathlib
import sys
import tempfile
import threading
import time
import urllib.parse

import system
from neighbour import IMAGE

from client import Client, form

sys.path.insert(0, str(system.ROOT / "tests/ui"))

from page import launch  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
EVIL = "evil.example"
WAYS = (
    "fetch empty", "fetch multipart", "fetch urlencoded", "fetch text", "fetch untyped", "fetch json", "beacon text", "beacon multipart",
    "form multipart", "form urlencoded", "form text",
)
PAGE = "<!doctype html><title>another site</title><body></body>"


class Elsewhere(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(PAGE)))
        self.end_headers()
        self.wfile.write(PAGE.encode())


class Local(threading.Thread):
    """Works without a key, as before, and changes nothing. Keeps every refusal."""

    def __init__(self, client: Client):
        super().__init__(daemon=True)
        self.client, self.stop, self.asked, self.refused = client, threading.Event(), 0, []

    def run(self):
        asked = {"prompt": "a cat", "concepts": ["pet"], "response_format": "b64_json"}
        while not self.stop.is_set():
            for method, path, body in (
                ("GET", "/v1/concepts", None),
                ("GET", "/v1/concepts/pet", None),
                ("POST", "/v1/images/generations", asked),
            ):
                answer = self.client.once(self.client.ports[0], method, path, body)
                self.asked += 1
                if answer.status != 200:
                    self.refused.append(f"{method} {path}: {answer.status} {answer.code}")
            self.stop.wait(0.5)


class Server:
    """Has something to lose: a concept, a training that runs, one that was cancelled, a generation."""

    def __init__(self):
        folder = pathlib.Path(tempfile.mkdtemp(prefix="coar-neighbours-keyless-"))
        self.system = system.Single(folder, keys=False, more=())
        self.system.start()
        self.port = self.system.ports[0]
        self.client = Client([self.port], None)
        self.ask("POST", "/v1/concepts", *self.concept("pet", 1))
        self.until(lambda: self.ask("GET", "/v1/concepts/pet")["status"] == "ready")
        self.ended = self.ask("POST", "/v1/concepts", *self.concept("ended", 20_000))["training"]["id"]
        self.ask("POST", f"/v1/trainings/{self.ended}/cancel")
        self.until(lambda: self.ask("GET", f"/v1/trainings/{self.ended}")["status"] == "cancelled")
        self.busy = self.ask("POST", "/v1/concepts", *self.concept("busy", 20_000))["training"]["id"]
        self.until(lambda: self.ask("GET", f"/v1/trainings/{self.busy}")["status"] == "running")
        self.generation = self.ask("POST", "/v1/generations", {"prompt": "a cat"})["id"]
        self.document = self.ask("GET", "/openapi.json")

    @staticmethod
    def concept(name: str, steps: int):
        body, content_type = form([("name", name), ("kind", "style"), ("steps", steps), ("layers", 1), ("images", IMAGE)])
        return body, {"Content-Type": content_type}

    def ask(self, method: str, path: str, body=None, headers=None):
        answer = self.client.once(self.port, method, path, body, headers)
        assert answer.status < 300, (method, path, answer.status, answer.body)
        return answer.json

    @staticmethod
    def until(what) -> None:
        end = time.monotonic() + 120
        while not what():
            assert time.monotonic() < end, "the server is not as this test needs it"
            time.sleep(0.1)

    def state(self) -> dict:
        """Everything that a page could have changed; not how far a training is."""
        listed = {}
        for path, fields in {
            "/v1/concepts": ("name", "status", "version", "versions", "description", "metadata"),
            "/v1/trainings": ("concept", "status", "attempt"),
            "/v1/generations": ("status", "prompt", "images"),
            "/v1/admin/keys": ("name", "scopes"),
            "/v1/admin/tenants": ("name", "quotas"),
        }.items():
            answer = self.client.once(self.port, "GET", f"{path}?limit=100" if "admin" not in path else path)
            if answer.status != 200:
                listed[path] = {"?": f"cannot be read any more: {answer.status} {answer.code}"}
                continue
            listed[path] = {entry["id"]: {field: entry.get(field) for field in fields} for entry in answer.json["data"]}
            for entry in listed[path].values():
                # Addresses are signed again at each look.
                if "images" in entry:
                    entry["images"] = [image["id"] for image in entry["images"]]
        return listed

    def changing(self) -> list[tuple[str, str]]:
        """(method, path) of every described route that changes something; keys last, for they end the server's trust."""
        routes = []
        for path, methods in self.document["paths"].items():
            kind = path.split("/")[2] if path.startswith("/v1/") else ""
            id = {"trainings": self.busy, "generations": self.generation, "keys": "key_00000000000000000000000000000000"}
            named = "default" if "tenants" in path else "pet"
            filled = path.replace("{name}", named).replace("{id}", id.get(kind, id["keys"]))
            if path.endswith("/retry"):
                filled = filled.replace(self.busy, self.ended)
            routes += [(method.upper(), filled) for method in methods if method in ("post", "put", "patch", "delete")]
        return sorted(routes, key=lambda route: ("admin" in route[1], route[0] == "DELETE", route[1]))


def given(path: str, number: int) -> dict:
    """What the page sends to a route: the same as JSON and as fields of a form."""
    bodies = {
        "/v1/generations": {"prompt": "made by a page", "n": 1},
        "/v1/images/generations": {"prompt": "made by a page", "n": 1},
        "/v1/admin/keys": {"tenant": "default", "name": "made by a page"},
        "/v1/admin/tenants": {"name": f"page-{number}"},
    }
    json_body = bodies.get(path, {"description": "made by a page"} if path.endswith("/pet") else {})
    fields = {"name": f"page-{number}", "kind": "style", "steps": "1", "layers": "1"} if path == "/v1/concepts" else json_body
    return {"json": json.dumps(json_body), "fields": fields, "image": base64.b64encode(IMAGE).decode()}


class Visit:
    """A page of one origin, and what its requests to the server were answered."""

    def __init__(self, browser, server: Server, name: str, address: str, target: str, sandboxed=False, own=False):
        self.name, self.server, self.target, self.own = name, server, target, own
        self.context = browser.new_context()
        self.page = self.context.new_page()
        self.pending, self.answers = set(), []
        if own:
            # After the name has changed its address: the page came from elsewhere, and now has the server's origin.
            self.page.route(address, lambda route: route.fulfill(content_type="text/html", body=PAGE))
        self.page.goto(address)
        self.frame = self.page.main_frame
        if sandboxed:
            self.page.set_content('<iframe sandbox="allow-scripts allow-forms" srcdoc="<body></body>"></iframe>')
            self.frame = self.page.frames[1]
        self.frame.evaluate((HERE / "hostile.js").read_text())
        ours = lambda request: request.url.startswith(target)
        self.context.on("request", lambda request: ours(request) and self.pending.add(request))
        self.context.on("requestfinished", lambda request: self.done(request))
        self.context.on("requestfailed", lambda request: self.done(request))
        self.context.on("response", self.answered)

    def done(self, request) -> None:
        self.pending.discard(request)

    def answered(self, answer) -> None:
        if answer.url.startswith(self.target):
            self.answers.append((answer.request.method, answer.url, answer.status))

    def settle(self) -> None:
        """Until nothing is on its way; a beacon has no other end."""
        until = time.monotonic() + 3
        self.page.wait_for_timeout(10)
        while self.pending and time.monotonic() < until:
            self.page.wait_for_timeout(10)
        self.pending.clear()

    def change(self, method: str, path: str, way: str, number: int) -> int | None:
        """The server's status; None where the browser has sent nothing."""
        self.answers.clear()
        name = f"?name=page-{number}" if path.endswith("/import") else ""
        self.frame.evaluate("(given) => attempt.changing(given)", [f"{self.target}{path}{name}", method, way, given(path, number)])
        self.settle()
        found = [status for asked, url, status in self.answers if asked == method and urllib.parse.urlsplit(url).path == path]
        return found[-1] if found else None

    def read(self, path: str, way: str) -> str:
        return self.frame.evaluate("(given) => attempt.reading(given)", [f"{self.target}{path}", way])


def own_pages(browser, server: Server) -> list[str]:
    """Studio, by both names of this machine, has to go on working."""
    wrong = []
    for host in ("127.0.0.1", "localhost"):
        address = f"http://{host}:{server.port}"
        context = browser.new_context()
        page = context.new_page()
        if (status := page.goto(address).status) != 200:
            wrong.append(f"Studio at {address} is answered with {status}")
        script = """() => fetch("/v1/generations?validate_only=true", {
            method: "POST", body: '{"prompt": "a cat"}', headers: { "Content-Type": "application/json" },
        }).then((answer) => answer.status)"""
        if (status := page.evaluate(script)) != 200:
            wrong.append(f"a request of Studio at {address} is answered with {status}")
        context.close()
    return wrong


def differences(before: dict, after: dict) -> list[str]:
    found = []
    for path in before:
        for id in sorted(before[path].keys() | after[path].keys()):
            one, other = before[path].get(id), after[path].get(id)
            if one != other:
                what = "is new" if one is None else "is gone" if other is None else f"was {one}"
                found.append(f"{path} {id} {what}{f', is {other}' if other is not None else ''}"[:220])
    return found


def attack(visits: list[Visit], server: Server) -> tuple[list[str], list[str], dict]:
    """(what got through, what is worth a note, counts). The same of several pages is one line."""
    wrong, notes, counts = collections.defaultdict(list), collections.defaultdict(list), {"refused": 0, "not sent": 0, "let in": 0}
    number = 0
    reads = (
        ("/v1/concepts", "fetch"), ("/v1/generations", "fetch"), ("/v1/concepts/pet/images/0", "img"), ("/v1/concepts", "script"),
        (f"/v1/trainings/{server.busy}/events", "EventSource"), (f"/v1/trainings/{server.busy}/events", "WebSocket"), ("/", "fetch"),
        ("/metrics", "fetch"), ("/v1/admin/tenants", "fetch"),
    )
    for visit in visits:
        for path, way in reads:
            outcome = visit.read(path, way)
            # An image of another origin is displayed, and its page learns no more than that; one of its own origin can be read.
            if outcome.startswith(("read", "open")) or outcome == "loaded" and visit.own:
                wrong[f"{way} GET {path}: {outcome.split()[0]}"].append(visit.name)
            elif outcome == "loaded":
                notes[f"{way} GET {path} was displayed or run"].append(visit.name)
        for method, path in server.changing():
            through, sent = {}, 0
            for way in WAYS if method == "POST" else ("fetch json",):
                number += 1
                status = visit.change(method, path, way, number)
                sent += status is not None
                counts["not sent" if status is None else "refused" if status == 403 else "let in"] += 1
                if status not in (None, 403):
                    through.setdefault(status, []).append(way)
            if method == "POST" and not sent:
                wrong[f"{method} {path}: the browser has sent nothing, so nothing is tested"].append(visit.name)
            for status, ways in through.items():
                wrong[f"{method} {path}: {status} by {', '.join(ways)}"].append(visit.name)
    lines = lambda found: [f"{what} ({'; '.join(names)})" for what, names in found.items()]
    return lines(wrong), lines(notes), counts


def main() -> int:
    server = Server()
    elsewhere = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
    port, other = server.port, elsewhere.server_address[1]
    local = Local(server.client)
    try:
        with sync_playwright() as playwright:
            # Newer browsers ask before a page from elsewhere reaches this machine. The server cannot rely on that.
            flags = ["--disable-features=LocalNetworkAccessChecks,BlockInsecurePrivateNetworkRequests,PrivateNetworkAccessSendPreflights"]
            browser = launch(playwright, sys.argv[1], f"--host-resolver-rules=MAP {EVIL} 127.0.0.1", *flags)
            wrong = own_pages(browser, server)
            before = server.state()
            local.start()
            address = f"http://127.0.0.1:{port}"
            visits = [
                Visit(browser, server, "another port", f"http://127.0.0.1:{other}/", address),
                Visit(browser, server, "localhost, another port", f"http://localhost:{other}/", f"http://localhost:{port}"),
                Visit(browser, server, "localhost", f"http://localhost:{other}/", address),
                Visit(browser, server, "another site", f"http://{EVIL}:{other}/", address),
                Visit(browser, server, "a sandbox", f"http://127.0.0.1:{other}/", address, sandboxed=True),
                Visit(browser, server, "a rebound name", f"http://{EVIL}:{port}/attack", f"http://{EVIL}:{port}", own=True),
            ]
            through, notes, counts = attack(visits, server)
            local.stop.set()
            local.join(60)
            after = server.state()
            wrong += own_pages(browser, server)
            browser.close()
    finally:
        system.remove(server.system)
    changes = differences(before, after)
    print(f"keyless: attempts to change something: {counts}; the local client was refused {len(local.refused)} of {local.asked} requests")
    for title, lines in {
        "GOT THROUGH": through, "CHANGED": changes, "LOCAL CLIENT REFUSED": sorted(set(local.refused)), "WRONG": wrong, "note": notes,
    }.items():
        for line in lines:
            print(f"{title}  {line}")
    failed = bool(through or changes or local.refused or wrong)
    print("FAILED" if failed else "passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
