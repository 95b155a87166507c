"""What every client's images and errors have to be."""

import base64
import io

import requests
from PIL import Image

#: The size that the pocket model uses when a request has none.
SIZE = (96, 96)
#: Another of its sizes, and the nearest to 1024x1536.
TALL = (80, 112)
#: coar's message for `n: 11`.
TOO_MANY = "`n` is 11; expected 1 to 10"


def decoded(data: bytes, size: tuple[int, int] = SIZE) -> Image.Image:
    """Decodes the whole image."""
    image = Image.open(io.BytesIO(data))
    image.load()
    assert image.size == size
    return image


def from_base64(text: str, size: tuple[int, int] = SIZE) -> bytes:
    data = base64.b64decode(text, validate=True)
    decoded(data, size)
    return data


def from_url(url: str, size: tuple[int, int] = SIZE) -> bytes:
    """Fetches an image's address, which needs no key."""
    answer = requests.get(url, timeout=60)
    assert answer.status_code == 200, answer.text
    decoded(answer.content, size)
    return answer.content
