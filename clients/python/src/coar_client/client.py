"""The synchronous client."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, TypeVar, cast

import httpx2

from .bind import Resource, call, each
from .calls import concepts, generations, images, models, trainings
from .calls.generations import generate as draw
from .flow import Close, Effect, Feed, Flow, Left, Pause, Read, Send, Tell, Transmit, attempts
from .http import SILENCE_SECONDS
from .transport import MAX_RETRIES, Settings, reply

T = TypeVar("T")


class Concepts(Resource):
    """Subjects and styles that the model has learned."""

    add = call(concepts.add)
    get = call(concepts.get)
    list = each(concepts.list_all)
    change = call(concepts.change)
    delete = call(concepts.delete)
    versions = each(concepts.versions)
    image = call(concepts.image)
    export = call(concepts.export)
    import_file = call(concepts.import_file)
    retrain = call(concepts.retrain)


class Trainings(Resource):
    """Trainings of concepts."""

    get = call(trainings.get)
    list = each(trainings.list_all)
    cancel = call(trainings.cancel)
    retry = call(trainings.retry)
    wait = call(trainings.wait)
    events = each(trainings.events)
    preview = call(trainings.preview)
    previews = each(trainings.previews)


class Generations(Resource):
    """Images that the server generates and stores."""

    create = call(generations.create)
    create_async = call(generations.create_async)
    stream = each(generations.stream)
    wait = call(generations.wait)
    get = call(generations.get)
    list = each(generations.list_all)
    cancel = call(generations.cancel)
    delete = call(generations.delete)
    validate = call(generations.validate)


class Images(Resource):
    """Files of images."""

    download = call(images.download)
    fetch = call(images.fetch)
    of = call(images.of)


class Models(Resource):
    """Models that the server offers."""

    list = call(models.list_all)
    get = call(models.get)


class _Connection:
    """The body of a streamed response."""

    def __init__(self, response: httpx2.Response) -> None:
        self.response = response
        self.pieces = response.iter_bytes()


class Driver:
    """Does what flows ask for."""

    def __init__(self, settings: Settings, client: httpx2.Client) -> None:
        self.settings = settings
        self.client = client

    def run(self, flow: Flow[T]) -> T:
        answer: Any = None
        problem: BaseException | None = None
        while True:
            try:
                effect = flow.send(answer) if problem is None else flow.throw(problem)
            except StopIteration as end:
                return cast(T, end.value)
            answer = problem = None
            try:
                answer = self._perform(effect)
            except BaseException as error:
                problem = error

    def iterate(self, feed: Feed[T]) -> Iterator[T]:
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
                    answer = self._perform(item)
                else:
                    yield item.value
            except GeneratorExit:
                problem = Left()
            except BaseException as error:
                problem = error

    def _perform(self, effect: Effect) -> object:
        match effect:
            case Send(request):
                return self.run(attempts(request, self.settings.max_retries))
            case Transmit(request):
                with self.settings.failures():
                    response = self.client.send(self.client.build_request(**self.settings.arguments(request)), stream=request.stream)
                    if request.stream and response.is_success:
                        return reply(response, _Connection(response))
                    response.read()
                return reply(response)
            case Read(_Connection() as connection):
                with self.settings.failures():
                    return next(connection.pieces, None)
            case Close(_Connection() as connection):
                connection.response.close()
            case Pause(seconds):
                time.sleep(seconds)
            case Tell(callback, value):
                callback(value)
            case _:
                raise AssertionError(f"{effect} is no effect of this client")
        return None


class Coar(Resource):
    """A coar server.

    `server` and `api_key` default to the environment variables COAR_SERVER and COAR_API_KEY, then to http://127.0.0.1:8080 without a key.
    `timeout` is the number of seconds that the server may be silent. A call that can be repeated safely is sent again up to `max_retries`
    times when the connection fails or the server asks for it; calls that create something carry an idempotency key for that. `http_client`
    replaces the HTTP client, for example for a proxy or a private certificate authority; the caller closes it.
    """

    concepts: Concepts
    trainings: Trainings
    generations: Generations
    images: Images
    models: Models

    generate = call(draw)

    def __init__(
        self,
        server: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = SILENCE_SECONDS,
        max_retries: int = MAX_RETRIES,
        http_client: httpx2.Client | None = None,
    ) -> None:
        self.settings = Settings.of(server, api_key, timeout, max_retries)
        self._client = http_client or httpx2.Client()
        self._owned = http_client is None
        driver = Driver(self.settings, self._client)
        super().__init__(driver)
        self.concepts = Concepts(driver)
        self.trainings = Trainings(driver)
        self.generations = Generations(driver)
        self.images = Images(driver)
        self.models = Models(driver)

    def __repr__(self) -> str:
        return f"Coar({self.settings.server!r})"

    def close(self) -> None:
        """Closes the connections."""
        if self._owned:
            self._client.close()

    def __enter__(self) -> Coar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
