"""A picture that appears row by row: partial pictures are written as they come.

    python examples/python/stream.py "a photo of a red cat in the snow"
"""

import base64
import os
import pathlib
import sys

import openai

SERVER = os.environ.get("COAR_SERVER", "http://127.0.0.1:8080").rstrip("/")


def main() -> None:
    prompt = " ".join(sys.argv[1:]) or "a photo of a red cat in the snow"
    client = openai.OpenAI(base_url=f"{SERVER}/v1", api_key=os.environ.get("COAR_API_KEY", "none"))
    stream = client.images.generate(
        model="coar", prompt=prompt, stream=True, partial_images=3, extra_body={"seed": 7}
    )
    for event in stream:
        match event.type:
            case "image_generation.partial_image":
                file = pathlib.Path(f"partial-{event.partial_image_index}.png")
            case "image_generation.completed":
                file = pathlib.Path("picture.png")
            case _:
                continue
        file.write_bytes(base64.b64decode(event.b64_json))
        print(file)


if __name__ == "__main__":
    main()
