"""One process, SQLite and a folder: backup under load, restore, checksums, removal of a tenant."""

import os
import shutil
import sqlite3
import sys
import tempfile
import threading

from common import Server, draw, pixels_hash, register, run, said, wait_concept

coar = sys.argv[1]
home = tempfile.mkdtemp()
data, copy = f"{home}/data", f"{home}/copy"


def tables(path):
    with sqlite3.connect(path) as database:
        names = [row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name: database.execute(f"SELECT * FROM {name}").fetchall() for name in names if name[0] != "_"}


server = Server(coar, ["--data", data]).ready()
register(server, "rex", 4)
wait_concept(server, "rex")
before, path = draw(server, "a photo of <rex> cat in the snow", 7)

# Backup under load, as described in docs/howto/backup.md.
stop, drawn = threading.Event(), []


def work():
    seed = 100
    while not stop.is_set():
        seed += 1
        drawn.append(draw(server, "a dog", seed))


worker = threading.Thread(target=work)
worker.start()
os.makedirs(copy)
shutil.copytree(f"{data}/blobs", f"{copy}/blobs", dirs_exist_ok=True)
with sqlite3.connect(f"{data}/coar.sqlite") as source, sqlite3.connect(f"{copy}/coar.sqlite") as target:
    source.backup(target)
shutil.copytree(f"{data}/blobs", f"{copy}/blobs", dirs_exist_ok=True)
stop.set()
worker.join()
assert drawn, "nothing was drawn during the backup"
server.stop()

found = run(coar, "admin", "verify", "--data", copy)
assert ", 0 faults" in found, found
restored = Server(coar, ["--data", copy]).ready()
assert restored.get("/v1/concepts/rex")["status"] == "ready"
assert restored.request("GET", path)[1] == before, "a signed address of the backup opens the same picture"
again, _ = draw(restored, "a photo of <rex> cat in the snow", 7)
assert pixels_hash(again) == pixels_hash(before), "the concept draws the same picture"
restored.stop()
said(f"backup while {len(drawn)} pictures were drawn; restored: the same concept, pictures and addresses")

# Checksums.
blobs = [f"{folder}/{name}" for folder, _, names in os.walk(f"{copy}/blobs") for name in names]
victim = blobs[0]
bytes_ = bytearray(open(victim, "rb").read())
bytes_[len(bytes_) // 2] ^= 1
open(victim, "wb").write(bytes_)
found = run(coar, "admin", "verify", "--data", copy, fails=True)
assert "FAIL" in found and os.path.basename(victim) in found, found
said("a flipped bit is found and named")

# Garbage.
orphan = f"{data}/blobs/ab/{'ab' * 32}"
os.makedirs(os.path.dirname(orphan), exist_ok=True)
open(orphan, "wb").write(b"left by a crash")
assert run(coar, "admin", "gc", "--data", data).startswith("1 blobs removed")
assert not os.path.exists(orphan)
said("what nothing refers to is removed")

# A tenant is removed completely.
key = run(coar, "keys", "create", "--tenant", "acme", "--data", data).splitlines()
key = next(line for line in key if line.startswith("coar_"))
other = run(coar, "keys", "create", "--tenant", "default", "--data", data).splitlines()
other = next(line for line in other if line.startswith("coar_"))
server = Server(coar, ["--data", data]).ready()
blobs_before = {name for _, _, names in os.walk(f"{data}/blobs") for name in names}
register(server, "secret", 4, key, ["concepts/rex/4.png", "concepts/rex/5.png"])
wait_concept(server, "secret", key)
draw(server, "a photo of <secret> cat on the beach", 3, key)
register(server, "mine", 4, other)
in_use = run(coar, "admin", "delete-tenant", "acme", "--yes", "--data", data, fails=True)
assert "stop it" in in_use, in_use
wait_concept(server, "mine", other)
server.stop()
tenant = next(row for row in tables(f"{data}/coar.sqlite")["tenants"] if "acme" in row)[0]
assert "--yes" in run(coar, "admin", "delete-tenant", "acme", "--data", data, fails=True)
run(coar, "admin", "delete-tenant", "acme", "--yes", "--data", data)
left = {name: [row for row in rows if tenant in map(str, row)] for name, rows in tables(f"{data}/coar.sqlite").items()}
assert not any(left.values()), left
run(coar, "admin", "gc", "--data", data)
found = run(coar, "admin", "verify", "--data", data)
assert ", 0 faults" in found, found
named = {str(value) for rows in tables(f"{data}/coar.sqlite").values() for row in rows for value in row}
blobs_after = {name for _, _, names in os.walk(f"{data}/blobs") for name in names}
assert blobs_after <= named, "every blob that is left is named by a row"
server = Server(coar, ["--data", data]).ready()
assert server.request("GET", "/v1/concepts", key=key)[0] == 401
assert wait_concept(server, "mine", other)
server.stop()
said("a removed tenant leaves no row, no blob and no key; others keep what is theirs")
shutil.rmtree(home)
