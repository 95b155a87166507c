"""`main.py sqlite|cluster`: one attack after the other, each on a server of its own: the neighbour alone, then beside the attack.

SECONDS (60) for each attack, ONLY (names, with commas), KEEP=1 (leaves the folders). Exits with 1 when a limit is exceeded.
"""

import base64
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import rules
import system
from attacks import ATTACKS
from neighbour import IMAGE

from client import Client, form

HERE = pathlib.Path(__file__).resolve().parent


class Helper:
    """A Python process that is spoken to in lines of JSON."""

    def __init__(self, script: str, asked: dict):
        self.child = subprocess.Popen(
            [sys.executable, str(HERE / script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.say(json.dumps(asked))

    def say(self, line: str) -> None:
        self.child.stdin.write(line + "\n")
        self.child.stdin.flush()

    def hear(self, seconds: float) -> dict:
        """Its next line; RuntimeError where it does not come."""
        timer = threading.Timer(seconds, self.child.kill)
        timer.start()
        try:
            line = self.child.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            raise RuntimeError(f"{self.child.args[1]} ended with {self.child.wait()}")
        return json.loads(line)

    def end(self) -> None:
        self.child.kill()
        self.child.wait()


def concept(mode: str) -> bytes:
    """A small trained concept's file, which both tenants import."""
    running = system.make(mode)
    try:
        running.start()
        client = trained(running, "ink")
        return client.send("GET", "/v1/concepts/ink/weights").body
    finally:
        system.remove(running)


def trained(running, name: str) -> Client:
    """Trains a style of one small image, of the neighbour's."""
    client = Client(running.ports, running.keys["neighbour"])
    body, content_type = form([("name", name), ("kind", "style"), ("steps", 4), ("images", IMAGE)])
    made = client.send("POST", "/v1/concepts", body, {"Content-Type": content_type})
    assert made.status == 202, made.body
    until = time.monotonic() + 120
    while client.send("GET", f"/v1/concepts/{name}").json["status"] != "ready":
        assert time.monotonic() < until, "the concept is not trained"
        time.sleep(0.2)
    return client


def quota(settings: dict) -> int:
    """The bytes that a tenant may keep, by the settings of the binary; a limit of this suite's own where it has none."""
    for name, value in settings.items():
        if re.fullmatch(r"quota_(storage|bytes|disk|space)(_mib)?", name) and isinstance(value, float) and value > 0:
            return int(value) * rules.MIB
    return rules.DISK


def attacked(mode: str, name: str, seconds: float, file: bytes, settings: dict) -> dict:
    running = system.make(mode)
    helpers = []
    try:
        running.start()
        # A training takes `training_memory`, whoever has it trained: that is no growth. In a cluster each worker has one.
        usual, idle = {}, system.Memory(running.processes)
        for number in range(len(running.processes) if ATTACKS[name].trains else 0):
            trained(running, f"usual-{number}").send("DELETE", f"/v1/concepts/usual-{number}")
            usual = idle.after()
        shared = {"ports": running.ports, "file": base64.b64encode(file).decode()}
        neighbour = Helper("neighbour.py", {**shared, "key": running.keys["neighbour"], "concept": "ink"})
        attack = Helper("attacks.py", {**shared, "key": running.keys["attacker"], "attack": name, "seconds": seconds})
        helpers = [neighbour, attack]
        ready = attack.hear(180)
        alone_for = max(8.0, seconds / 3)
        neighbour.say("3")
        neighbour.hear(60)
        neighbour.say(str(alone_for))
        alone = neighbour.hear(alone_for + 120)
        trouble = [problem for problem in alone["problems"]]
        if trouble:
            raise RuntimeError(f"the neighbour has trouble alone: {trouble[:3]}")
        disk, memory, load = running.disk(), system.Memory(running.processes, usual), os.getloadavg()[0]
        attack.say("go")
        neighbour.say(str(seconds))
        beside = neighbour.hear(seconds + 180)
        counts = attack.hear(seconds + 60)
        grown = running.disk() - disk
        row = rules.judge(
            ATTACKS[name], alone, beside, memory.after(), grown, quota(settings), float(settings["training_share"]), system.ended(running)
        )
        return row | {"attacker": counts, "setup": ready["setup"], "load": load}
    finally:
        for helper in helpers:
            helper.end()
        system.remove(running)


def main() -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    mode, seconds = sys.argv[1], float(os.environ.get("SECONDS", "60"))
    only = [name for name in os.environ.get("ONLY", "").split(",") if name]
    unknown = set(only) - ATTACKS.keys()
    if unknown or mode not in ("sqlite", "cluster"):
        raise SystemExit(f"unknown: {', '.join(unknown) or mode}; attacks are {', '.join(ATTACKS)}; modes are sqlite, cluster")
    settings = system.settings()
    print(f"{mode}: {seconds:.0f} s for each attack; milliseconds alone>beside the attack; memory and disk in MiB", flush=True)
    file, rows = concept(mode), {}
    print(rules.HEAD, flush=True)
    for name in only or ATTACKS:
        try:
            rows[name] = attacked(mode, name, seconds, file, settings)
        except (RuntimeError, TimeoutError, AssertionError) as error:
            rows[name] = {"exceeded": [f"{type(error).__name__}: {error}"]}
            print(f"{name:14} {rows[name]['exceeded'][0]}", flush=True)
            continue
        print(rules.line(name, rows[name]), flush=True)
    print()
    for name, row in rows.items():
        print(f"{'EXCEEDED' if row['exceeded'] else 'ok':9} {name:14} {'; '.join(row['exceeded'])}")
        for problem in sorted(set(row.get("problems", [])))[:5]:
            print(f"{'':25}{row['problems'].count(problem)} x {problem}")
    target = system.ROOT / "target"
    target.mkdir(exist_ok=True)
    (target / f"neighbours-{mode}.json").write_text(json.dumps({"seconds": seconds, "settings": settings, "attacks": rows}, indent=1))
    failed = any(row["exceeded"] for row in rows.values())
    print("FAILED" if failed else "passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
