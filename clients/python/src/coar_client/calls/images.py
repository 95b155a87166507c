"""Stored images, at their signed addresses. The key is not sent there."""

from __future__ import annotations

from .. import http
from ..flow import Flow
from ..images import Image, ImageFile, Images
from ..objects import Generation, StoredImage
from .common import content, media_type


def fetch(url: str) -> Flow[ImageFile]:
    """The image at a signed address."""
    if not url.startswith(("http://", "https://")):
        raise ValueError("the address of an image begins with http:// or https://")
    reply = yield from content(http.get(url))
    return ImageFile(reply.body, media_type(reply))


def download(stored: StoredImage) -> Flow[Image]:
    """A generation's image."""
    file = yield from fetch(stored.url)
    return Image(file.bytes, file.media_type, stored)


def of(generation: Generation) -> Flow[Images]:
    """Every image of a generation, in the order of their index."""
    files = Images()
    for stored in sorted(generation.images, key=lambda stored: stored.index):
        files.append((yield from download(stored)))
    return files
