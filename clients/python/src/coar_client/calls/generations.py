"""Generations: images that the server stores."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

from .. import http
from ..errors import ConnectionFailed, GenerationFailed, ServerError
from ..events import DrawingProgress, GenerationEnded, GenerationEvent, GenerationQueued, ImageReady, PartialImage
from ..flow import Feed, Flow, Item, Pause, Transmit, mapped, pause
from ..http import Request
from ..images import ImageFile, Images
from ..objects import Generation, GenerationPlan, GenerationProgress, GenerationStatus, StoredImage, decode
from ..sse import ServerEvent, StreamBroken, server_events
from . import images
from .common import body_and_key, id_of, nothing, one, pages

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..options import DrawOptions

#: Failures in a row of a broken stream before it is given up.
RECONNECTS = 5
#: Seconds between two looks at a generation whose stream has broken off.
LOOK_SECONDS = 5
ENDED = ("succeeded", "failed", "cancelled")


def _draw(prompt: str, options: DrawOptions, header: tuple[str, str], partial_images: int | None = None, **more: Any) -> Request:
    body, key = body_and_key({**options, "prompt": prompt, "partial_images": partial_images})
    if "concepts" in body:
        body["concepts"] = list(body["concepts"])
    once = http.once(key)
    once["headers"][header[0]] = header[1]
    return http.with_json("POST", http.path("generations"), body, **once, **more)


def create(prompt: str, **options: Unpack[DrawOptions]) -> Flow[Generation]:
    """Generates images and waits for the end.

    Raises GenerationFailed if the generation failed or was cancelled.
    """
    request = _draw(prompt, options, ("prefer", f"wait={http.LONGEST_WAIT}"), waits=http.LONGEST_WAIT)
    generation = yield from one(Generation, request)
    return (yield from _ended(generation))


def create_async(prompt: str, **options: Unpack[DrawOptions]) -> Flow[Generation]:
    """Queues a generation and returns at once; `wait` waits for it. It continues when this program ends."""
    return one(Generation, _draw(prompt, options, ("prefer", "respond-async")))


def wait(generation: str | Generation) -> Flow[Generation]:
    """Waits for the end.

    Raises GenerationFailed if the generation failed or was cancelled.
    """
    if isinstance(generation, str):
        generation = yield from get(generation)
    return (yield from _ended(generation))


def _ended(generation: Generation) -> Flow[Generation]:
    while generation.status not in ENDED:
        generation = yield from _look(generation.id, http.LONGEST_WAIT)
    if generation.status != "succeeded":
        raise GenerationFailed(generation)
    return generation


def _look(id: str, seconds: int) -> Flow[Generation]:
    return one(Generation, http.get(http.path("generations", id), {"wait": seconds}, waits=seconds))


class _Drawing:
    """Events of one generation."""

    def __init__(self) -> None:
        self.generation: Generation | None = None
        self.ended = False
        self.stored: set[str] = set()

    def take(self, event: ServerEvent) -> Feed[GenerationEvent]:
        data = event.data
        if event.name == "queued":
            self.generation = decode(Generation, data["generation"])
            yield Item(GenerationQueued(self.generation))
        elif event.name == "progress":
            yield Item(DrawingProgress(decode(GenerationProgress, data)))
        elif event.name == "partial_image" and self.generation:
            file = ImageFile(base64.b64decode(data["b64_json"]), f"image/{self.generation.request.output_format}")
            yield Item(PartialImage(data["index"], data["partial_image_index"], file))
        elif event.name == "image":
            yield from self.image(decode(StoredImage, data))
        elif event.name in ("completed", "failed", "cancelled"):
            yield from self.end(decode(Generation, data["generation"]))

    def image(self, stored: StoredImage) -> Feed[GenerationEvent]:
        if stored.id not in self.stored:
            self.stored.add(stored.id)
            yield Item(ImageReady(stored))

    def end(self, generation: Generation) -> Feed[GenerationEvent]:
        self.ended = True
        if generation.status != "succeeded":
            raise GenerationFailed(generation)
        yield Item(GenerationEnded(generation))

    def look(self, id: str) -> Feed[GenerationEvent]:
        """The state instead of the events, after the stream was lost."""
        now = yield from _look(id, LOOK_SECONDS)
        yield Item(DrawingProgress(now.progress))
        for stored in now.images:
            yield from self.image(stored)
        if now.status in ENDED:
            yield from self.end(now)


def stream(prompt: str, *, partial_images: int | None = None, **options: Unpack[DrawOptions]) -> Feed[GenerationEvent]:
    """Generates images, with events as they happen; `partial_images` is 0 to 3 partial versions of each image.

    Leaving the loop early cancels the generation. If the connection is lost, the remaining events have no partial images. Raises
    GenerationFailed if the generation fails or is cancelled.
    """
    request = _draw(prompt, options, ("accept", "text/event-stream"), partial_images, stream=True)
    drawing = _Drawing()
    failures = 0
    try:
        while not drawing.ended:
            try:
                if drawing.generation is None:
                    yield from mapped(server_events(request), drawing.take)
                else:
                    yield from drawing.look(drawing.generation.id)
                    failures = 0
                    continue
            except (ConnectionFailed, ServerError) as failed:
                contact = drawing.generation or failures or isinstance(failed, StreamBroken)
                if not contact or failures >= RECONNECTS or failed.status == 500:
                    raise
            if not drawing.ended:
                yield Pause(pause(failures))
                failures += 1
    except BaseException as left:
        # Left early, or interrupted. The request has an idempotency key, so the server would go on.
        if drawing.generation and not drawing.ended and not isinstance(left, Exception):
            yield from _abandon(drawing.generation.id)
        raise


def _abandon(id: str) -> Flow[None]:
    try:
        yield Transmit(_cancellation(id))
    except Exception:
        # The caller is leaving, perhaps with the client closed already.
        pass


def _cancellation(id: str) -> Request:
    return Request(method="POST", path=http.path("generations", id, "cancel"))


def validate(prompt: str, **options: Unpack[DrawOptions]) -> Flow[GenerationPlan]:
    """Checks a request and returns its settings and tokens; nothing is generated."""
    body, _ = body_and_key({**options, "prompt": prompt})
    if "concepts" in body:
        body["concepts"] = list(body["concepts"])
    return one(
        GenerationPlan, http.with_json("POST", http.path("generations"), body, params={"validate_only": "true"}, repeatable=True)
    )


def get(generation: str | Generation) -> Flow[Generation]:
    """A generation as it is now, with new addresses of its images."""
    return one(Generation, http.get(http.path("generations", id_of(generation))))


def list_all(*, status: GenerationStatus | None = None) -> Feed[Generation]:
    """Every generation, newest first."""
    return pages(Generation, http.path("generations"), status=status)


def cancel(generation: str | Generation) -> Flow[Generation]:
    """Cancels a generation that has not ended. Finished images are kept."""
    return one(Generation, _cancellation(id_of(generation)))


def delete(generation: str | Generation) -> Flow[None]:
    """Deletes a generation with its images."""
    return nothing(Request(method="DELETE", path=http.path("generations", id_of(generation))))


def generate(prompt: str, **options: Unpack[DrawOptions]) -> Flow[Images]:
    """Generates images, waits for them and downloads them, in the order of their index."""
    generation = yield from create(prompt, **options)
    return (yield from images.of(generation))
