"""Invariants, checked directly in the database and the store, bypassing the program under test."""

import collections
import hashlib
import json
import random
import re
import time

from client import Client

LOST = "a process that lives"


def living(cluster) -> set[str]:
    """Names in the database of the processes that are running and not stopped. Each process logs its own name."""
    names = set()
    for process in cluster.processes:
        if process.alive() and not getattr(process, "stopped", False):
            text = process.log.read_text(errors="replace")
            found = re.findall(r"process_[0-9a-f]{32}", text[text.rindex("--- start"):])
            names.update(found[:1])
    return names


def orphans(cluster) -> list[dict]:
    """Jobs whose owner is not a running process."""
    here = ", ".join(f"'{name}'" for name in living(cluster)) or "''"
    return cluster.postgres.query(
        f"""SELECT id, status, owner FROM generations WHERE status IN ('queued', 'running')
            AND (owner IS NOT NULL OR status = 'running' OR background = 0) AND coalesce(owner, '') NOT IN ({here})
            UNION ALL SELECT id, status, worker FROM trainings WHERE status = 'running' AND coalesce(worker, '') NOT IN ({here})"""
    )


def always(cluster) -> list[str]:
    """Violations of the invariants that hold at any time."""
    rules = {
        "a generation has two pictures of one index": "SELECT generation_id, idx FROM images GROUP BY 1, 2 HAVING count(*) > 1",
        "a training has made two versions": "SELECT training_id FROM concept_versions WHERE training_id IS NOT NULL GROUP BY 1 HAVING count(*) > 1",
        "a training has succeeded and its version is not there":
            "SELECT t.id FROM trainings t LEFT JOIN concept_versions v ON v.training_id = t.id WHERE t.status = 'succeeded' AND v.number IS NULL",
        "a version is there and its training has not succeeded":
            "SELECT t.id FROM trainings t JOIN concept_versions v ON v.training_id = t.id WHERE t.status <> 'succeeded'",
        "a generation has succeeded and has not all its pictures":
            "SELECT g.id FROM generations g WHERE g.status = 'succeeded' "
            "AND (SELECT count(*) FROM images i WHERE i.generation_id = g.id) <> CAST(CAST(g.request AS json) ->> 'n' AS BIGINT)",
        "a queued generation has pictures": "SELECT g.id FROM generations g JOIN images i ON i.generation_id = g.id WHERE g.status = 'queued'",
        "a generation has ended and does not say when":
            "SELECT id FROM generations WHERE status NOT IN ('queued', 'running') AND finished_at IS NULL",
        "a training has ended and holds a lease":
            "SELECT id FROM trainings WHERE status <> 'running' AND lease_token IS NOT NULL",
        "a concept is in use in a version that it does not have":
            "SELECT c.id FROM concepts c WHERE c.version IS NOT NULL AND NOT EXISTS "
            "(SELECT 1 FROM concept_versions v WHERE v.concept_id = c.id AND v.number = c.version_number AND v.hash = c.version)",
        "one client's request was done twice":
            "SELECT CAST(metadata AS json) ->> 'client' AS client, count(*) FROM generations WHERE status IN ('succeeded', 'queued', 'running') "
            "AND CAST(metadata AS json) ->> 'client' IS NOT NULL GROUP BY 1 HAVING count(*) > 1",
        "two concepts from one request":
            "SELECT CAST(metadata AS json) ->> 'client' AS client FROM concepts WHERE CAST(metadata AS json) ->> 'client' IS NOT NULL "
            "GROUP BY 1 HAVING count(*) > 1",
    }
    found = []
    for rule, sql in rules.items():
        rows = cluster.postgres.query(sql)
        if rows:
            found.append(f"{rule}: {rows[:3]}{' …' if len(rows) > 3 else ''}")
    return found


REFERENCES = (
    "SELECT blob FROM concept_pictures UNION SELECT hash FROM concept_versions UNION SELECT checkpoint FROM trainings "
    "WHERE checkpoint IS NOT NULL UNION SELECT blob FROM training_previews UNION SELECT blob FROM images"
)


def settled(cluster, seconds: float) -> list[str]:
    """Waits until nothing is queued or running; returns the jobs that still are at the timeout."""
    until = time.monotonic() + seconds
    rows = []
    while time.monotonic() < until:
        rows = cluster.postgres.query(
            "SELECT id, status, attempt FROM generations WHERE status IN ('queued', 'running') UNION ALL "
            "SELECT id, status, attempt FROM trainings WHERE status IN ('queued', 'running')"
        )
        if not rows:
            return []
        time.sleep(1)
    return [f"stuck: {row}" for row in rows]


def store(cluster) -> tuple[list[str], list[str]]:
    """(missing or damaged blobs, blobs that no row references)"""
    wanted = {row["blob"] for row in cluster.postgres.query(REFERENCES)}
    objects = cluster.objects()
    wrong = [f"a row names a blob that is not there: {blob}" for blob in wanted - objects.keys()]
    for name in wanted & objects.keys():
        if hashlib.sha256(objects[name].read_bytes()).hexdigest() != name:
            wrong.append(f"a blob has other bytes: {name}")
    return wrong, sorted(objects.keys() - wanted)


def ledger(cluster, load) -> tuple[list[str], dict]:
    """(acknowledged work that is lost, counts of all work). Called at the end, when nothing is running."""
    book, lost, facts = load.ledger, [], collections.Counter()
    rows = {row["id"]: row for row in cluster.postgres.query("SELECT id, status, error, background, attempt FROM generations")}
    images = collections.defaultdict(dict)
    for row in cluster.postgres.query("SELECT generation_id, idx, blob FROM images"):
        images[row["generation_id"]][row["idx"]] = row["blob"]
    for id, known in book.generations.items():
        row = rows.get(id)
        if known.get("deleting"):
            facts["generations deleted"] += 1
            if known.get("deleted") and (row is not None or images.get(id)):
                lost.append(f"{id} was deleted and is there again")
            continue
        if row is None:
            lost.append(f"{id} was acknowledged and is gone")
            continue
        for index, digest in known["images"].items():
            facts["pictures"] += 1
            if images[id].get(index) != digest:
                lost.append(f"picture {index} of {id} ({row['status']}) was acknowledged and is gone: {known}")
        if known["ended"] and known["ended"] != row["status"]:
            lost.append(f"{id} had ended as {known['ended']} and is {row['status']}")
        facts[f"generations {row['status']}"] += 1
        if row["status"] != "succeeded" and not known["ended"] and not known.get("cancelling") and not known.get("listened"):
            lost.append(f"{id} was acknowledged, nobody cancelled it, and it is {row['status']}: {row['error']}")
    trainings = {row["id"]: row for row in cluster.postgres.query("SELECT id, status, error, attempt, resumed_from_step FROM trainings")}
    concepts = {row["id"]: row for row in cluster.postgres.query("SELECT id, name, description, version FROM concepts")}
    for id, entry in book.concepts.items():
        if entry.get("deleting"):
            if entry.get("deleted") and id in concepts:
                lost.append(f"concept {entry['name']} was deleted and is there again")
            continue
        if id not in concepts:
            lost.append(f"concept {entry['name']} was acknowledged and is gone")
            continue
        row = concepts[id]
        if row["name"] not in entry.get("named", [entry["name"]]):
            lost.append(f"concept {id} was named {entry.get('named')} and is {row['name']}")
        if "described" in entry:
            facts["concepts changed"] += 1
            if row["description"] not in entry["described"]:
                lost.append(f"concept {row['name']} was described as {entry['described']} and is {row['description']!r}")
        if entry.get("imported"):
            facts["concepts imported"] += 1
            if row["version"] != entry["hash"]:
                lost.append(f"imported concept {row['name']} has the version {row['version']}, not {entry['hash']}")
        for training in entry["trainings"]:
            row = trainings.get(training)
            facts[f"trainings {row['status'] if row else 'gone'}"] += 1
            if row is None or (row["status"] != "succeeded" and not entry.get("cancelling")):
                lost.append(f"{training} of {entry['name']} was acknowledged and is {row}")
            elif row["resumed_from_step"]:
                facts["trainings that went on from a checkpoint"] += 1
    return lost, dict(facts)


def twice(cluster, load) -> list[str]:
    """Trainings that no client requested. A repeated import needs no check: its name is already taken."""
    found = []
    counts = cluster.postgres.query("SELECT c.id, c.name, count(t.id) AS n FROM concepts c JOIN trainings t ON t.concept_id = c.id GROUP BY 1, 2")
    for row in counts:
        asked = 1 + load.ledger.retrainings[row["id"]]
        if row["n"] > asked:
            found.append(f"concept {row['name']} has {row['n']} trainings, {asked} were asked for")
    return found


def drawn_again(cluster, load, count: int, generator: random.Random) -> tuple[list[str], int]:
    """Generates some acknowledged images again: the same seed must give the same image."""
    wrong, done = [], 0
    ports = [api.port for api in cluster.apis]
    known = [(id, g) for id, g in load.ledger.generations.items() if g["images"] and not g.get("deleting") and g["ended"] == "succeeded"]
    there = {row["name"] for row in cluster.postgres.query("SELECT name FROM concepts")}
    for id, entry in generator.sample(known, min(count, len(known))):
        asked = {name: value for name, value in entry["asked"].items() if name not in ("metadata", "partial_images")}
        if set(asked.get("concepts", [])) - there:
            continue
        client = Client(ports, cluster.keys[entry["tenant"]])
        answer = client.send("POST", "/v1/generations", asked, {"Prefer": "wait=60"})
        if answer is None or answer.status != 200 or answer.json["status"] != "succeeded":
            wrong.append(f"{id} cannot be drawn again: {answer and answer.body[:300]}")
            continue
        rows = cluster.postgres.query(f"SELECT concepts FROM generations WHERE id = '{id}'")
        if not rows:
            continue  # already reported as lost
        before = rows[0]["concepts"]
        versions = lambda listed: [(c["name"], c["version"]) for c in listed]
        if versions(json.loads(before)) != versions(answer.json["concepts"]):
            continue  # the concept has been retrained since
        again = {image["index"]: image["content_hash"] for image in answer.json["images"]}
        if again != entry["images"]:
            wrong.append(f"{id} is drawn differently: {again} {entry['images']}")
        done += 1
    return wrong, done
