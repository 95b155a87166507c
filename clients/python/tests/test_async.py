"""The asynchronous client against the real server: the same calls, awaited."""

import asyncio
import contextlib

import pytest
from conftest import PICTURES

from coar_client import AsyncCoar, GenerationEnded, GenerationQueued, NotFound, PartialImage, ProgressEvent, TrainingEnded


def run(server, body, **more):
    async def main():
        async with AsyncCoar(server.url, max_retries=0, **more) as client:
            return await body(client)

    return asyncio.run(main())


def test_a_concept_is_added_and_waited_for(server):
    heard = []

    async def on_progress(progress):
        await asyncio.sleep(0)
        heard.append(progress)

    async def body(client):
        concept = await client.concepts.add("async", PICTURES, class_="cat", steps=3, on_progress=on_progress)
        assert concept.status == "ready"
        events = [event async for event in client.trainings.events(concept.training)]
        assert isinstance(events[0], ProgressEvent) and isinstance(events[-1], TrainingEnded)
        previews = [preview async for preview in client.trainings.previews(concept.training)]
        assert len(previews) == len(events[-1].training.previews)
        file = await client.concepts.export("async")
        imported = await client.concepts.import_file(file, "async-copy")
        assert [version.number async for version in client.concepts.versions(imported)] == [1]
        for name in ("async", "async-copy"):
            await client.concepts.delete(name)
        with pytest.raises(NotFound):
            await client.concepts.get("async")

    run(server, body)
    assert heard[-1].step == 3


def test_many_generations_at_once(server):
    async def body(client):
        drawn = await asyncio.gather(*(client.generate("a red car", seed=seed) for seed in range(4)))
        assert [images[0].seed for images in drawn] == [0, 1, 2, 3]
        assert len({images[0].bytes for images in drawn}) == 4
        listed = [generation.id async for generation in client.generations.list()]
        assert len(listed) >= 4
        assert (await client.models.get("coar")).id == "coar"

    run(server, body)


def test_a_stream_and_leaving_it(server):
    async def body(client):
        events = [event async for event in client.generations.stream("a red car", partial_images=2)]
        assert len([event for event in events if isinstance(event, PartialImage)]) == 2
        assert isinstance(events[-1], GenerationEnded)
        async with contextlib.aclosing(client.generations.stream("a red car", n=10)) as stream:
            async for event in stream:
                assert isinstance(event, GenerationQueued)
                break
        assert (await client.generations.get(event.generation)).status == "cancelled"

    run(server, body)


def test_a_cancelled_task_cancels_its_stream(server):
    async def body(client):
        queued = asyncio.get_running_loop().create_future()

        async def read():
            async for event in client.generations.stream("a red car", n=10):
                if isinstance(event, GenerationQueued):
                    queued.set_result(event.generation)

        task = asyncio.create_task(read())
        generation = await queued
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await client.generations.get(generation)).status == "cancelled"

    run(server, body)


def test_retry_after_a_lost_answer(server, proxy):
    before = server.metric("coar_images_total")
    through = proxy("answer")

    async def main():
        async with AsyncCoar(through.url, max_retries=1) as client:
            return await client.generations.create("a red car", n=2)

    assert len(asyncio.run(main()).images) == 2
    assert server.metric("coar_images_total") == before + 2
    assert through.connections == 2
