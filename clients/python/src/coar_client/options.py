"""Parameters of several calls. If one is absent or None, the server's default is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

__all__ = ["ConceptChanges", "DrawOptions", "TrainOptions"]


class DrawOptions(TypedDict, total=False):
    """How images are generated."""

    #: Names of concepts. Those that the prompt does not name are placed in it.
    concepts: Sequence[str] | None
    #: Number of images, 1 to 10.
    n: int | None
    #: `auto`, or one of the model's sizes as `WIDTHxHEIGHT`.
    size: str | None
    #: Image i uses the random stream (seed, first_index + i).
    seed: int | None
    first_index: int | None
    guidance_scale: float | None
    temperature: float | None
    top_k: int | None
    identity_mask: bool | None
    output_format: Literal["png", "jpeg", "webp"] | None
    output_compression: int | None
    #: 0 to 100. Among the queued generations of the tenant, the highest priority is run first.
    priority: int | None
    metadata: Mapping[str, str] | None
    webhook_url: str | None
    #: For 24 hours, the same key with the same parameters gets the same response. By default every call makes its own key.
    idempotency_key: str | None


class TrainOptions(TypedDict, total=False):
    """How a concept is trained."""

    #: What else each image shows, in the order of the images.
    captions: Sequence[str] | None
    steps: int | None
    layers: int | None
    learning_rate: float | None
    text_tokens: int | None
    image_tokens: int | None
    seed: int | None
    #: 0 to 100. Among the queued trainings of the tenant, the highest priority is run first.
    priority: int | None
    webhook_url: str | None
    #: For 24 hours, the same key with the same parameters gets the same response. By default every call makes its own key.
    idempotency_key: str | None


class ConceptChanges(TypedDict, total=False):
    """Changes to a concept. Absent: unchanged."""

    name: str
    #: None removes the description.
    description: str | None
    metadata: Mapping[str, str]
    #: Number of the version to make active.
    version: int
