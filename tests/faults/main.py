"""Starts the system and its clients, injects faults, and checks that nothing was lost.

SEED (1), FAULTS (200), MINUTES (0: no limit), ONLY (names of faults, separated by commas), KEEP=1 (keeps the folder).
"""

import collections
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import threading
import time

import checks
import faults
from client import Client, key
from cluster import ROOT, Cluster, run
from load import Load

# Maximum time to recovery, in seconds.
RECOVERY = 10.0
# All tenants share two workers.
TENANTS = ("north", "south", *(f"tenant-{number:02}" for number in range(3, 17)))
GIVE_UP = 90.0


def probe(cluster, seconds: float) -> bool:
    """Whether a new image can be generated now through either API process, as a load balancer would see it."""
    drawn = threading.Event()

    def ask(port: int):
        client = Client([port], cluster.keys["north"])
        try:
            answer = client.once(port, "POST", "/v1/generations", {"prompt": f"probe {key()}", "size": "64x112"}, timeout=seconds)
            if answer.status == 200 and answer.json["status"] == "succeeded":
                drawn.set()
        except (OSError, ValueError, KeyError):
            pass
        except Exception:  # http.client's exceptions
            pass

    threads = [threading.Thread(target=ask, args=(api.port,), daemon=True) for api in cluster.apis]
    for thread in threads:
        thread.start()
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(thread.is_alive() for thread in threads):
        if drawn.wait(0.05):
            return True
    return drawn.is_set()


def recover(cluster) -> tuple[float, str]:
    """Seconds until an image can be generated and every job has a live owner, with details; after GIVE_UP, what is missing."""
    begun = time.monotonic()
    drawn, left = None, None
    probing: list = []

    def again():
        while drawn is None and time.monotonic() - begun < GIVE_UP:
            if probe(cluster, 5):
                probing.append(time.monotonic() - begun)
                return
            time.sleep(0.1)

    threads = [threading.Thread(target=again, daemon=True) for _ in range(2)]
    for number, thread in enumerate(threads):
        thread.start()
        time.sleep(0.2 * number)
    clear = None
    while time.monotonic() - begun < GIVE_UP:
        if clear is None:
            left = checks.orphans(cluster)
            if not left:
                clear = time.monotonic() - begun
        if probing and clear is not None:
            return max(min(probing), clear), f"picture {min(probing):.1f} s, jobs {clear:.1f} s"
        time.sleep(0.15)
    return GIVE_UP, f"not recovered: a picture {'drawn' if probing else 'NOT drawn'}, jobs without anybody: {left}"


def choose(count: int, seed: int) -> list:
    generator = random.Random(seed)
    only = os.environ.get("ONLY", "")
    table = {fault: weight for fault, weight in faults.FAULTS.items() if not only or fault.__name__ in only.split(",")}
    return generator.choices(list(table), list(table.values()), k=count)


def watch(cluster, log: list) -> None:
    """Restarts processes that have exited on their own, as a supervisor would, and logs unexpected exits."""
    for process in cluster.processes:
        if process.child is not None and not process.alive() and process.child.returncode not in (0, -9, -15):
            text = process.log.read_text(errors="replace")
            served = ": ready " in text[text.rindex("--- start"):]
            # At startup a process exits if it cannot reach its database; later it must survive that.
            if served or process.child.returncode != 1:
                log.append(f"{process.name} ended with {process.child.returncode}")
            process.start()


def main() -> int:
    # In a background process of a shell, SIGINT is ignored by default.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    seed, count = int(os.environ.get("SEED", "1")), int(os.environ.get("FAULTS", "200"))
    minutes = float(os.environ.get("MINUTES", "0"))
    folder = pathlib.Path(tempfile.mkdtemp(prefix="coar-faults-"))
    print(f"SEED={seed} FAULTS={count} in {folder}", flush=True)
    cluster = Cluster(folder, tenants=TENANTS)
    cluster.start()
    pictures = [path.read_bytes() for path in sorted((ROOT / "concepts").glob("*/1.png"))[:4]]
    load = Load([api.port for api in cluster.apis], cluster.keys, pictures, seed)
    load.start()
    time.sleep(5)
    context = faults.Context(cluster, load, random.Random(seed + 1))
    begun, results, problems = time.monotonic(), [], []
    try:
        for number, fault in enumerate(choose(count, seed), 1):
            if minutes and time.monotonic() - begun > 60 * minutes:
                break
            time.sleep(context.random.uniform(0.1, 1))
            what = fault(context)
            if what.startswith(("SKIPPED", "no ")):
                print(f"{number:4} {fault.__name__:20} {what}", flush=True)
            seconds, how = recover(cluster)
            results.append((fault.__name__, seconds))
            late = "" if seconds <= RECOVERY else "  LATE"
            print(f"{number:4} {fault.__name__:20} {seconds:6.1f} s  {what} ({how}){late}", flush=True)
            watch(cluster, problems)
            if number % 10 == 0:
                wrong = checks.always(cluster)
                problems += wrong
                for line in wrong:
                    print(f"     WRONG  {line}", flush=True)
    except KeyboardInterrupt:
        print("interrupted: what was so far", flush=True)
    finally:
        load.finish()
    return report(cluster, load, results, problems, time.monotonic() - begun, seed)


def report(cluster, load, results, problems, seconds, seed) -> int:
    for process in cluster.processes:
        if not process.alive():
            process.start()
    for process in cluster.processes:
        process.wait_ready()
    print("settling", flush=True)
    stuck = checks.settled(cluster, 180)
    wrong = checks.always(cluster)
    lost, facts = checks.ledger(cluster, load)
    twice = checks.twice(cluster, load) + [line for line in wrong if "twice" in line or "two" in line]
    again, redrawn = checks.drawn_again(cluster, load, 30, random.Random(seed))
    # Blobs that a process had stored when it was killed are held for half an hour, so the collector keeps them. End the holds now.
    cluster.postgres.execute("UPDATE blob_holds SET expires_at = 1")
    removed = run(["admin", "gc"], cluster.direct) if "gc" in commands() else "coar admin gc is not there"
    damaged, orphans = checks.store(cluster)
    times = sorted(seconds for _, seconds in results)
    late = [(name, round(seconds, 1)) for name, seconds in results if seconds > RECOVERY]
    share = lambda part: times[min(len(times) - 1, int(part * len(times)))] if times else 0.0
    by_fault = collections.defaultdict(list)
    for name, taken in results:
        by_fault[name].append(taken)
    for name, taken in sorted(by_fault.items()):
        print(f"  {name:20} {len(taken):4}  median {sorted(taken)[len(taken) // 2]:5.1f} s  worst {max(taken):5.1f} s")
    print(f"{len(results)} faults in {seconds / 60:.1f} min, SEED={seed}")
    print(f"recovery: median {share(0.5):.1f} s, 90 % {share(0.9):.1f} s, 99 % {share(0.99):.1f} s, worst {times[-1] if times else 0:.1f} s; {len(late)} later than {RECOVERY:.0f} s {late}")
    print(f"acknowledged: {facts}")
    print(f"clients were told: {dict(sorted(load.ledger.counts.items()))}")
    print(f"drawn again and equal: {redrawn - len(again)} of {redrawn}")
    print(f"collector: {removed}; blobs that no row names: {len(orphans)}")
    findings = {
        "lost": lost + damaged + again, "twice": twice, "stuck": stuck, "wrong": wrong + problems, "surprises": load.ledger.surprises,
        "orphan blobs": orphans if "not there" not in removed else [],
    }
    for name, lines in findings.items():
        print(f"{name}: {len(lines)}")
        for line in lines[:20]:
            print(f"    {line}")
    (ROOT / "target").mkdir(exist_ok=True)
    (ROOT / "target/faults.json").write_text(json.dumps({"seed": seed, "results": results, "facts": facts, "findings": findings}, indent=1))
    failed = any(findings.values()) or bool(late)
    cluster.stop()
    if failed or os.environ.get("KEEP"):
        print(f"logs: {cluster.folder}")
    else:
        shutil.rmtree(cluster.folder, ignore_errors=True)
    print("FAILED" if failed else "passed")
    return 1 if failed else 0


def commands() -> str:
    try:
        return run(["admin", "--help"], {})
    except RuntimeError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
