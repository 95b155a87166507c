"""What a type checker knows of both clients: checked by mypy, not run."""

import pathlib
from collections.abc import AsyncIterator, Iterator

from typing_extensions import assert_type

from coar_client import (
    AsyncCoar,
    Coar,
    Concept,
    Generation,
    GenerationEvent,
    GenerationPlan,
    Image,
    Images,
    Model,
    PreviewImage,
    ProgressEvent,
    Training,
    TrainingEvent,
    TrainingWithLosses,
    Version,
)


def heard(progress: ProgressEvent) -> None:
    assert_type(progress.status == "running", bool)


async def heard_later(progress: ProgressEvent) -> None:
    heard(progress)


def synchronous(client: Coar) -> None:
    assert_type(client.generate("a cat", n=2, seed=1), Images)
    assert_type(client.generate("a cat")[0], Image)
    assert_type(client.concepts.add("rex", [pathlib.Path("1.png"), b""], class_="cat", on_progress=heard), Concept)
    assert_type(client.concepts.list(kind="style"), Iterator[Concept])
    assert_type(client.concepts.versions("rex"), Iterator[Version])
    assert_type(client.concepts.export("rex"), bytes)
    assert_type(client.concepts.retrain("rex", steps=3), Training)
    assert_type(client.trainings.get("a"), TrainingWithLosses)
    assert_type(client.trainings.events("a"), Iterator[TrainingEvent])
    assert_type(client.trainings.previews("a"), Iterator[PreviewImage])
    assert_type(client.generations.create("a cat"), Generation)
    assert_type(client.generations.stream("a cat", partial_images=3), Iterator[GenerationEvent])
    assert_type(client.generations.validate("a cat"), GenerationPlan)
    assert_type(client.models.list(), list[Model])
    client.generate("a cat", sede=1)  # type: ignore[call-arg]
    client.generate("a cat", n="two")  # type: ignore[arg-type]
    client.concepts.list(kind="thing")  # type: ignore[arg-type]
    client.concepts.change("rex", colour="red")  # type: ignore[call-arg]


async def asynchronous(client: AsyncCoar) -> None:
    assert_type(await client.generate("a cat", n=2), Images)
    assert_type(await client.concepts.add("rex", "1.png", class_="cat", on_progress=heard_later), Concept)
    assert_type(client.trainings.events("a"), AsyncIterator[TrainingEvent])
    async for event in client.generations.stream("a cat"):
        assert_type(event, GenerationEvent)
    await client.generate("a cat", sede=1)  # type: ignore[call-arg]
