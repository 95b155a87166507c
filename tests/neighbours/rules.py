"""What the neighbour may notice, and the table."""

import os
import statistics

MIB = 1 << 20
# Of what is fair, and of a request that needs no device: for the noise of a machine with few cores.
TOLERANCE, SLOWER = 1.1, 1.5
# Reads wait for the processor alone, writes for the disk as well.
FLOOR = {"generation": 0.025, "list": 0.025, "read": 0.025, "upload": 0.1, "cancel": 0.1, "delete": 0.1, "webhook": 0.25}
# A median hides a server that answers no more: no request but a generation may take so long.
STALLED = 5.0
MEMORY = 256 * MIB
# Where the server has no quota of bytes.
DISK = int(os.environ.get("DISK", "256")) * MIB
KINDS = ("generation", "list", "read", "upload", "cancel", "delete", "webhook")


def fair(draws: bool, trains: bool, training_share: float) -> float:
    """How many times as long a generation takes in half of the device's time for images; trainings have a share of their own."""
    return (2.0 if draws else 1.0) / (1.0 - training_share if trains else 1.0)


def factor(kind: str, attack, training_share: float) -> float:
    if kind == "generation" and (attack.draws or attack.trains):
        return TOLERANCE * fair(attack.draws, attack.trains, training_share)
    return SLOWER


def judge(attack, alone: dict, beside: dict, memory: dict, disk: int, quota: int, training_share: float, ended: list) -> dict:
    """The row of an attack, with what exceeds a limit in `exceeded`."""
    row, exceeded = {"kinds": {}}, list(ended)
    for kind in KINDS:
        before, during = alone["times"].get(kind, []), beside["times"].get(kind, [])
        if not before:
            exceeded.append(f"{kind}: none in the time alone")
            continue
        if not during:
            # Only what was never begun, because the requests before it took all of the time.
            continue
        base, now = statistics.median(before), statistics.median(during)
        floor = 0.0 if kind == "generation" and (attack.draws or attack.trains) else FLOOR[kind]
        most = factor(kind, attack, training_share) * base + floor
        row["kinds"][kind] = {
            "alone": base, "beside": now, "ratio": now / base if base > 0.001 else 1.0, "limit": most, "worst": max(during),
            "count": [len(before), len(during)],
        }
        if now > most:
            exceeded.append(f"{kind} {now * 1000:.0f} ms, limit {most * 1000:.0f}")
        if kind not in ("generation", "webhook") and max(during) > STALLED:
            exceeded.append(f"{kind}: one took {max(during):.1f} s, limit {STALLED:.0f}")
    counts = beside["counts"]
    for what, count in counts.items():
        if count and what != "hooks missing":
            exceeded.append(f"{count} {what}")
    growth = max(entry["growth"] for entry in memory.values())
    if growth > MEMORY:
        exceeded.append(f"memory +{growth // MIB} MiB")
    if disk > quota:
        exceeded.append(f"disk +{disk // MIB} MiB, limit {quota // MIB}")
    row |= {"counts": counts, "problems": beside["problems"], "memory": memory, "disk": disk, "exceeded": exceeded}
    return row


def milliseconds(entry: dict | None) -> str:
    return f"{entry['alone'] * 1000:.0f}>{entry['beside'] * 1000:.0f}" if entry else "-"


def attacker(counts: dict) -> str:
    """Its answers by the first digit; 429 alone."""
    groups = {"ok": 0, "429": 0, "4xx": 0, "5xx": 0, "none": 0}
    for what, count in counts.items():
        status = what.split(" ")[1] if what.startswith("waited") else what[:3]
        group = "429" if status == "429" else {"2": "ok", "4": "4xx", "5": "5xx"}.get(status[:1], "none")
        groups[group] += count
    return " ".join(f"{count} {name}" for name, count in groups.items() if count) or "nothing"


HEAD = (
    f"{'attack':14} {'generation':>12} {'list':>9} {'read':>9} {'upload':>11} {'cancel':>9} {'delete':>9} {'webhook':>10}"
    f" {'5xx':>4} {'ref.':>4} {'none':>4} {'peak':>6} {'+MiB':>6} {'disk':>6}  attacker"
)


def line(name: str, row: dict) -> str:
    kinds, counts = row["kinds"], row["counts"]
    cell = lambda kind, width: f"{milliseconds(kinds.get(kind)):>{width}}"
    peak = max(entry["peak"] for entry in row["memory"].values()) // MIB
    growth = max(entry["growth"] for entry in row["memory"].values()) // MIB
    return (
        f"{name:14} {cell('generation', 12)} {cell('list', 9)} {cell('read', 9)} {cell('upload', 11)} {cell('cancel', 9)}"
        f" {cell('delete', 9)} {cell('webhook', 10)} {counts['5xx']:>4} {counts['refused'] + counts['wrong']:>4}"
        f" {counts['unanswered']:>4} {peak:>6} {growth:>6} {row['disk'] // MIB:>6}  {attacker(row['attacker']['counts'])}"
    )
