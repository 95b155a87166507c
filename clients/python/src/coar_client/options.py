"""Parameters that several calls have. What is left out, or None, has the server's default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

__all__ = ["ConceptChanges", "DrawOptions", "TrainOptions"]


class DrawOptions(TypedDict, total=False):
    """How images are drawn."""

    #: Names of concepts to place where the prompt does not name them.
    concepts: Sequence[str] | None
    #: How many images, 1 to 10.
    n: int | None
    #: `auto`, or one of the model's sizes as `WIDTHxHEIGHT`.
    size: str | None
    #: Image i is drawn from the random stream (seed, first_index + i).
    seed: int | None
    first_index: int | None
    guidance_scale: float | None
    temperature: float | None
    top_k: int | None
    identity_mask: bool | None
    output_format: Literal["png", "jpeg", "webp"] | None
    output_compression: int | None
    #: Among the queued generations of the tenant, the highest comes first: 0 to 100.
    priority: int | None
    metadata: Mapping[str, str] | None
    webhook_url: str | None
    #: The same key with the same parameters gets the same answer for 24 hours. By default every call makes one of its own.
    idempotency_key: str | None


class TrainOptions(TypedDict, total=False):
    """How a concept is trained."""

    #: What else the images show, in their order.
    captions: Sequence[str] | None
    steps: int | None
    layers: int | None
    learning_rate: float | None
    text_tokens: int | None
    image_tokens: int | None
    seed: int | None
    #: Among the queued trainings of the tenant, the highest comes first: 0 to 100.
    priority: int | None
    webhook_url: str | None
    #: The same key with the same parameters gets the same answer for 24 hours. By default every call makes one of its own.
    idempotency_key: str | None


class ConceptChanges(TypedDict, total=False):
    """What is to change; what is left out stays."""

    name: str
    #: None: no description any more.
    description: str | None
    metadata: Mapping[str, str]
    #: Number of the version to use from now on.
    version: int
