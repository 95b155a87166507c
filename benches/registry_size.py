"""Bytes of the database per concept and per picture: fills a SQLite file made by the migrations with rows of usual length.

Usage: registry_size.py [ROWS]
"""

import hashlib
import json
import os
import pathlib
import sqlite3
import sys
import tempfile
import uuid

ROWS = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
ROOT = pathlib.Path(__file__).resolve().parent.parent
TENANT = "tenant_" + "0" * 32
NOW = 1_760_000_000_000


def name(kind):
    return f"{kind}_{uuid.uuid4().hex}"


def digest():
    return hashlib.sha256(os.urandom(16)).hexdigest()


def losses(points):
    number = lambda at: 4.123456716537476 - at / 1000
    curve = [{"step": 2 * at, "total": number(at), "next_token": number(at), "prior": number(at),
              "regularisation": 0.000123456789} for at in range(points)]
    return json.dumps(curve, separators=(",", ":"))


def columns(connection, table, **values):
    fields = ", ".join(values)
    marks = ", ".join("?" for _ in values)
    connection.execute(f"INSERT INTO {table} ({fields}) VALUES ({marks})", list(values.values()))


def concept(connection, points):
    concept, training, version = name("concept"), name("training"), digest()
    columns(connection, "concepts", id=concept, tenant_id=TENANT, name=concept[-12:], kind="subject", class_noun="dog",
            metadata="{}", version=version, version_number=1, created_at=NOW, updated_at=NOW)
    for position in range(5):
        columns(connection, "concept_pictures", concept_id=concept, position=position, blob=digest())
    columns(connection, "trainings", id=training, tenant_id=TENANT, concept_id=concept, status="succeeded",
            spec="x" * 600, input_fingerprint=digest(), version=1, step=1000, total_steps=1000, loss=4.1,
            losses=losses(points) if points else None, report="x" * 500, attempt=1, created_at=NOW, started_at=NOW,
            finished_at=NOW)
    columns(connection, "concept_versions", concept_id=concept, number=1, hash=version, training_id=training,
            input_fingerprint=digest(), created_at=NOW)
    for step in range(4):
        columns(connection, "training_previews", training_id=training, step=step, blob=digest(), created_at=NOW)


def picture(connection):
    generation = name("generation")
    used = [{"name": "rex", "kind": "subject", "version": 1, "hash": digest()}]
    columns(connection, "generations", id=generation, tenant_id=TENANT, status="succeeded", background=0,
            prompt="a photo of <rex> on the beach", request="x" * 290, concepts=json.dumps(used), done=1024, total=1024,
            usage='{"text_tokens":20,"image_tokens":1024}', attempt=1, created_at=NOW, started_at=NOW, finished_at=NOW)
    columns(connection, "images", id=name("image"), tenant_id=TENANT, generation_id=generation, idx=0, seed=1, width=512,
            height=512, blob=digest(), content_type="image/png", created_at=NOW)


def measure(fill):
    with tempfile.TemporaryDirectory() as folder:
        connection = sqlite3.connect(f"{folder}/coar.sqlite")
        for file in sorted((ROOT / "migrations/sqlite").glob("*.sql")):
            connection.executescript(file.read_text())
        size = lambda: [connection.execute(f"PRAGMA page_{what}").fetchone()[0] for what in ("count", "size")]
        pages, page = size()
        for _ in range(ROWS):
            fill(connection)
        connection.commit()
        return (size()[0] - pages) * page / ROWS


print(f"a concept, without its training's loss curve   {measure(lambda c: concept(c, 0)):9.0f} bytes")
print(f"a concept, with a curve of 500 points          {measure(lambda c: concept(c, 500)):9.0f} bytes")
print(f"a picture                                      {measure(picture):9.0f} bytes")
