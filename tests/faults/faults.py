"""The faults. Each one starts, lasts for some time, and ends; recovery is timed from its end."""

import hashlib
import http.client
import random
import signal
import socket
import threading
import time

from client import Client, key
from proxy import wait_for_port


class Context:
    def __init__(self, cluster, load, generator: random.Random):
        self.cluster, self.load, self.random = cluster, load, generator

    def later(self, process, seconds: float) -> None:
        """Restarts a process after a delay, as a supervisor would."""
        threading.Timer(seconds, process.start).start()

    def link(self, *ends: str):
        names = [name for name in self.cluster.links if not ends or any(name.endswith(end) or name.startswith(end) for end in ends)]
        return self.cluster.links[self.random.choice(sorted(names))]


def kill_worker(c: Context) -> str:
    worker = c.random.choice(c.cluster.workers)
    worker.kill()
    c.later(worker, c.random.uniform(0, 4))
    return worker.name


def kill_api(c: Context) -> str:
    api = c.random.choice(c.cluster.apis)
    api.kill()
    c.later(api, c.random.uniform(0, 4))
    return api.name


def kill_both_workers(c: Context) -> str:
    for worker in c.cluster.workers:
        worker.kill()
    for worker in c.cluster.workers:
        c.later(worker, c.random.uniform(0, 2))
    return "all workers"


def kill_everything(c: Context) -> str:
    """A power cut: no process shuts down cleanly."""
    for process in [*c.cluster.processes, c.cluster.postgres, c.cluster.s3]:
        process.kill()
    c.cluster.postgres.start()
    c.cluster.postgres.ready()
    c.cluster.s3.start()
    wait_for_port(c.cluster.s3.port)
    for process in c.cluster.processes:
        process.start()
    return "every process"


def kill_postgres(c: Context) -> str:
    c.cluster.postgres.kill()
    pause = c.random.uniform(0, 8)
    time.sleep(pause)
    c.cluster.postgres.start()
    c.cluster.postgres.ready()
    return f"away for {pause:.1f} s"


def kill_s3(c: Context) -> str:
    c.cluster.s3.kill()
    pause = c.random.uniform(0, 8)
    time.sleep(pause)
    c.cluster.s3.start()
    wait_for_port(c.cluster.s3.port)
    return f"away for {pause:.1f} s"


def terminate(c: Context, process) -> str:
    """SIGTERM, then a new process, as in a rolling upgrade."""
    took = process.terminate(100)
    process.start()
    return f"{process.name}, ended after {took:.1f} s"


def term_worker(c: Context) -> str:
    return terminate(c, c.random.choice(c.cluster.workers))


def term_api(c: Context) -> str:
    return terminate(c, c.random.choice(c.cluster.apis))


def pause(c: Context, process) -> str:
    """SIGSTOP; other processes take over its work; then it continues, unaware of that."""
    seconds = c.random.uniform(8, 20)
    process.stopped = True
    process.signal(signal.SIGSTOP)

    def wake():
        process.stopped = False
        process.signal(signal.SIGCONT)

    threading.Timer(seconds, wake).start()
    return f"{process.name} for {seconds:.0f} s"


def pause_worker(c: Context) -> str:
    return pause(c, c.random.choice(c.cluster.workers))


def pause_api(c: Context) -> str:
    return pause(c, c.random.choice(c.cluster.apis))


def slow_link(c: Context) -> str:
    link = c.link()
    link.delay, link.jitter = c.random.uniform(0.01, 0.3), c.random.uniform(0, 0.2)
    time.sleep(c.random.uniform(3, 8))
    link.heal()
    return link.name


def narrow_link(c: Context) -> str:
    link = c.link()
    link.rate = c.random.choice([2_000, 20_000])
    time.sleep(c.random.uniform(3, 8))
    link.heal()
    return link.name


def cut_link(c: Context) -> str:
    link, again = c.link(), c.random.random() < 0.5
    link.refuse = again
    link.cut()
    if again:
        time.sleep(c.random.uniform(2, 10))
    link.heal()
    return f"{link.name}{', and refused' if again else ''}"


def silent_link(c: Context) -> str:
    """All packets are dropped silently; afterwards the connections continue, or are reset."""
    link, resets = c.link(), c.random.random() < 0.5
    link.silent = True
    seconds = c.random.uniform(3, 15)
    time.sleep(seconds)
    if resets:
        link.cut()
    link.heal()
    return f"{link.name} for {seconds:.0f} s{', then reset' if resets else ''}"


def half_open(c: Context) -> str:
    """Half-open connections: they never carry data again, but new ones work."""
    link = c.link()
    link.freeze()
    return link.name


def broken_off(c: Context) -> str:
    """Responses are cut off in the middle."""
    link = c.link()
    link.truncate = 0.2
    time.sleep(c.random.uniform(2, 6))
    link.heal()
    return link.name


def s3_errors(c: Context) -> str:
    share = c.random.uniform(0.2, 1.0)
    c.cluster.s3_faults(errors=share)
    time.sleep(c.random.uniform(2, 8))
    c.cluster.s3_faults(errors=0)
    return f"{share:.0%} of requests"


def s3_slow(c: Context) -> str:
    delay = c.random.uniform(0.2, 3)
    c.cluster.s3_faults(delay=delay)
    time.sleep(c.random.uniform(3, 8))
    c.cluster.s3_faults(delay=0)
    return f"{delay:.1f} s each"


def flip(path) -> bytes:
    """Damages a file; returns its original bytes."""
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 0x40]) + whole[middle + 1:])
    return whole


def damaged_image(c: Context) -> str:
    """A byte of a stored image changes: reading it must fail, and must never return other bytes."""
    with c.load.ledger.lock:
        known = [(id, g) for id, g in c.load.ledger.generations.items() if g["ended"] == "succeeded" and g["images"] and not g.get("deleting")]
    if not known:
        return "no picture yet"
    id, entry = c.random.choice(known[-30:])
    index, digest = c.random.choice(sorted(entry["images"].items()))
    path = c.cluster.objects().get(digest)
    if path is None:
        return "deleted meanwhile"
    client = Client([api.port for api in c.cluster.apis], c.cluster.keys[entry["tenant"]])
    shown = client.send("GET", f"/v1/generations/{id}", patience=10)
    if shown is None or shown.status != 200:
        return "nobody to ask"
    try:
        whole = flip(path)
        url = next(image["url"] for image in shown.json["images"] if image["index"] == index)
        for port in client.ports:
            answer = client.once(port, "GET", url[url.index("/v1/"):], timeout=20)
            if answer.status == 200 and hashlib.sha256(answer.body).hexdigest() != digest:
                c.load.ledger.surprise(f"damaged bytes of {id} were given out")
            elif answer.status == 200:
                c.load.ledger.surprise(f"the damage of {id} was not noticed")
    except (OSError, http.client.HTTPException):
        pass
    finally:
        path.write_bytes(whole)
    return f"picture {index} of {id}"


def damaged_checkpoint(c: Context) -> str:
    """A training's checkpoint is damaged and its worker dies: the training restarts, or fails with a reason."""
    until = time.monotonic() + 4
    while time.monotonic() < until:
        rows = c.cluster.postgres.query("SELECT id, checkpoint, worker FROM trainings WHERE status = 'running' AND checkpoint IS NOT NULL")
        objects = c.cluster.objects()
        for row in rows:
            if row["checkpoint"] in objects:
                try:
                    flip(objects[row["checkpoint"]])
                except FileNotFoundError:
                    continue
                for worker in c.cluster.workers:
                    worker.kill()
                    worker.start()
                return row["id"]
        time.sleep(0.1)
    return "no checkpoint just now"


def slow_clients(c: Context) -> str:
    """Connections that send headers without a body, or half of the headers, or read single bytes."""
    held = []
    port = c.random.choice(c.cluster.apis).port
    for number in range(60):
        try:
            one = socket.create_connection(("127.0.0.1", port), timeout=2)
        except OSError:
            continue
        secret = c.cluster.keys["north"]
        head = f"POST /v1/generations HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {secret}\r\nContent-Type: application/json\r\n"
        try:
            one.sendall((head + ("Content-Length: 500\r\n\r\n{" if number % 2 else "")).encode())
        except OSError:
            pass
        held.append(one)
    for _ in range(4):
        time.sleep(1)
        for one in held:
            one.setblocking(False)
            try:
                one.recv(1)
            except OSError:
                pass

    def drop():
        for one in held:
            one.close()

    threading.Timer(10, drop).start()
    return f"{len(held)} connections"


def overload(c: Context) -> str:
    """Ten times as many requests as the cluster has capacity for, for some seconds."""
    statuses: dict = {}
    stop = time.monotonic() + c.random.uniform(3, 6)

    def hammer(number: int):
        client = Client([api.port for api in c.cluster.apis], c.cluster.keys[("north", "south")[number % 2]], timeout=60)
        while time.monotonic() < stop:
            asked = {"prompt": f"a photo of a cup {key()}", "n": 2}
            try:
                answer = client.once(client.ports[number % 2], "POST", "/v1/images/generations", {**asked, "response_format": "b64_json"})
                statuses[answer.status] = statuses.get(answer.status, 0) + 1
            except (OSError, http.client.HTTPException):
                statuses[0] = statuses.get(0, 0) + 1
            time.sleep(0.05)

    threads = [threading.Thread(target=hammer, args=(n,)) for n in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return f"{statuses}"


def clock_jump(c: Context) -> str:
    """A process restarts with a clock that is a day off; all other clocks are correct."""
    process = c.random.choice(c.cluster.processes)
    hours = c.random.choice([-26, 26])
    if not FAKETIME:
        return "SKIPPED: faketime is not installed"
    process.kill()
    # Only the wall clock jumps, not the monotonic clock.
    before, process.env = process.env, {**process.env, "LD_PRELOAD": FAKETIME, "FAKETIME": f"{hours:+d}h", "DONT_FAKE_MONOTONIC": "1"}
    process.start()
    process.env = before
    return f"{process.name} by {hours} h"


def faketime_library() -> str:
    import glob

    found = glob.glob("/usr/lib/*/faketime/libfaketimeMT.so.1")
    return found[0] if found else ""


FAKETIME = faketime_library()

FAULTS = {
    kill_worker: 14,
    kill_api: 10,
    kill_both_workers: 3,
    kill_everything: 2,
    kill_postgres: 8,
    kill_s3: 6,
    term_worker: 6,
    term_api: 4,
    pause_worker: 6,
    pause_api: 3,
    slow_link: 4,
    narrow_link: 4,
    cut_link: 10,
    silent_link: 8,
    half_open: 4,
    broken_off: 6,
    s3_errors: 5,
    s3_slow: 4,
    damaged_image: 4,
    damaged_checkpoint: 3,
    slow_clients: 3,
    overload: 3,
    clock_jump: 3,
}
