"""Single measurements: `limits.py NAME...`, or all of them without a name. Each prints one line of JSON.

MINUTES sets the duration (5 for overload, 60 s for writers), REQUESTS and TRAININGS the size of the day (20000, 500), CONCEPTS that
of the registry.
"""

import http.client
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import checks
from client import Client, form, key
from cluster import ROOT, Cluster, Coar, Postgres, run
from proxy import free_ports

PICTURES = [path.read_bytes() for path in sorted((ROOT / "concepts").glob("*/1.png"))[:4]]


def folder() -> pathlib.Path:
    return pathlib.Path(tempfile.mkdtemp(prefix="coar-limits-"))


def wait(what, seconds: float, pause: float = 0.1):
    """The first true result of `what`; raises TimeoutError after `seconds`."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := what():
            return found
        time.sleep(pause)
    raise TimeoutError(what.__name__)


def register(client: Client, name: str, steps: int, **more):
    body, content_type = form(
        [("name", name), ("kind", "style"), ("steps", steps), ("layers", 1), ("images", random.choice(PICTURES)), *more.items()]
    )
    return client.send("POST", "/v1/concepts", body, {"Content-Type": content_type, "Idempotency-Key": key()})


def cluster(**more) -> tuple[Cluster, Client]:
    system = Cluster(folder(), **more)
    system.start()
    return system, Client([api.port for api in system.apis], system.keys["north"])


def trains(system: Cluster, training: str):
    """The row of the running training, once it has a checkpoint."""
    rows = system.postgres.query(
        f"SELECT worker, step, checkpoint_step FROM trainings WHERE id = '{training}' AND status = 'running' AND checkpoint IS NOT NULL"
    )
    return rows[0] if rows else None


def process_of(system: Cluster, name: str):
    return next(worker for worker in system.workers if name in worker.log.read_text(errors="replace"))


def lost_training() -> dict:
    """A worker is killed during a training: when does another one resume it, and is the resulting concept the same?"""
    system, client = cluster()
    try:
        made = register(client, "lost", 60, seed=7).json
        row = wait(lambda: trains(system, made["training"]["id"]), 120)
        begun = time.monotonic()
        process_of(system, row["worker"]).kill()
        before = row["worker"]

        def goes_on():
            now = system.postgres.query(f"SELECT worker, step, resumed_from_step FROM trainings WHERE id = '{made['training']['id']}'")[0]
            return now if now["worker"] != before and now["step"] > now["resumed_from_step"] else None

        after = wait(goes_on, 120)
        took = time.monotonic() - begun
        ended = wait(lambda: (seen := client.send("GET", "/v1/concepts/lost").json)["status"] == "ready" and seen, 240, 0.5)
        again = client.send("POST", "/v1/concepts/lost/trainings", {}, {"Idempotency-Key": key()}).json
        whole = wait(lambda: (seen := client.send("GET", "/v1/concepts/lost").json)["version"]["number"] == 2 and seen, 240, 0.5)
        tensors = lambda version: client.send("GET", f"/v1/concepts/lost/weights?version={version}").body
        return {
            "goes on after s": round(took, 1),
            "from step": after["resumed_from_step"],
            "equal to an uninterrupted training": same_tensors(tensors(1), tensors(2)),
            "hashes": [ended["version"]["hash"][:12], whole["version"]["hash"][:12], again["id"][-6:]],
            "within": 45,
            "ok": took <= 45,
        }
    finally:
        system.stop()


def same_tensors(one: bytes, two: bytes) -> bool:
    """Whether two safetensors files have equal tensors; other metadata is ignored."""
    def parts(data):
        length = int.from_bytes(data[:8], "little")
        head = json.loads(data[8:8 + length])
        head.pop("__metadata__", None)
        body = data[8 + length:]
        return {name: (entry["shape"], body[slice(*entry["data_offsets"])]) for name, entry in head.items()}
    return parts(one) == parts(two)


def paused_worker() -> dict:
    """A worker is stopped for 60 s during a training and generations, and continues: its later writes must have no effect."""
    system, client = cluster()
    try:
        made = register(client, "paused", 40).json
        row = wait(lambda: trains(system, made["training"]["id"]), 120)
        victim = process_of(system, row["worker"])
        asked = [
            client.send("POST", "/v1/generations", {"prompt": f"cat {n}", "n": 4, "seed": n}, {"Prefer": "respond-async", "Idempotency-Key": key()}).json["id"]
            for n in range(12)
        ]
        time.sleep(0.5)
        victim.stopped = True
        victim.signal(signal.SIGSTOP)
        begun = time.monotonic()
        wait(lambda: client.send("GET", "/v1/concepts/paused").json["status"] == "ready", 58, 0.5)
        wait(lambda: all(client.send("GET", f"/v1/generations/{id}").json["status"] == "succeeded" for id in asked), 58, 0.5)
        snapshot = lambda: (
            system.postgres.query("SELECT id, status, attempt, owner, finished_at FROM generations ORDER BY id"),
            system.postgres.query("SELECT id, status, version, worker, finished_at FROM trainings ORDER BY id"),
            system.postgres.query("SELECT id, generation_id, idx, blob FROM images ORDER BY id"),
            system.postgres.query("SELECT * FROM concept_versions ORDER BY concept_id, number"),
        )
        before = snapshot()
        time.sleep(max(0.0, 60 - (time.monotonic() - begun)))
        victim.signal(signal.SIGCONT)
        victim.stopped = False
        paused = time.monotonic() - begun
        time.sleep(15)
        missing, orphans = checks.store(system)
        same = before == snapshot()
        return {"paused s": round(paused), "nothing changed": same, "orphan blobs": len(orphans), "missing blobs": len(missing),
                "broken rules": checks.always(system), "ok": same and not missing and not checks.always(system)}
    finally:
        system.stop()


def handed_back() -> dict:
    """SIGTERM to a worker with a training: how long until the training is released, and until another worker resumes it?"""
    times, taken = [], []
    system, client = cluster()
    try:
        for number in range(5):
            made = register(client, f"term{number}", 60).json
            row = wait(lambda: trains(system, made["training"]["id"]), 120, 0.05)
            victim = process_of(system, row["worker"])
            begun = time.monotonic()
            victim.signal(signal.SIGTERM)
            id = made["training"]["id"]
            wait(lambda: system.postgres.query(f"SELECT 1 AS a FROM trainings WHERE id = '{id}' AND (lease_token IS NULL OR worker <> '{row['worker']}')"), 30, 0.02)
            times.append(time.monotonic() - begun)
            wait(lambda: system.postgres.query(f"SELECT 1 AS a FROM trainings WHERE id = '{id}' AND status = 'running' AND worker <> '{row['worker']}'"), 30, 0.02)
            taken.append(time.monotonic() - begun)
            client.send("POST", f"/v1/trainings/{id}/cancel")
            victim.child.wait(100)
            victim.start()
            victim.wait_ready()
        return {"free after s": [round(t, 2) for t in times], "taken after s": [round(t, 2) for t in taken], "ok": max(times) <= 2}
    finally:
        system.stop()


def alone(name: str, *more, env=None, data=None) -> tuple[Coar, Client, pathlib.Path]:
    """One process on SQLite."""
    place = folder()
    port = free_ports(1)[0]
    process = Coar(name, place, "all", port, data=data or place / "data", env=env, more=more)
    process.start()
    process.wait_ready()
    return process, Client([port], None), place


def sqlite_writers() -> dict:
    """50 clients write to one process with SQLite for a minute."""
    process, client, place = alone("writers", "--quota-requests-in-flight", "0", "--quota-concepts", "0")
    seconds = 60 * float(os.environ.get("MINUTES", "1"))
    stop, lock = time.monotonic() + seconds, threading.Lock()
    statuses: dict = {}
    slowest = [0.0]
    export = None
    register(client, "seed", 1)
    wait(lambda: client.send("GET", "/v1/concepts/seed").json["status"] == "ready", 120, 0.5)
    export = client.send("GET", "/v1/concepts/seed/weights").body

    def write(number: int):
        generator, made = random.Random(number), 0
        name = f"writer{number}"
        client.once(client.ports[0], "POST", f"/v1/concepts/import?name={name}", export, {"Content-Type": "application/octet-stream"})
        while time.monotonic() < stop:
            made += 1
            what = generator.choice(["patch", "queue", "import", "key"])
            begun = time.monotonic()
            try:
                if what == "patch":
                    answer = client.once(client.ports[0], "PATCH", f"/v1/concepts/{name}", {"metadata": {"n": str(made)}})
                elif what == "import":
                    answer = client.once(client.ports[0], "POST", f"/v1/concepts/import?name={name}-{made}", export, {"Content-Type": "application/octet-stream"})
                else:
                    asked = {"prompt": f"cat {number} {made}"}
                    headers = {"Prefer": "respond-async"} | ({"Idempotency-Key": key()} if what == "key" else {})
                    answer = client.once(client.ports[0], "POST", "/v1/generations", asked, headers)
                    if answer.status == 202 and generator.random() < 0.9:
                        client.once(client.ports[0], "POST", f"/v1/generations/{answer.json['id']}/cancel")
                status = answer.status
            except (OSError, http.client.HTTPException) as error:
                status = type(error).__name__
            with lock:
                statuses[f"{what} {status}"] = statuses.get(f"{what} {status}", 0) + 1
                slowest[0] = max(slowest[0], time.monotonic() - begun)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    locked = process.log.read_text(errors="replace").count("database is locked")
    process.kill()
    shutil.rmtree(place, ignore_errors=True)
    bad = sum(count for name, count in statuses.items() if name.split()[1] not in ("200", "201", "202", "204", "429"))
    return {"seconds": seconds, "answers": dict(sorted(statuses.items())), "database is locked": locked, "slowest s": round(slowest[0], 2), "ok": locked == 0 and bad == 0}


def offered(client: Client, rate: float, seconds: float) -> tuple[list, list]:
    """Open loop: a fixed number of requests per second, regardless of the answers. ([(status, seconds)], [requests sent too late])"""
    results, lock, late = [], threading.Lock(), []
    threads: list = []

    def one(number: int):
        asked = {"prompt": f"cat {number}", "size": "64x112", "response_format": "b64_json"}
        begun = time.monotonic()
        try:
            status = client.once(client.ports[number % len(client.ports)], "POST", "/v1/images/generations", asked, timeout=90).status
        except (OSError, http.client.HTTPException):
            status = 0
        with lock:
            results.append((status, time.monotonic() - begun))

    begun = time.monotonic()
    for number in range(int(rate * seconds)):
        pause = begun + number / rate - time.monotonic()
        if pause > 0:
            time.sleep(pause)
        elif pause < -1:
            late.append(number)
        thread = threading.Thread(target=one, args=(number,), daemon=True)
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join(120)
    return results, late


def overload() -> dict:
    """Ten times the load that one process can carry, for five minutes."""
    process, client, place = alone("overload", "--quota-requests-in-flight", "0", "--queue", "16", "--rows", "16")
    minutes = float(os.environ.get("MINUTES", "5"))
    try:
        # Capacity: as many concurrent requests as fit, with none rejected.
        done, stop = [], time.monotonic() + 30
        def loop():
            while time.monotonic() < stop:
                client.once(client.ports[0], "POST", "/v1/images/generations", {"prompt": key(), "size": "64x112", "response_format": "b64_json"})
                done.append(1)
        loops = [threading.Thread(target=loop) for _ in range(16)]
        for one in loops:
            one.start()
        for one in loops:
            one.join()
        capacity = len(done) / 30
        memory = [process.facts()["rss_kib"]]
        ended = threading.Event()
        def watch():
            while not ended.wait(5):
                memory.append(process.facts()["rss_kib"])
        threading.Thread(target=watch, daemon=True).start()
        results, late = offered(client, 10 * capacity, 60 * minutes)
        ended.set()
        drawn = [seconds for status, seconds in results if status == 200]
        refused = sorted(seconds for status, seconds in results if status == 429)
        others = {status: sum(1 for s, _ in results if s == status) for status in {s for s, _ in results} - {200, 429}}
        goodput = len(drawn) / (60 * minutes)
        part = lambda share: round(1000 * refused[min(len(refused) - 1, int(share * len(refused)))], 1) if refused else None
        half = len(memory) // 2
        return {
            "capacity pictures/s": round(capacity, 2), "offered/s": round(10 * capacity, 1), "minutes": minutes, "goodput": round(goodput / capacity, 3),
            "refused": len(refused), "429 median ms": part(0.5), "429 p99 ms": part(0.99), "429 within 100 ms": round(sum(1 for s in refused if s <= 0.1) / max(1, len(refused)), 4),
            "other answers": others, "sent late": len(late), "rss MiB": [memory[0] // 1024, memory[half] // 1024, memory[-1] // 1024],
            "ok": goodput >= 0.9 * capacity and not others,
        }
    finally:
        process.kill()
        shutil.rmtree(place, ignore_errors=True)


def disk_full() -> dict:
    """A small disk fills up under one process with SQLite: nothing acknowledged is lost, and it recovers once there is space."""
    place = folder()
    disk = place / "disk"
    disk.mkdir()
    if os.getuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", str(disk)]).returncode:
        return {"SKIPPED": "no tmpfs can be mounted here", "ok": True}
    try:
        process, client, _ = alone("disk", data=disk / "data")
        acknowledged: dict = {}
        statuses: dict = {}
        ballast = disk / "ballast"

        def draw(count: int):
            for number in range(count):
                try:
                    answer = client.once(client.ports[0], "POST", "/v1/generations", {"prompt": f"cat {number}", "seed": number}, {"Prefer": random.choice(["wait=30", "respond-async"])}, timeout=40)
                except (OSError, http.client.HTTPException) as error:
                    statuses[type(error).__name__] = statuses.get(type(error).__name__, 0) + 1
                    continue
                statuses[answer.status] = statuses.get(answer.status, 0) + 1
                if answer.status in (200, 202):
                    acknowledged[answer.json["id"]] = answer.json

        draw(5)
        with open(ballast, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"x" * 4096)
            except OSError:
                pass
        draw(8)
        full = dict(statuses)
        ballast.unlink()
        begun = time.monotonic()
        wait(lambda: client.send("POST", "/v1/generations", {"prompt": "again"}, {"Prefer": "wait=30"}).json.get("status") == "succeeded", 60, 0.2)
        recovered = time.monotonic() - begun
        lost = []
        for id, seen in acknowledged.items():
            try:
                now = wait(lambda: (a := client.send("GET", f"/v1/generations/{id}").json)["status"] not in ("queued", "running") and a, 60, 0.5)
            except TimeoutError:
                lost.append(f"{id} does not end")
                continue
            if seen["status"] in ("queued", "running") and now["status"] != "succeeded":
                lost.append(f"{id} {now['status']} {now['error']}")
            for image in seen["images"]:
                if image["content_hash"] not in [i["content_hash"] for i in now["images"]]:
                    lost.append(f"a picture of {id}")
        alive = process.alive()
        process.kill()
        process.start()
        process.wait_ready()
        return {"answers while full": full, "alive": alive, "acknowledged": len(acknowledged), "lost": lost, "recovered after s": round(recovered, 1), "ok": not lost and alive}
    finally:
        try:
            process.kill()
        except NameError:
            pass
        subprocess.run(["umount", str(disk)])


def out_of_memory() -> dict:
    """A worker's address space is limited during a training: it dies, or the step fails; the training is resumed later by it or
    another worker."""
    system, client = cluster()
    try:
        made = register(client, "memory", 40).json
        row = wait(lambda: trains(system, made["training"]["id"]), 120)
        victim = process_of(system, row["worker"])
        size = int(next(line for line in pathlib.Path(f"/proc/{victim.child.pid}/status").read_text().splitlines() if line.startswith("VmSize")).split()[1])
        subprocess.run(["prlimit", "--pid", str(victim.child.pid), f"--as={size * 1024}:unlimited"], check=True)
        drawn = [client.send("POST", "/v1/generations", {"prompt": f"cat {n}", "n": 4}, {"Prefer": "wait=60", "Idempotency-Key": key()}).status for n in range(6)]
        time.sleep(5)
        how = victim.child.poll()
        if how is not None:
            victim.start()
        else:
            subprocess.run(["prlimit", "--pid", str(victim.child.pid), "--as=unlimited:unlimited"], check=True)
        wait(lambda: client.send("GET", "/v1/concepts/memory").json["status"] != "training", 240, 0.5)
        status = client.send("GET", "/v1/concepts/memory").json["status"]
        return {"the worker": "lives" if how is None else f"ended with {how}", "pictures": drawn, "the training": status, "broken rules": checks.always(system),
                "ok": status == "ready" and set(drawn) <= {200, 202} and not checks.always(system)}
    finally:
        system.stop()


def day() -> dict:
    """20 000 requests and 500 trainings of few steps: memory, open files and connections must not grow."""
    requests, trainings = int(os.environ.get("REQUESTS", "20000")), int(os.environ.get("TRAININGS", "500"))
    system, client = cluster(more_api=("--quota-requests-in-flight", "0", "--quota-concepts", "0", "--quota-trainings", "0"), more_worker=("--training-previews", "0"))
    samples: list = []
    done = {"requests": 0, "trainings": 0, "failed": 0}
    lock = threading.Lock()

    def sample():
        facts = {process.name: process.facts() for process in system.processes}
        facts["connections"] = system.postgres.query("SELECT count(*) AS n FROM pg_stat_activity")[0]["n"]
        samples.append({**facts, **done})

    def asks(count: int, number: int):
        generator = random.Random(number)
        for index in range(count):
            if generator.random() < 0.6:
                answer = client.send("GET", generator.choice(["/v1/concepts?limit=20", "/v1/generations?limit=20", "/v1/models", "/v1/trainings?limit=5"]))
            else:
                answer = client.send("POST", "/v1/generations", {"prompt": f"cat {number} {index}", "size": "64x112"}, {"Prefer": generator.choice(["respond-async", "wait=30"]), "Idempotency-Key": key()})
            with lock:
                done["requests"] += 1
                done["failed"] += answer is None or answer.status >= 400

    def trains_many(count: int, number: int):
        for index in range(count):
            name = f"day{number}x{index}"
            made = register(client, name, 1)
            while client.send("GET", f"/v1/concepts/{name}").json["training"]["status"] in ("queued", "running"):
                time.sleep(0.2)
            with lock:
                done["trainings"] += 1
                done["failed"] += made.status != 202
            client.send("DELETE", f"/v1/concepts/{name}")

    begun = time.monotonic()
    try:
        threads = [threading.Thread(target=asks, args=(requests // 6, n), daemon=True) for n in range(6)]
        threads += [threading.Thread(target=trains_many, args=(trainings // 2, n), daemon=True) for n in range(2)]
        for thread in threads:
            thread.start()
        limit = 60 * float(os.environ.get("MINUTES", "600"))
        while any(thread.is_alive() for thread in threads) and time.monotonic() - begun < limit:
            sample()
            time.sleep(10)
        sample()
        first, last = samples[max(1, len(samples) // 5)], samples[-1]
        growth = {name: {fact: [first[name][fact], last[name][fact]] for fact in ("rss_kib", "files", "threads")} for name in (p.name for p in system.processes)}
        flat = all(now <= 1.15 * then + 20_000 for facts in growth.values() for then, now in [facts["rss_kib"]]) and all(
            now <= then + 16 for facts in growth.values() for then, now in [facts["files"]]
        )
        (ROOT / "target/faults-day.json").write_text(json.dumps(samples))
        return {"minutes": round((time.monotonic() - begun) / 60, 1), **done, "after a fifth and at the end": growth,
                "connections": [first["connections"], last["connections"]], "ok": flat and done["failed"] == 0}
    finally:
        system.stop()


def fill(execute, count: int) -> None:
    """Inserts concepts of the tenant `default` with one version each, as coar stores them."""
    execute(
        f"""INSERT INTO concepts (id, tenant_id, name, kind, class_noun, metadata, version, version_number, created_at, updated_at)
            WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count})
            SELECT 'concept_' || substr('00000000000000000000000000000000' || i, -32), 'tenant_00000000000000000000000000000000',
                   'filler-' || i, 'subject', 'cat', '{{}}', substr('{'0' * 64}' || i, -64), 1, 1000, 1000 FROM n;
            INSERT INTO concept_versions (concept_id, number, hash, created_at)
            SELECT id, 1, version, 1000 FROM concepts WHERE name LIKE 'filler-%';
            INSERT INTO concept_pictures (concept_id, position, blob) SELECT id, 0, version FROM concepts WHERE name LIKE 'filler-%';"""
    )


def timed(client: Client) -> dict:
    """Medians in ms after warm-up: two lists, a look-up, and the time to the first event of a generation."""
    def median(ask, times=60):
        taken = []
        for _ in range(times):
            begun = time.perf_counter()
            answer = ask()
            assert answer.status in (200, 202), answer.body
            taken.append(time.perf_counter() - begun)
        return round(1000 * statistics.median(taken), 2)
    port = client.ports[0]
    get = lambda path: lambda: client.once(port, "GET", path)
    plan = {"prompt": "a photo of <real> cat", "size": "64x112"}
    return {
        "list": median(get("/v1/concepts?limit=20")),
        "list of subjects that are ready": median(get("/v1/concepts?limit=20&kind=subject&status=ready")),
        "look up": median(get("/v1/concepts/filler-77")),
        "generation validated": median(lambda: client.once(port, "POST", "/v1/generations?validate_only=true", plan)),
        "generation queued": median(lambda: client.once(port, "POST", "/v1/generations", plan, {"Prefer": "respond-async"}), 20),
    }


def registry() -> dict:
    """100 and 100 000 concepts, on both databases."""
    import sqlite3

    count, found = int(os.environ.get("CONCEPTS", "100000")), {}
    for backend in ("sqlite", "postgres"):
        for size in (100, count):
            place = folder()
            port = free_ports(1)[0]
            postgres, env = None, {}
            if backend == "postgres":
                postgres = Postgres(place, free_ports(1)[0])
                postgres.start()
                postgres.ready()
                env = {"COAR_DATABASE": f"postgres://coar@127.0.0.1:{postgres.port}/postgres"}
            process = Coar("registry", place, "all", port, data=place / "data", env=env, more=("--quota-concepts", "0", "--quota-requests-in-flight", "0"))
            client = Client([port], None)
            try:
                process.start()
                process.wait_ready()
                register(client, "real", 1)
                wait(lambda: client.send("GET", "/v1/concepts/real").json["status"] == "ready", 120, 0.5)
                file = client.send("GET", "/v1/concepts/real/weights").body
                assert file
                if postgres:
                    fill(lambda sql: postgres.execute(sql.replace("substr('0", "right('0").replace("|| i, -", "|| i, ")), size)
                    postgres.execute("ANALYZE")
                else:
                    with sqlite3.connect(place / "data/coar.sqlite", timeout=30) as connection:
                        connection.executescript(fill_text(size))
                timed(client)
                found[f"{backend} {size}"] = timed(client)
            finally:
                process.kill()
                if postgres:
                    postgres.terminate(10)
                shutil.rmtree(place, ignore_errors=True)
    worst = max(
        found[f"{backend} {count}"][name] / found[f"{backend} 100"][name] for backend in ("sqlite", "postgres") for name in found[f"{backend} 100"]
    )
    return {**found, "worst factor": round(worst, 2), "ok": worst <= 2}


def fill_text(count: int) -> str:
    text: list = []
    fill(text.append, count)
    return text[0]


def slow_clients() -> dict:
    """200 connections that send nothing, or half of the headers, or read nothing: other clients are not affected."""
    process, client, place = alone("slow", "--header-timeout", "5", "--body-timeout", "5")
    try:
        before = [draw(client) for _ in range(10)]
        held = []
        for number in range(200):
            one = socket.create_connection(("127.0.0.1", client.ports[0]))
            one.sendall([b"", b"POST /v1/generations HTTP/1.1\r\nHost: x\r\n", b"POST /v1/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n\r\n{"][number % 3])
            held.append(one)
        during = [draw(client) for _ in range(10)]
        time.sleep(12)
        open_still = 0
        for one in held:
            one.settimeout(0.2)
            try:
                while one.recv(4096):
                    pass
            except TimeoutError:
                open_still += 1
            except OSError:
                pass
        median = lambda all: round(1000 * statistics.median(all))
        return {"median ms before": median(before), "with 200 slow clients": median(during), "still open after 12 s": open_still, "ok": open_still == 0 and median(during) <= 2 * median(before) + 50}
    finally:
        process.kill()
        shutil.rmtree(place, ignore_errors=True)


def draw(client: Client) -> float:
    begun = time.monotonic()
    assert client.once(client.ports[0], "POST", "/v1/images/generations", {"prompt": key(), "size": "64x112", "response_format": "b64_json"}).status == 200
    return time.monotonic() - begun


ALL = [lost_training, paused_worker, handed_back, sqlite_writers, disk_full, out_of_memory, slow_clients, registry, overload, day]


def main() -> int:
    wanted = sys.argv[1:] or [question.__name__ for question in ALL]
    failed = 0
    for question in ALL:
        if question.__name__ in wanted:
            try:
                answer = question()
            except Exception as error:  # a failed measurement must not prevent the others
                answer = {"error": f"{type(error).__name__}: {error}", "ok": False}
            failed += not answer["ok"]
            print(json.dumps({question.__name__: answer}), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
