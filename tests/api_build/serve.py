"""An API process without libtorch beside a worker that has it."""

import os
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "../operations"))
from common import Server, draw, register, said, wait_concept

without, whole = sys.argv[1:3]
admin = os.environ["COAR_TEST_DATABASE"]
subprocess.run([f"{os.environ['COAR_TEST_POSTGRES_BIN']}/psql", admin, "-qc", "CREATE DATABASE api_build"], check=True)
env = {
    "COAR_DATABASE": f"{admin.rsplit('/', 1)[0]}/api_build",
    "COAR_BLOBS": f"{os.environ['COAR_TEST_BLOBS']}/api_build",
    "COAR_DATA": tempfile.mkdtemp(),
}
worker = Server(whole, ["--role", "worker"], env, "--worker-listen").ready()
api = Server(without, ["--role", "api"], env).ready()
register(api, "rex", 4)
wait_concept(api, "rex")
image, _ = draw(api, "a photo of <rex> cat in the snow", 7)
assert image.startswith(b"\x89PNG"), image[:16]
said("an API process without libtorch registers, trains and draws through a worker")

# The API process counts tokens itself, including the concept's, without reading the concept's file.
validate = "/v1/generations?validate_only=true"
status, answer = api.request("POST", validate, {"prompt": "a cat " * 300})
assert status == 400 and answer["error"]["param"] == "prompt", (status, answer)
status, plan = api.request("POST", validate, {"prompt": "a photo of <rex> cat", "n": 2})
assert status == 200 and plan["usage"]["output_tokens"] == 2 * 144, (status, plan)
said("and counts tokens without asking it")
for server in (api, worker):
    server.stop()
