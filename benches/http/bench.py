"""What HTTP costs beside the engine, measured on a real server with a temporary data folder. See run.sh.

Clients run on the same cores as the server and are counted in what they see. Times are in milliseconds, memory in MB
(2**20 bytes).
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

PATIENCE = 60
# Without a seed: every picture another, and a file of its own.
DRAWING = {"prompt": "a photo of a cat"}


@dataclass
class Answer:
    status: int
    headers: dict
    body: bytes
    ms: float

    def json(self):
        return json.loads(self.body)


def head_of(text):
    first, *lines = text.decode("latin-1").split("\r\n")
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return int(first.split(" ", 2)[1]), {name.lower(): value.strip() for name, value in pairs}


def encoded(method, path, body=None, kind="application/json", extra=""):
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {kind}\r\ncontent-length: {len(data)}\r\n"
    return f"{head}{extra}\r\n".encode() + data


class Connection:
    """One kept connection."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, port):
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def ask(self, request):
        begun = time.perf_counter()
        self.writer.write(request)
        status, headers = head_of(await self.reader.readuntil(b"\r\n\r\n"))
        body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        return Answer(status, headers, body, 1000 * (time.perf_counter() - begun))

    def close(self):
        self.writer.close()


def ask(port, method, path, body=None, **more):
    async def one():
        connection = await Connection.open(port)
        answer = await connection.ask(encoded(method, path, body, **more))
        connection.close()
        return answer

    return asyncio.run(one())


def expect(answer, *statuses):
    if answer.status not in statuses:
        sys.exit(f"answered {answer.status}, not {statuses}: {answer.body[:500]!r}")
    return answer


def quantile(values, part):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def summary(values):
    return {
        "count": len(values),
        "mean_ms": round(statistics.fmean(values), 2),
        "p50_ms": round(quantile(values, 0.5), 2),
        "p99_ms": round(quantile(values, 0.99), 2),
        "max_ms": round(max(values), 2),
    }


class Server:
    """A server that is ready, on a free port; ends with the block."""

    def __init__(self, coar, *flags):
        self.dir = tempfile.TemporaryDirectory()
        self.log = open(Path(self.dir.name) / "log", "wb")
        command = [coar, "serve", "--listen", "127.0.0.1:0", "--device", "cpu", "--data", f"{self.dir.name}/data"]
        # Clients of these measurements come too often for the quotas of one tenant.
        command += ["--quota-requests-in-flight", "0", "--quota-trainings", "0", *flags]
        self.child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True)

    def __enter__(self):
        line = self.child.stdout.readline()
        found = re.match(r"listening on http://[^:]+:(\d+)", line)
        if not found:
            sys.exit(f"no address in {line!r}: " + (Path(self.dir.name) / "log").read_text()[-2000:])
        self.port = int(found[1])
        self.until("ready", lambda: ask(self.port, "GET", "/readyz").status == 200)
        return self

    def __exit__(self, *_):
        self.child.kill()
        self.child.wait()
        self.log.close()
        self.dir.cleanup()

    def until(self, what, look):
        begun = time.monotonic()
        while not look():
            if time.monotonic() - begun > PATIENCE or self.child.poll() is not None:
                sys.exit(f"{what} did not happen")
            time.sleep(0.05)

    def train(self, name, steps=2000):
        """Registers a concept; its training's id."""
        fields = {"name": name, "kind": "subject", "class": "cat", "steps": str(steps)}
        edge, parts = b"pictures-of-a-concept", []
        for field, value in fields.items():
            parts.append(f'content-disposition: form-data; name="{field}"\r\n\r\n{value}'.encode())
        for file in sorted(Path("concepts/rex").glob("*.png")):
            disposition = f'content-disposition: form-data; name="images"; filename="{file.name}"'
            parts.append(f"{disposition}\r\ncontent-type: image/png\r\n\r\n".encode() + file.read_bytes())
        body = b"".join(b"--" + edge + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + edge + b"--\r\n"
        kind = f"multipart/form-data; boundary={edge.decode()}"
        return expect(ask(self.port, "POST", "/v1/concepts", body, kind=kind), 202).json()["training"]["id"]

    def status(self, training):
        return expect(ask(self.port, "GET", f"/v1/trainings/{training}"), 200).json()["status"]

    def metrics(self):
        text = expect(ask(self.port, "GET", "/metrics"), 200).body.decode()
        values = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in values}

    def resident_mb(self):
        status = Path(f"/proc/{self.child.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024

    def descriptors(self):
        return len(os.listdir(f"/proc/{self.child.pid}/fd"))

    def cpu_seconds(self):
        """Of its threads that do not compute: HTTP and the database."""
        used = 0
        for task in Path(f"/proc/{self.child.pid}/task").iterdir():
            try:
                name, rest = re.match(r"\d+ \((.*)\) (.*)", (task / "stat").read_text()).groups()
            except FileNotFoundError:
                continue
            if name.startswith(("tokio", "sqlx")):
                fields = rest.split()
                used += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return used


async def closed_loop(port, request, clients, seconds, pause=0.0, spread=0.0):
    """Latencies of clients that begin within `spread` seconds and ask again `pause` seconds after each answer."""
    seen = []

    async def client(number):
        connection = await Connection.open(port)
        await asyncio.sleep(spread * number / clients)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            seen.append(expect(await connection.ask(request), 200).ms)
            await asyncio.sleep(pause)
        connection.close()

    await asyncio.gather(*(client(number) for number in range(clients)))
    return seen


def draw_for_ever(port, clients):
    asyncio.run(closed_loop(port, encoded("POST", "/v1/generations", DRAWING), clients, 1e9))


def livez(coar, seconds):
    """`/livez`, asked every 10 ms over a new connection, beside 16 generations and a training."""
    request = b"GET /livez HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"

    def probe(port):
        begun = time.perf_counter()
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
            connection.sendall(request)
            text = b""
            while part := connection.recv(4096):
                text += part
        if not text.startswith(b"HTTP/1.1 200 "):
            sys.exit(f"/livez: {text!r}")
        return 1000 * (time.perf_counter() - begun)

    def probes(port):
        seen, end = [], time.perf_counter() + seconds
        while time.perf_counter() < end:
            seen.append(probe(port))
            time.sleep(0.01)
        return seen

    with Server(coar) as server:
        idle = probes(server.port)
        training = server.train("rex")
        server.until("training", lambda: server.metrics()["coar_training_steps_total"] >= 1)
        others = multiprocessing.Process(target=draw_for_ever, args=(server.port, 16))
        others.start()
        server.until("16 generations", lambda: server.metrics()["coar_batch_images"] >= 8)
        before = server.metrics()
        busy = probes(server.port)
        after = server.metrics()
        still = server.status(training)
        others.terminate()
        others.join()
    if still != "running":
        sys.exit(f"the training was {still} before the measurement's end")
    more = {name: after[f"coar_{name}"] - before[f"coar_{name}"] for name in ("pictures_total", "training_steps_total")}
    return {"idle": summary(idle), "busy": summary(busy), "meanwhile": more}


def beside_the_engine(server, route, body, load):
    """Clients that draw one after the other; what they saw, less what the engine counted.

    The engine's time goes from a request's arrival there to its last picture, waiting for rows included. Files, rows of
    the database and the answer are not in it. It is a counter, so that there is a difference of means and no median.
    """
    before = server.metrics()
    clients, seconds, spread = load
    seen = asyncio.run(closed_loop(server.port, encoded("POST", route, body), clients, seconds, spread=spread))
    # The last answers are counted after they are sent.
    time.sleep(0.2)
    after = server.metrics()

    def mean(name, labels):
        def more(part):
            key = f"{name}_{part}{{{labels}}}"
            return after[key] - before.get(key, 0)

        if more("count") != len(seen):
            sys.exit(f"{name} counted {more('count')}, the clients {len(seen)}")
        return 1000 * more("sum") / more("count")

    engine = mean("coar_generation_seconds", 'outcome="succeeded"')
    http = mean("coar_http_request_seconds", f'method="POST",route="{route}",status="2xx"')
    return summary(seen) | {
        "engine_mean_ms": round(engine, 2),
        "server_mean_ms": round(http, 2),
        "overhead_mean_ms": round(statistics.fmean(seen) - engine, 2),
    }


def overhead(coar, seconds):
    """Clients that draw small pictures, 32 and one, and 32 that only ask for the check of a request."""
    found = {}
    base64 = {**DRAWING, "response_format": "b64_json"}
    check = encoded("POST", "/v1/generations?validate_only=true", DRAWING)
    with Server(coar) as server:
        asyncio.run(closed_loop(server.port, encoded("POST", "/v1/generations", DRAWING), 32, 2))
        for name, route, body, load in [
            # Pictures that begin together end together, and their files and rows stand in line.
            ("kept, 32 in step", "/v1/generations", DRAWING, (32, seconds, 0)),
            ("kept, 32", "/v1/generations", DRAWING, (32, seconds, 1)),
            ("b64_json, 32", "/v1/images/generations", base64, (32, seconds, 1)),
            ("kept, 1", "/v1/generations", DRAWING, (1, seconds, 0)),
            ("b64_json, 1", "/v1/images/generations", base64, (1, seconds, 0)),
        ]:
            found[name] = beside_the_engine(server, route, body, load)
        spread = closed_loop(server.port, check, 32, seconds, pause=0.1, spread=0.1)
        found["check_each_100_ms"] = summary(asyncio.run(spread))
        found["check"] = summary(asyncio.run(closed_loop(server.port, check, 32, seconds)))
        found["check"]["per_second"] = round(found["check"]["count"] / seconds)
    return found


def streams(coar, seconds, number):
    """Listeners to the events of a training that waits behind another one."""
    with Server(coar, "--connections", str(number + 100), "--training-slots", "1") as server:
        running, waiting = server.train("first"), server.train("second")
        server.until("training", lambda: server.status(running) == "running")
        # Whatever the first requests and steps bring stays: a training's graph is far larger than the streams.
        server.until("steps", lambda: server.metrics()["coar_training_steps_total"] >= 5)
        asyncio.run(closed_loop(server.port, encoded("GET", f"/v1/trainings/{waiting}"), 32, 2))
        time.sleep(2)

        def watch():
            resident, used, steps = [], server.cpu_seconds(), server.metrics()["coar_training_steps_total"]
            begun = time.perf_counter()
            while time.perf_counter() - begun < seconds:
                time.sleep(0.25)
                resident.append(server.resident_mb())
            took = time.perf_counter() - begun
            return {
                "resident_mb": round(statistics.median(resident), 1),
                "descriptors": server.descriptors(),
                "http_and_database_cores": round((server.cpu_seconds() - used) / took, 3),
                "training_steps_per_second": round((server.metrics()["coar_training_steps_total"] - steps) / took, 2),
            }

        before, listeners = watch(), []
        request = encoded("GET", f"/v1/trainings/{waiting}/events", extra="accept: text/event-stream\r\n")
        begun = time.perf_counter()
        for _ in range(number):
            listener = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
            listener.sendall(request)
            listeners.append(listener)
        for listener in listeners:
            text = b""
            while b"event: progress" not in text:
                part = listener.recv(4096)
                if not part:
                    sys.exit(f"a stream ended: {text!r}")
                text += part
        opened = time.perf_counter() - begun
        during = watch()
        if server.status(waiting) != "queued":
            sys.exit("the training did not wait")
        for listener in listeners:
            listener.close()
        server.until("the streams' end", lambda: server.descriptors() < number)
    return {
        "streams": number,
        "opened_s": round(opened, 2),
        "before": before,
        "during": during,
        "more_mb": round(during["resident_mb"] - before["resident_mb"], 1),
    }


def refusals(coar, number):
    """All of `number` requests in one moment, 8 of which may wait."""

    async def flood(port):
        connections = [await Connection.open(port) for _ in range(number)]
        request = encoded("POST", "/v1/generations", DRAWING)
        answers = await asyncio.gather(*(connection.ask(request) for connection in connections))
        for connection in connections:
            connection.close()
        return answers

    with Server(coar, "--queue", "8") as server:
        expect(ask(server.port, "POST", "/v1/generations", DRAWING), 200)
        answers = asyncio.run(flood(server.port))
    statuses = [answer.status for answer in answers]
    refused = [answer for answer in answers if answer.status == 429]
    waits = [int(answer.headers["retry-after"]) for answer in refused]
    return {
        "requests": number,
        "statuses": {str(status): statuses.count(status) for status in sorted(set(statuses))},
        "refused": summary([answer.ms for answer in refused]),
        "codes": sorted({answer.json()["error"]["code"] for answer in refused}),
        "retry_after_s": [min(waits), max(waits)],
    }


def busy_cores(measure):
    """What `measure` gives, and how many cores other processes used meanwhile."""

    def busy():
        user, nice, system, _idle, _wait, *rest = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
        return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")

    def own():
        return sum(os.times()[:4])

    begun, all_before, own_before = time.perf_counter(), busy(), own()
    found = measure()
    others = (busy() - all_before) - (own() - own_before)
    return found | {"cores_of_others": round(others / (time.perf_counter() - begun), 2)}


def table(found):
    """The figures, each with its goal."""
    rows = []

    def times(what, part, goal):
        rows.append((f"{what}: p50, p99 ms", f"{part['p50_ms']}, {part['p99_ms']}", goal))

    if part := found.get("livez"):
        for name in ("idle", "busy"):
            times(f"/livez, {name}", part[name], "p99 < 50")
    if part := found.get("overhead"):
        for name in (name for name in part if name.startswith(("kept", "b64_json"))):
            what = f"clients draw, {name}: seen less the engine's, mean ms"
            rows.append((what, part[name]["overhead_mean_ms"], "<= 5"))
        times("32 clients, validate_only, each 10 a second", part["check_each_100_ms"], "p50 <= 5")
        times(f"32 clients, validate_only, {part['check']['per_second']} a second", part["check"], "p50 <= 5")
    if part := found.get("streams"):
        rows.append((f"{part['streams']} idle event streams: more resident MB", part["more_mb"], "<= 50"))
        rows.append(("their cores of HTTP and database", part["during"]["http_and_database_cores"], ""))
    if part := found.get("refusals"):
        rows.append((f"{part['requests']} requests at once: statuses", part["statuses"], ""))
        times("429", part["refused"], "p99 < 100")
        rows.append(("Retry-After s", "{} to {}".format(*part["retry_after_s"]), "1 to 120"))
    for name, part in found.items():
        if (others := part["cores_of_others"]) > 0.1:
            rows.append((f"other processes, cores, during {name}", others, "0"))
    lines = [f"| {what} | {value} | {goal} |" for what, value, goal in rows]
    return "\n".join(["| | measured | wanted |", "|---|---|---|", *lines])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--coar", default="target/release/coar")
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=200, help="at once, for refusals")
    parser.add_argument("--out", help="file for the JSON; default: standard output")
    parser.add_argument("parts", nargs="*", help="livez overhead streams refusals; default: all")
    args = parser.parse_args()
    measurements = {
        "livez": lambda: livez(args.coar, args.seconds),
        "overhead": lambda: overhead(args.coar, args.seconds),
        "streams": lambda: streams(args.coar, args.seconds, args.streams),
        "refusals": lambda: refusals(args.coar, args.requests),
    }
    unknown = set(args.parts) - set(measurements)
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}")
    wanted = args.parts or measurements
    found = {name: busy_cores(measure) for name, measure in measurements.items() if name in wanted}
    text = json.dumps(found, indent=2)
    if args.out:
        Path(args.out).write_text(text + "\n")
    else:
        print(text)
    print(table(found), file=sys.stderr)


if __name__ == "__main__":
    main()
