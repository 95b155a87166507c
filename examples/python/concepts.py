"""Concepts over plain HTTP: list, show, keep as a file, bring back, versions.

    python examples/python/concepts.py list
    python examples/python/concepts.py show rex
    python examples/python/concepts.py export rex rex.safetensors
    python examples/python/concepts.py import rex.safetensors rex-2
    python examples/python/concepts.py retrain rex
    python examples/python/concepts.py versions rex
    python examples/python/concepts.py rollback rex 1
    python examples/python/concepts.py delete rex
"""

import json
import os
import pathlib
import sys
import uuid
from urllib.parse import quote

import requests

SERVER = os.environ.get("COAR_SERVER", "http://127.0.0.1:8080").rstrip("/")
SESSION = requests.Session()
if "COAR_API_KEY" in os.environ:
    SESSION.headers["Authorization"] = f"Bearer {os.environ['COAR_API_KEY']}"


def call(method: str, path: str, **more) -> requests.Response:
    """One request; what the server refuses ends the program with the server's own sentence."""
    answer = SESSION.request(method, SERVER + path, timeout=60, **more)
    if not answer.ok:
        error = answer.json()["error"]
        sys.exit(f"{error['message']} ({error['code']}, request {error['request_id']})")
    return answer


def pages(path: str):
    """Every entry of a list, newest first."""
    after = None
    while True:
        page = call("GET", path, params={"limit": 100, "after": after}).json()
        yield from page["data"]
        if not page.get("has_more"):
            return
        after = page["data"][-1]["id"]


def concept(name: str) -> str:
    return f"/v1/concepts/{quote(name, safe='')}"


def show(value) -> None:
    print(json.dumps(value, indent=2))


def main() -> None:
    # A request that creates something carries a key of its own: sent again after a broken connection, it creates nothing twice.
    once = {"Idempotency-Key": str(uuid.uuid4())}
    match sys.argv[1:]:
        case ["list"]:
            for entry in pages("/v1/concepts"):
                print(f"{entry['name']:<24} {entry['kind']:<8} {entry['status']}")
        case ["show", name]:
            show(call("GET", concept(name)).json())
        case ["export", name, file]:
            pathlib.Path(file).write_bytes(call("GET", concept(name) + "/weights").content)
        case ["import", file, name]:
            body = pathlib.Path(file).read_bytes()
            headers = once | {"Content-Type": "application/octet-stream"}
            show(call("POST", "/v1/concepts/import", params={"name": name}, data=body, headers=headers).json())
        case ["retrain", name]:
            show(call("POST", concept(name) + "/trainings", json={}, headers=once).json())
        case ["versions", name]:
            for version in pages(concept(name) + "/versions"):
                print(version["number"], version["hash"])
        case ["rollback", name, version]:
            show(call("PATCH", concept(name), json={"version": int(version)}).json())
        case ["delete", name]:
            call("DELETE", concept(name))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
