"""Concepts: list, show, keep as a file, bring back, versions.

    python examples/python/concepts.py list
    python examples/python/concepts.py show rex
    python examples/python/concepts.py export rex rex.safetensors
    python examples/python/concepts.py import rex.safetensors rex-2
    python examples/python/concepts.py retrain rex
    python examples/python/concepts.py versions rex
    python examples/python/concepts.py rollback rex 1
    python examples/python/concepts.py delete rex

COAR_SERVER names the server (default http://127.0.0.1:8080), COAR_API_KEY the key where the server has keys.
"""

import json
import sys

from coar_client import Coar, CoarError, Concept, Training


def show(thing: Concept | Training) -> None:
    print(json.dumps(thing.raw, indent=2))


def main(client: Coar) -> None:
    match sys.argv[1:]:
        case ["list"]:
            for concept in client.concepts.list():
                print(f"{concept.name:<24} {concept.kind:<8} {concept.status}")
        case ["show", name]:
            show(client.concepts.get(name))
        case ["export", name, file]:
            client.concepts.export(name, file)
        case ["import", file, name]:
            show(client.concepts.import_file(file, name))
        case ["retrain", name]:
            show(client.concepts.retrain(name))
        case ["versions", name]:
            for version in client.concepts.versions(name):
                print(version.number, version.hash)
        case ["rollback", name, version]:
            show(client.concepts.change(name, version=int(version)))
        case ["delete", name]:
            client.concepts.delete(name)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    try:
        with Coar() as server:
            main(server)
    except CoarError as error:
        sys.exit(str(error))
