"""The asynchronous client: the same calls, awaited. It runs on asyncio."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, TypeVar, cast

import httpx2

from .bind import AsyncResource, async_call, async_each
from .calls import concepts, generations, images, models, trainings
from .calls.generations import generate as draw
from .flow import Close, Effect, Feed, Flow, Left, Pause, Read, Send, Tell, Transmit, attempts
from .http import SILENCE_SECONDS
from .transport import MAX_RETRIES, Settings, reply

T = TypeVar("T")


class AsyncConcepts(AsyncResource):
    """Subjects and styles that the model has learned."""

    add = async_call(concepts.add)
    get = async_call(concepts.get)
    list = async_each(concepts.list_all)
    change = async_call(concepts.change)
    delete = async_call(concepts.delete)
    versions = async_each(concepts.versions)
    image = async_call(concepts.image)
    export = async_call(concepts.export)
    import_file = async_call(concepts.import_file)
    retrain = async_call(concepts.retrain)


class AsyncTrainings(AsyncResource):
    """Trainings of concepts."""

    get = async_call(trainings.get)
    list = async_each(trainings.list_all)
    cancel = async_call(trainings.cancel)
    retry = async_call(trainings.retry)
    wait = async_call(trainings.wait)
    events = async_each(trainings.events)
    preview = async_call(trainings.preview)
    previews = async_each(trainings.previews)


class AsyncGenerations(AsyncResource):
    """Images that the server generates and stores."""

    create = async_call(generations.create)
    create_async = async_call(generations.create_async)
    stream = async_each(generations.stream)
    wait = async_call(generations.wait)
    get = async_call(generations.get)
    list = async_each(generations.list_all)
    cancel = async_call(generations.cancel)
    delete = async_call(generations.delete)
    validate = async_call(generations.validate)


class AsyncImages(AsyncResource):
    """Files of images."""

    download = async_call(images.download)
    fetch = async_call(images.fetch)
    of = async_call(images.of)


class AsyncModels(AsyncResource):
    """Models that the server offers."""

    list = async_call(models.list_all)
    get = async_call(models.get)


class _Connection:
    """The body of a streamed response."""

    def __init__(self, response: httpx2.Response) -> None:
        self.response = response
        self.pieces = response.aiter_bytes()


class AsyncDriver:
    """Does what flows ask for."""

    def __init__(self, settings: Settings, client: httpx2.AsyncClient) -> None:
        self.settings = settings
        self.client = client

    async def run(self, flow: Flow[T]) -> T:
        answer: Any = None
        problem: BaseException | None = None
        while True:
            try:
                effect = flow.send(answer) if problem is None else flow.throw(problem)
            except StopIteration as end:
                return cast(T, end.value)
            answer = problem = None
            try:
                answer = await self._perform(effect)
            except BaseException as error:
                problem = error

    async def iterate(self, feed: Feed[T]) -> AsyncIterator[T]:
        answer: Any = None
        problem: BaseException | None = None
        while True:
            try:
                item = feed.send(answer) if problem is None else feed.throw(problem)
            except (StopIteration, Left):
                return
            answer = problem = None
            try:
                if isinstance(item, Effect):
                    answer = await self._perform(item)
                else:
                    yield item.value
            except GeneratorExit:
                problem = Left()
            except BaseException as error:
                problem = error

    async def _perform(self, effect: Effect) -> object:
        match effect:
            case Send(request):
                return await self.run(attempts(request, self.settings.max_retries))
            case Transmit(request):
                with self.settings.failures():
                    built = self.client.build_request(**self.settings.arguments(request))
                    response = await self.client.send(built, stream=request.stream)
                    if request.stream and response.is_success:
                        return reply(response, _Connection(response))
                    await response.aread()
                return reply(response)
            case Read(_Connection() as connection):
                with self.settings.failures():
                    return await anext(connection.pieces, None)
            case Close(_Connection() as connection):
                await connection.response.aclose()
            case Pause(seconds):
                await asyncio.sleep(seconds)
            case Tell(callback, value):
                told = callback(value)
                if inspect.isawaitable(told):
                    await told
            case _:
                raise AssertionError(f"{effect} is no effect of this client")
        return None


class AsyncCoar(AsyncResource):
    """A coar server, for asyncio. Parameters and calls are those of `Coar`; functions that are called back may be coroutine functions."""

    concepts: AsyncConcepts
    trainings: AsyncTrainings
    generations: AsyncGenerations
    images: AsyncImages
    models: AsyncModels

    generate = async_call(draw)

    def __init__(
        self,
        server: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = SILENCE_SECONDS,
        max_retries: int = MAX_RETRIES,
        http_client: httpx2.AsyncClient | None = None,
    ) -> None:
        self.settings = Settings.of(server, api_key, timeout, max_retries)
        self._client = http_client or httpx2.AsyncClient()
        self._owned = http_client is None
        driver = AsyncDriver(self.settings, self._client)
        super().__init__(driver)
        self.concepts = AsyncConcepts(driver)
        self.trainings = AsyncTrainings(driver)
        self.generations = AsyncGenerations(driver)
        self.images = AsyncImages(driver)
        self.models = AsyncModels(driver)

    def __repr__(self) -> str:
        return f"AsyncCoar({self.settings.server!r})"

    async def aclose(self) -> None:
        """Closes the connections."""
        if self._owned:
            await self._client.aclose()

    async def __aenter__(self) -> AsyncCoar:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()
