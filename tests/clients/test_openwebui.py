"""The requests of Open WebUI's image router (0.12.4, backend/open_webui/routers/images.py), sent with the same HTTP client.

Open WebUI itself is not installed. `Settings` are its own settings, `generate` and `edit` are what `image_generations` and `image_edits`
send and what they read from the response with the engine `openai`.
"""

import asyncio
import base64
import dataclasses
import json
import re
import uuid

import aiohttp
import pytest
from checks import SIZE, TALL, decoded

#: IMAGE_URL_RESPONSE_MODELS_REGEX_PATTERN: these models get no `response_format`.
WITHOUT_FORMAT = "^gpt-image"


@dataclasses.dataclass
class Settings:
    """With the names and defaults of Open WebUI's configuration."""

    IMAGES_OPENAI_API_BASE_URL: str
    IMAGES_OPENAI_API_KEY: str
    IMAGE_GENERATION_MODEL: str = "dall-e-2"
    IMAGE_SIZE: str = "512x512"
    IMAGES_OPENAI_API_PARAMS: dict = dataclasses.field(default_factory=dict)
    ENABLE_FORWARD_USER_INFO_HEADERS: bool = False


USER = {
    "X-OpenWebUI-User-Name": "Zo%C3%AB%20M%C3%BCller",
    "X-OpenWebUI-User-Id": str(uuid.uuid4()),
    "X-OpenWebUI-User-Email": "zoe@example.com",
    "X-OpenWebUI-User-Role": "user",
}


def headers(settings: Settings) -> dict[str, str]:
    user = USER if settings.ENABLE_FORWARD_USER_INFO_HEADERS else {}
    return {"Authorization": f"Bearer {settings.IMAGES_OPENAI_API_KEY}", **user}


def format_of(settings: Settings) -> dict[str, str]:
    return {} if re.match(WITHOUT_FORMAT, settings.IMAGE_GENERATION_MODEL) else {"response_format": "b64_json"}


def images_of(answer: dict) -> list[bytes]:
    """Open WebUI would fetch a filled `url`, but not from a private address; without one, there has to be `b64_json`."""
    assert not any(image.get("url") for image in answer["data"])
    return [base64.b64decode(image["b64_json"]) for image in answer["data"]]


async def generate_now(settings: Settings, prompt: str, n: int, size: str | None) -> list[bytes]:
    body = {
        "model": settings.IMAGE_GENERATION_MODEL,
        "prompt": prompt,
        "n": n,
        **({"size": size or settings.IMAGE_SIZE} if size or settings.IMAGE_SIZE else {}),
        **format_of(settings),
        **settings.IMAGES_OPENAI_API_PARAMS,
    }
    async with aiohttp.ClientSession() as session:
        url = f"{settings.IMAGES_OPENAI_API_BASE_URL}/images/generations"
        sent = headers(settings) | {"Content-Type": "application/json"}
        async with session.post(url, json=body, headers=sent) as response:
            response.raise_for_status()
            return images_of(await response.json(content_type=None))


def generate(settings: Settings, prompt: str = "a red car", n: int = 1, size: str | None = None) -> list[bytes]:
    return asyncio.run(generate_now(settings, prompt, n, size))


async def edit_now(settings: Settings, prompt: str, images: list[bytes]) -> tuple[int, dict]:
    form = aiohttp.FormData()
    for name, value in {"model": settings.IMAGE_GENERATION_MODEL, "prompt": prompt, **format_of(settings)}.items():
        form.add_field(name, value)
    name = "image" if len(images) == 1 else "image[]"
    for image in images:
        form.add_field(name, image, filename=f"{uuid.uuid4()}.png", content_type="image/png")
    async with aiohttp.ClientSession() as session:
        url = f"{settings.IMAGES_OPENAI_API_BASE_URL}/images/edits"
        async with session.post(url, headers=headers(settings), data=form) as response:
            return response.status, json.loads(await response.text())


def settings_for(server, **more) -> Settings:
    return Settings(f"{server.url}/v1", server.key, **more)


def test_settings_of_the_howto(server, rex):
    settings = settings_for(server, IMAGE_GENERATION_MODEL=f"coar:{rex}", IMAGE_SIZE="96x96")
    images = generate(settings, "a photo of a cat", n=2)
    assert len({decoded(image).tobytes() for image in images}) == 2
    # A chat's own size has precedence.
    decoded(generate(settings, "a photo of a cat", size="80x112")[0], TALL)


def test_no_size_and_additional_parameters(server):
    more = {"IMAGE_SIZE": "", "IMAGES_OPENAI_API_PARAMS": {"seed": 7, "guidance_scale": 3.0}}
    settings = settings_for(server, IMAGE_GENERATION_MODEL="coar", **more)
    first, again = generate(settings), generate(settings)
    decoded(first[0])
    assert first == again


def test_forwarded_user(server):
    more = {"IMAGE_SIZE": "96x96", "ENABLE_FORWARD_USER_INFO_HEADERS": True}
    decoded(generate(settings_for(server, IMAGE_GENERATION_MODEL="coar", **more))[0])


@pytest.mark.parametrize("model", ["gpt-image-1", "dall-e-2"])
@pytest.mark.parametrize(("asked", "drawn"), [("auto", SIZE), ("512x512", SIZE), ("1024x1536", TALL)])
def test_models_and_sizes_of_openai(fixed, model, asked, drawn):
    decoded(generate(settings_for(fixed, IMAGE_GENERATION_MODEL=model, IMAGE_SIZE=asked))[0], drawn)


def test_default_size_is_refused_unless_size_policy_is_nearest(server):
    with pytest.raises(aiohttp.ClientResponseError) as caught:
        generate(settings_for(server, IMAGE_GENERATION_MODEL="coar"))
    # All that Open WebUI shows.
    assert (caught.value.status, caught.value.message) == (400, "Bad Request")


def test_edits_are_refused_with_a_reason(server):
    settings = settings_for(server, IMAGE_GENERATION_MODEL="coar", IMAGE_SIZE="96x96")
    image = generate(settings)[0]
    for images in ([image], [image, image]):
        status, answer = asyncio.run(edit_now(settings, "the same with a hat", images))
        assert (status, answer["error"]["code"]) == (400, "unsupported_endpoint")
