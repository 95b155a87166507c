"""What the calls of several resources share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import http, objects
from ..flow import Feed, Flow, Item, Send
from ..http import Reply, Request
from ..objects import O, decode

PAGE = 100


def one(cls: type[O], request: Request) -> Flow[O]:
    """The object that a request is answered with."""
    reply: Reply = yield Send(request)
    return decode(cls, reply.json())


def nothing(request: Request) -> Flow[None]:
    yield Send(request)


def content(request: Request) -> Flow[Reply]:
    reply: Reply = yield Send(request)
    return reply


def pages(cls: type[O], path: str, **filters: str | None) -> Feed[O]:
    """Every object of a list, newest first, page by page."""
    after: str | None = None
    while True:
        reply: Reply = yield Send(http.get(path, {"limit": PAGE, "after": after, **filters}))
        page = reply.json()
        for item in page["data"]:
            yield Item(decode(cls, item))
        if not page["has_more"] or not page["data"]:
            return
        after = page["data"][-1]["id"]


def id_of(thing: str | objects.Concept | objects.Training | objects.Generation) -> str:
    return thing if isinstance(thing, str) else thing.id


def media_type(reply: Reply) -> str:
    return reply.headers.get("content-type", "application/octet-stream")


def body_and_key(options: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Parameters for the body, and the idempotency key among them."""
    body = http.given(options)
    key = body.pop("idempotency_key", None)
    return body, key
