"""Models."""

from __future__ import annotations

from .. import http
from ..flow import Flow
from ..objects import Model, decode
from .common import content, one


def list_all() -> Flow[list[Model]]:
    """The base model under both its names, and `coar:<concept>` for each concept that is ready."""
    reply = yield from content(http.get(http.path("models")))
    return [decode(Model, item) for item in reply.json()["data"]]


def get(id: str) -> Flow[Model]:
    """A model, for example `coar` or `coar:rex`."""
    return one(Model, http.get(http.path("models", id)))
