"""Calls as methods: signature and documentation are those of the flow or feed."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, overload

from . import options
from .flow import Feed, Flow

P = ParamSpec("P")
T = TypeVar("T")


class Runs(Protocol):
    def run(self, flow: Flow[T]) -> T: ...

    def iterate(self, feed: Feed[T]) -> Iterator[T]: ...


class RunsAsync(Protocol):
    async def run(self, flow: Flow[T]) -> T: ...

    def iterate(self, feed: Feed[T]) -> AsyncIterator[T]: ...


class Resource:
    """Calls about one kind of object."""

    def __init__(self, driver: Runs) -> None:
        self._driver = driver


class AsyncResource:
    """Calls about one kind of object."""

    def __init__(self, driver: RunsAsync) -> None:
        self._driver = driver


class _Method:
    """Runs a flow of the module `calls` for the object that it is asked of."""

    def __init__(self, make: Callable[..., Any], result: str) -> None:
        self.__name__, self.__doc__ = make.__name__, make.__doc__
        self.__signature__ = _signature(make, result)

    def _bound(self, make: Callable[..., Any], driven: Callable[[Any], Any]) -> Callable[..., Any]:
        @functools.wraps(make)
        def method(*args: Any, **kwargs: Any) -> Any:
            return driven(make(*args, **kwargs))

        method.__signature__ = self.__signature__  # type: ignore[attr-defined]
        return method


def _signature(make: Callable[..., Any], result: str) -> inspect.Signature:
    """With the options one by one, and the result that a caller gets."""
    signature = inspect.signature(make)
    parameters = []
    for parameter in signature.parameters.values():
        if found := re.fullmatch(r"Unpack\[(\w+)\]", str(parameter.annotation)):
            taken = getattr(options, found[1])
            parameters += [
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=getattr(hint, "__forward_arg__", hint))
                for name, hint in taken.__annotations__.items()
            ]
        else:
            parameters.append(parameter)
    inner = re.sub(r"^\w+\[(.*)\]$", r"\1", str(signature.return_annotation))
    return signature.replace(parameters=parameters, return_annotation=result.format(inner))


class call(_Method, Generic[P, T]):
    def __init__(self, make: Callable[P, Flow[T]]) -> None:
        super().__init__(make, "{}")
        self.make = make

    @overload
    def __get__(self, owner: None, kind: type) -> call[P, T]: ...
    @overload
    def __get__(self, owner: Resource, kind: type) -> Callable[P, T]: ...
    def __get__(self, owner: Resource | None, kind: type) -> call[P, T] | Callable[P, T]:
        return self if owner is None else self._bound(self.make, owner._driver.run)


class each(_Method, Generic[P, T]):
    def __init__(self, make: Callable[P, Feed[T]]) -> None:
        super().__init__(make, "Iterator[{}]")
        self.make = make

    @overload
    def __get__(self, owner: None, kind: type) -> each[P, T]: ...
    @overload
    def __get__(self, owner: Resource, kind: type) -> Callable[P, Iterator[T]]: ...
    def __get__(self, owner: Resource | None, kind: type) -> each[P, T] | Callable[P, Iterator[T]]:
        return self if owner is None else self._bound(self.make, owner._driver.iterate)


class async_call(_Method, Generic[P, T]):
    def __init__(self, make: Callable[P, Flow[T]]) -> None:
        super().__init__(make, "Awaitable[{}]")
        self.make = make

    @overload
    def __get__(self, owner: None, kind: type) -> async_call[P, T]: ...
    @overload
    def __get__(self, owner: AsyncResource, kind: type) -> Callable[P, Awaitable[T]]: ...
    def __get__(self, owner: AsyncResource | None, kind: type) -> async_call[P, T] | Callable[P, Awaitable[T]]:
        return self if owner is None else self._bound(self.make, owner._driver.run)


class async_each(_Method, Generic[P, T]):
    def __init__(self, make: Callable[P, Feed[T]]) -> None:
        super().__init__(make, "AsyncIterator[{}]")
        self.make = make

    @overload
    def __get__(self, owner: None, kind: type) -> async_each[P, T]: ...
    @overload
    def __get__(self, owner: AsyncResource, kind: type) -> Callable[P, AsyncIterator[T]]: ...
    def __get__(self, owner: AsyncResource | None, kind: type) -> async_each[P, T] | Callable[P, AsyncIterator[T]]:
        return self if owner is None else self._bound(self.make, owner._driver.iterate)
