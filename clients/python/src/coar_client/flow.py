"""What the synchronous and the asynchronous client share: calls as generators.

A flow yields effects, is sent their results, and returns the call's result. A feed also yields items for its reader. Neither does any input or
output itself; a driver (`client.py`, `aio.py`) does, and throws what fails into the generator.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, Union, cast

from . import errors
from .http import Connection, Reply, Request, refusal

S = TypeVar("S")
T = TypeVar("T")
V = TypeVar("V", covariant=True)


class Effect:
    """What a driver does for a flow."""


@dataclass(frozen=True)
class Send(Effect):
    """Sends a request, and again where that may help. Its result is a successful `Reply`."""

    request: Request


@dataclass(frozen=True)
class Transmit(Effect):
    """Sends a request once. Its result is a `Reply`."""

    request: Request


@dataclass(frozen=True)
class Read(Effect):
    """Reads from a streamed reply. Its result is bytes, or None at the end."""

    connection: Connection | None


@dataclass(frozen=True)
class Close(Effect):
    connection: Connection | None


@dataclass(frozen=True)
class Pause(Effect):
    seconds: float


@dataclass(frozen=True)
class Tell(Effect):
    """Calls the caller's function; what it returns is awaited where that is possible."""

    callback: Callable[[Any], object]
    value: object


@dataclass(frozen=True)
class Item(Generic[V]):
    """A value for the reader of a feed."""

    value: V


class Left(BaseException):
    """Thrown into a feed whose reader has left. With GeneratorExit a feed could yield no more effects, and so close nothing."""


Flow = Generator[Effect, Any, T]
Feed = Generator[Union[Effect, Item[T]], Any, None]


def mapped(feed: Feed[S], take: Callable[[S], Feed[T]]) -> Feed[T]:
    """What `take` makes of each value of a feed."""
    answer: Any = None
    problem: BaseException | None = None
    while True:
        try:
            item = feed.send(answer) if problem is None else feed.throw(problem)
        except StopIteration:
            return
        answer = problem = None
        try:
            if isinstance(item, Effect):
                answer = yield item
            else:
                yield from take(item.value)
        except BaseException as error:
            problem = error


def consumed(feed: Feed[S], take: Callable[[S], Flow[None]]) -> Flow[None]:
    """Does what `take` says for each value of a feed."""
    return cast(Flow[None], mapped(feed, cast(Callable[[S], Feed[None]], take)))


#: The longest pause between two attempts, unless the server asks for a longer one.
LONGEST_PAUSE = 8.0
#: A server that asks for a longer pause is not asked again: the caller decides.
PATIENCE_SECONDS = 60.0
#: How long the answer to an earlier attempt is waited for while the server works on it.
IN_PROGRESS_SECONDS = 300.0


def pause(attempt: int, at_least: float = 0.0) -> float:
    """Seconds before the next attempt; random, so that many clients do not come back at once."""
    doubled = min(LONGEST_PAUSE, 0.5 * 2.0**attempt)
    return max(at_least, doubled) + random.uniform(0.0, 0.25) * doubled


def attempts(request: Request, max_retries: int) -> Flow[Reply]:
    """A successful reply, after several attempts where that may help. What was refused is not sent again."""
    failures = 0
    in_progress, waited = 0, 0.0
    while True:
        try:
            reply: Reply = yield Transmit(request)
        except errors.ConnectionFailed as failed:
            if failures >= max_retries or (failed.sent and not request.repeatable):
                raise
            seconds = pause(failures)
            failures += 1
        else:
            if reply.status < 300:
                return reply
            error = refusal(reply)
            if error.code == "idempotency_in_progress" and max_retries and waited < IN_PROGRESS_SECONDS:
                # The server has the first attempt and works on it: no failure.
                seconds = pause(in_progress, error.retry_after or 0.0)
                in_progress, waited = in_progress + 1, waited + seconds
            elif failures < max_retries and _passes(request, error):
                seconds = pause(failures, error.retry_after or 0.0)
                failures += 1
            else:
                raise error
        yield Pause(seconds)


def _passes(request: Request, error: errors.CoarError) -> bool:
    """Whether another attempt may succeed."""
    if error.retry_after is not None:
        # These were refused before anything was done.
        return error.status in (429, 503) and error.retry_after <= PATIENCE_SECONDS
    # A proxy that has lost the server.
    return request.repeatable and error.status in (502, 503, 504)
