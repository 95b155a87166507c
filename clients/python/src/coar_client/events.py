"""What happens during a training and during a generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

from .images import ImageFile
from .objects import Generation, GenerationProgress, Preview, Progress, StoredImage, Training, TrainingStatus

__all__ = [
    "DrawingProgress",
    "GenerationEnded",
    "GenerationEvent",
    "GenerationQueued",
    "ImageReady",
    "PartialImage",
    "PreviewReady",
    "ProgressEvent",
    "TrainingEnded",
    "TrainingEvent",
]


@dataclass(frozen=True, kw_only=True)
class ProgressEvent(Progress):
    """A training has gone on, or its status has changed."""

    status: TrainingStatus


@dataclass(frozen=True)
class PreviewReady:
    """A training has drawn an image: `trainings.preview` fetches it."""

    preview: Preview


@dataclass(frozen=True)
class TrainingEnded:
    """The last event."""

    training: Training


TrainingEvent = Union[ProgressEvent, PreviewReady, TrainingEnded]


@dataclass(frozen=True)
class GenerationQueued:
    """The first event; `generation.id` and all settings are known."""

    generation: Generation


@dataclass(frozen=True)
class DrawingProgress:
    progress: GenerationProgress


@dataclass(frozen=True)
class PartialImage:
    """An unfinished form of image `index`; `number` counts these from 0."""

    index: int
    number: int
    image: ImageFile


@dataclass(frozen=True)
class ImageReady:
    """An image is finished and stored: `images.download` fetches it."""

    stored: StoredImage


@dataclass(frozen=True)
class GenerationEnded:
    """The last event: the generation has succeeded. A failure raises GenerationFailed instead."""

    generation: Generation


GenerationEvent = Union[GenerationQueued, DrawingProgress, PartialImage, ImageReady, GenerationEnded]
