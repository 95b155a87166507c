#!/usr/bin/env python3
"""One API process and 1, 2, 4 workers on PostgreSQL: pictures per second, and what the way through an API process adds.

    ./scripts/with-postgres.sh benches/cluster/run.py [--coar target/release/coar] [--real] [--seconds 20]

Without --real the workers' devices are stand-ins (`coar-lab bench stand-in`): a step takes --step-ms and a worker draws
--pictures at once, whatever the machine is doing, so that one machine can stand for several. Everything else is real:
HTTP, database, choice of the worker, frames, encoding. With --real the pocket model is drawn with, one thread each, as far
as the machine's cores go. Writes a table and, with --json FILE, the figures.
"""

import argparse
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import tempfile
import threading
import time


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Process:
    def __init__(self, args, env, log):
        self.process = subprocess.Popen(args, env=env, stdout=log, stderr=log)

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def wait_ready(port, seconds=60):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
            connection.request("GET", "/readyz")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise SystemExit("not ready")


def draw(connection, seed):
    body = json.dumps({"prompt": "a cat", "seed": seed, "response_format": "b64_json"})
    connection.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    answer.read()
    return answer.status


def load(port, clients, seconds):
    """Closed loop: every client asks for the next picture when it has one."""
    latencies, refused, lock = [], [0], threading.Lock()
    until = time.monotonic() + seconds

    def client(number):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        seed = number * 1_000_000
        while time.monotonic() < until:
            seed += 1
            begun = time.monotonic()
            status = draw(connection, seed)
            with lock:
                if status == 200:
                    latencies.append(time.monotonic() - begun)
                else:
                    refused[0] += 1
            if status != 200:
                time.sleep(0.05)

    begun = time.monotonic()
    threads = [threading.Thread(target=client, args=(n,)) for n in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spent = time.monotonic() - begun
    latencies.sort()
    return {
        "pictures_per_second": len(latencies) / spent,
        "p50_ms": 1000 * statistics.median(latencies),
        "p95_ms": 1000 * latencies[int(0.95 * (len(latencies) - 1))],
        "refused": refused[0],
    }


def alone(port, count):
    """One client, one request after the other."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    times = []
    for seed in range(count):
        begun = time.monotonic()
        if draw(connection, seed) != 200:
            raise SystemExit("refused")
        times.append(1000 * (time.monotonic() - begun))
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--coar", default="target/release/coar")
    parser.add_argument("--lab", default="target/release/coar-lab")
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--workers", default="1,2,4")
    parser.add_argument("--step-ms", default="5")
    parser.add_argument("--pictures", default="8")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--json")
    args = parser.parse_args()
    server = os.environ["COAR_TEST_DATABASE"]
    folder = tempfile.mkdtemp()
    database = f"{server.rsplit('/', 1)[0]}/bench_{os.getpid()}"
    subprocess.run(["psql", server, "-qc", f"CREATE DATABASE bench_{os.getpid()}"], check=True)
    env = {
        **os.environ,
        "COAR_DATA": folder,
        "COAR_DATABASE": database,
        "COAR_LOG": "warn",
        "COAR_QUOTA_REQUESTS_IN_FLIGHT": "0",
        "COAR_THREADS": "1",
    }
    log = open(os.path.join(folder, "log"), "w")
    serve = [args.coar, "serve"]
    if not args.real:
        serve = [args.lab, "bench", "stand-in", "--step-ms", args.step_ms, "--pictures", args.pictures]

    figures = {"device": "pocket model, one thread each" if args.real else f"stand-in: {args.step_ms} ms a step, {args.pictures} pictures"}
    # The same device without a way in between.
    port = free_port()
    one = Process([*serve, "--role", "all", "--listen", f"127.0.0.1:{port}"], env, log)
    wait_ready(port)
    alone(port, 5)
    direct = alone(port, 40)
    one.end()

    running = []
    api = free_port()
    running.append(Process([args.coar, "serve", "--role", "api", "--listen", f"127.0.0.1:{api}"], env, log))
    figures["workers"] = {}
    try:
        count = 0
        for wanted in map(int, args.workers.split(",")):
            while count < wanted:
                worker = free_port()
                running.append(Process([*serve, "--role", "worker", "--worker-listen", f"127.0.0.1:{worker}"], env, log))
                wait_ready(worker)
                count += 1
            wait_ready(api)
            time.sleep(1.5)
            if wanted == 1:
                alone(api, 5)
                figures["alone_ms"] = {"direct": direct, "through_api": alone(api, 40)}
            clients = 2 * wanted * int(args.pictures) if not args.real else 8 * wanted
            figures["workers"][wanted] = load(api, clients, args.seconds)
    finally:
        for process in reversed(running):
            process.end()
    times = figures["alone_ms"]
    print(f"device: {figures['device']}")
    print(f"one request alone: {times['direct']:.1f} ms direct, {times['through_api']:.1f} ms through an API process: "
          f"+{times['through_api'] - times['direct']:.1f} ms")
    first = next(iter(figures["workers"].values()))["pictures_per_second"]
    print("| workers | pictures/s | of n x 1 | p50 ms | p95 ms | refused |\n|---|---|---|---|---|---|")
    base = int(next(iter(figures["workers"])))
    for count, row in figures["workers"].items():
        share = row["pictures_per_second"] / (first * int(count) / base)
        print(f"| {count} | {row['pictures_per_second']:.2f} | {share:.2f} | {row['p50_ms']:.0f} | {row['p95_ms']:.0f} | {row['refused']} |")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(figures, file, indent=1)


main()
