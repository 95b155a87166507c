"""API processes and workers on PostgreSQL and S3: rolling restart, backup and restore, checksums, garbage collection."""

import os
import subprocess
import sys
import tempfile
import threading
import time

import boto3

from common import Server, draw, pixels_hash, register, run, said, wait_concept

coar = sys.argv[1]
admin = os.environ["COAR_TEST_DATABASE"]
base, bucket = admin.rsplit("/", 1)[0], os.environ["COAR_TEST_BLOBS"].removeprefix("s3://")
pg = os.environ["COAR_TEST_POSTGRES_BIN"]
s3 = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
home = tempfile.mkdtemp()


def database(name):
    subprocess.run([f"{pg}/psql", admin, "-qc", f"CREATE DATABASE {name}"], check=True)
    return {"COAR_DATABASE": f"{base}/{name}", "COAR_BLOBS": f"s3://{bucket}/{name}", "COAR_DATA": home}


def keys(prefix):
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
    return [found["Key"] for page in pages for found in page.get("Contents", [])]


def worker(env):
    return Server(coar, ["--role", "worker"], env, "--worker-listen")


def api(env):
    return Server(coar, ["--role", "api"], env)


first = database("operations")
workers, apis = [worker(first) for _ in range(2)], [api(first) for _ in range(2)]
for server in workers + apis:
    server.ready()
register(apis[0], "rex", 4)
wait_concept(apis[1], "rex")
before, path = draw(apis[1], "a photo of <rex> cat in the snow", 7)
assert draw(apis[0], "a photo of <rex> cat in the snow", 7)[0] == before
said("a concept registered at one API process is used through another; the picture is the same")

# Rolling restart: callers use any API process that answers, as behind a load balancer.
stop, answered, failed = threading.Event(), [], []


def ask():
    seed = 1000
    while not stop.is_set():
        seed += 1
        for attempt in range(40):
            server = apis[(seed + attempt) % 2]
            try:
                body = {"prompt": "a dog", "seed": seed, "response_format": "b64_json"}
                status, answer = server.request("POST", "/v1/images/generations", body)
            except OSError:
                # This process no longer listens: a load balancer would try the other one.
                time.sleep(0.05)
                continue
            if status == 503:
                time.sleep(0.05)
                continue
            (answered if status == 200 else failed).append((seed, status, answer))
            break
        else:
            failed.append((seed, "nobody answered", None))


asking = threading.Thread(target=ask)
asking.start()
register(apis[0], "max", 300)
time.sleep(1)
handed_back = []
for index in range(2):
    new = worker(first).ready()
    old, workers[index] = workers[index], new
    handed_back.append(old.stop())
    time.sleep(1)
for index in range(2):
    new = api(first).ready()
    old, apis[index] = apis[index], new
    old.stop()
time.sleep(1)
stop.set()
asking.join()
assert not failed, failed[:3]
assert len(answered) > 5, len(answered)
wait_concept(apis[0], "max", seconds=240)
attempts = apis[0].get(f"/v1/trainings/{apis[0].get('/v1/concepts/max')['training']['id']}")
assert attempts["resumed_from_step"] > 0 or attempts["attempt"] == 1, attempts
said(f"every process restarted one by one: {len(answered)} requests, none failed; the training went on "
     f"(attempt {attempts['attempt']}, from step {attempts['resumed_from_step']}); workers ended in "
     f"{', '.join(f'{seconds:.1f} s' for seconds in handed_back)}")

# Backup in the order bucket, database, bucket; restored elsewhere.
second = database("restored")


def copy_bucket():
    for key in keys("operations"):
        s3.copy_object(Bucket=bucket, Key=key.replace("operations/", "restored/", 1), CopySource={"Bucket": bucket, "Key": key})


copy_bucket()
dump = subprocess.run([f"{pg}/pg_dump", "--no-owner", first["COAR_DATABASE"]], check=True, capture_output=True).stdout
copy_bucket()
subprocess.run([f"{pg}/psql", "-q", "-v", "ON_ERROR_STOP=1", second["COAR_DATABASE"]], input=dump, check=True, stdout=subprocess.DEVNULL)
for server in apis + workers:
    server.stop()
found = run(coar, "admin", "verify", env=second)
assert ", 0 faults" in found, found
servers = [worker(second).ready(), api(second).ready()]
assert servers[1].request("GET", path)[1] == before
assert pixels_hash(draw(servers[1], "a photo of <rex> cat in the snow", 7)[0]) == pixels_hash(before)
queue = run(coar, "admin", "queue", env=second)
assert "worker" in queue and "api" in queue, queue
said("a dump and a copy of the bucket, restored: the same concept, pictures and addresses")

# Garbage collection while processes are running.
s3.put_object(Bucket=bucket, Key=f"restored/ab/{'ab' * 32}", Body=b"left by a crash")
assert run(coar, "admin", "gc", env=second).startswith("1 blobs removed")
for server in servers:
    server.stop()
victim = keys("restored")[0]
body = bytearray(s3.get_object(Bucket=bucket, Key=victim)["Body"].read())
body[len(body) // 2] ^= 1
s3.put_object(Bucket=bucket, Key=victim, Body=bytes(body))
found = run(coar, "admin", "verify", env=second, fails=True)
assert victim.rsplit("/", 1)[1] in found, found
said("garbage is removed beside running processes; a flipped bit is found and named")
