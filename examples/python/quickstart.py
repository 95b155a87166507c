"""A subject from five pictures, and then drawn somewhere new, with the official OpenAI package.

    pip install -r examples/python/requirements.txt
    python examples/python/quickstart.py

COAR_SERVER names the server (default http://127.0.0.1:8080), COAR_API_KEY the key where the server has keys.
"""

import base64
import os
import pathlib
import sys
import time

import openai
import requests

SERVER = os.environ.get("COAR_SERVER", "http://127.0.0.1:8080").rstrip("/")
KEY = os.environ.get("COAR_API_KEY", "none")
PICTURES = pathlib.Path(__file__).resolve().parents[2] / "concepts" / "rex"


def register(name: str, noun: str, pictures: list[pathlib.Path]) -> None:
    """Registers a subject and waits until it can be drawn."""
    headers = {"Authorization": f"Bearer {KEY}"}
    form = {"name": name, "kind": "subject", "class": noun}
    images = [("images", (picture.name, picture.read_bytes(), "image/png")) for picture in pictures]
    answer = requests.post(f"{SERVER}/v1/concepts", data=form, files=images, headers=headers, timeout=60)
    if answer.status_code == 409:
        print(f"{name}: {answer.json()['error']['message']}")
    else:
        answer.raise_for_status()
    while True:
        concept = requests.get(f"{SERVER}/v1/concepts/{name}", headers=headers, timeout=60).json()
        if concept["status"] == "ready":
            return
        if concept["status"] != "training":
            sys.exit(f"the training of {name} {concept['status']}: {concept['training']['error']}")
        progress = concept["training"]["progress"]
        print(f"step {progress['step']} of {progress['total_steps']}", end="\r", flush=True)
        time.sleep(1)


def main() -> None:
    register("rex", "cat", sorted(PICTURES.glob("*.png")))
    client = openai.OpenAI(base_url=f"{SERVER}/v1", api_key=KEY)
    # A concept is used by writing <name>. What OpenAI's API does not have goes into extra_body.
    answer = client.images.generate(
        model="coar",
        prompt="a photo of <rex> cat on the beach",
        n=2,
        response_format="b64_json",
        extra_body={"seed": 1, "guidance_scale": 2.0},
    )
    for index, image in enumerate(answer.data):
        file = pathlib.Path(f"rex-{index}.png")
        file.write_bytes(base64.b64decode(image.b64_json))
        print(file)
    # A client that can only choose a model chooses the concept that way.
    answer = client.images.generate(model="coar:rex", prompt="a photo of a cat in the snow", response_format="url")
    print(answer.data[0].url)


if __name__ == "__main__":
    main()
