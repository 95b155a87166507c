"""A subject from five pictures, and then drawn somewhere new.

    pip install -r examples/python/requirements.txt
    python examples/python/quickstart.py

COAR_SERVER names the server (default http://127.0.0.1:8080), COAR_API_KEY the key where the server has keys.
"""

import pathlib
import sys

from coar_client import Coar, CoarError, Conflict

PICTURES = pathlib.Path(__file__).resolve().parents[2] / "concepts" / "rex"


def register(client: Coar) -> None:
    """Registers rex and waits until it can be drawn."""
    try:
        client.concepts.add("rex", sorted(PICTURES.glob("*.png")), class_="cat", progress=True)
    except Conflict as taken:
        print(f"rex: {taken.message}")
        concept = client.concepts.get("rex")
        if concept.status != "ready" and concept.training:
            client.trainings.wait(concept.training, progress=True)


def main(client: Coar) -> None:
    register(client)
    # A concept is used by writing <name>.
    for image in client.generate("a photo of <rex> cat on the beach", n=2, seed=1, guidance_scale=2.0):
        print(image.save(f"rex-{image.index}.png"))
    # Concepts that the prompt does not name are placed in it.
    generation = client.generations.create("a photo of a cat in the snow", concepts=["rex"])
    print(generation.images[0].url)


if __name__ == "__main__":
    try:
        with Coar() as server:
            main(server)
    except CoarError as error:
        sys.exit(str(error))
