"""Concepts."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .. import http
from ..flow import Feed, Flow
from ..images import ImageFile, ImageSource, uploads
from ..objects import Concept, ConceptKind, ConceptStatus, Training, TrainingMethod, Version
from ..progress import OnProgress
from . import trainings
from .common import body_and_key, content, id_of, media_type, nothing, one, pages

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..options import ConceptChanges, TrainOptions


def add(
    name: str,
    images: ImageSource | Iterable[ImageSource],
    *,
    class_: str | None = None,
    kind: ConceptKind = "subject",
    method: TrainingMethod | None = None,
    description: str | None = None,
    metadata: Mapping[str, str] | None = None,
    wait: bool = False,
    on_progress: OnProgress | None = None,
    progress: bool = False,
    **options: Unpack[TrainOptions],
) -> Flow[Concept]:
    """Registers a concept and trains it. `class_` is the noun of a subject; styles have none.

    `wait` waits until it is trained and raises TrainingFailed if the training fails. `on_progress` is called with every step, and
    `progress` writes a line to stderr; both wait as well.
    """
    body, key = body_and_key({**options, "class": class_, "method": method, "description": description})
    form: dict[str, str | list[str]] = {"name": name, "kind": kind}
    for part, value in body.items():
        form[part] = list(value) if part == "captions" else str(value)
    if metadata is not None:
        form["metadata"] = json.dumps(dict(metadata))
    request = http.Request(method="POST", path=http.path("concepts"), form=form, files=uploads(images), **http.once(key))
    concept = yield from one(Concept, request)
    if not (wait or on_progress or progress) or concept.training is None:
        return concept
    yield from trainings.wait(concept.training, on_progress=on_progress, progress=progress)
    trained = yield from get(concept.id)
    return dataclasses.replace(trained, duplicate_of=concept.duplicate_of)


def get(concept: str | Concept) -> Flow[Concept]:
    """The concept with this name or id, as it is now."""
    return one(Concept, http.get(http.path("concepts", id_of(concept))))


def list_all(*, kind: ConceptKind | None = None, status: ConceptStatus | None = None) -> Feed[Concept]:
    """Every concept, newest first."""
    return pages(Concept, http.path("concepts"), kind=kind, status=status)


def change(concept: str | Concept, **changes: Unpack[ConceptChanges]) -> Flow[Concept]:
    """Changes the name, the description, the metadata, or the active version. `description=None` removes it."""
    return one(Concept, http.with_json("PATCH", http.path("concepts", id_of(concept)), dict[str, Any](changes)))


def delete(concept: str | Concept) -> Flow[None]:
    """Deletes a concept with its images, versions and trainings."""
    return nothing(http.Request(method="DELETE", path=http.path("concepts", id_of(concept))))


def versions(concept: str | Concept) -> Feed[Version]:
    """Every version of a concept, newest first. `change(concept, version=…)` chooses the active one."""
    return pages(Version, http.path("concepts", id_of(concept), "versions"))


def image(concept: str | Concept, index: int) -> Flow[ImageFile]:
    """A reference image as it is stored; `index` is from 0."""
    reply = yield from content(http.get(http.path("concepts", id_of(concept), "images", index)))
    return ImageFile(reply.body, media_type(reply))


def export(concept: str | Concept, path: str | os.PathLike[str] | None = None, *, version: int | None = None) -> Flow[bytes]:
    """The concept file of the active version, or of another one. If `path` is given, the file is also written there."""
    reply = yield from content(http.get(http.path("concepts", id_of(concept), "weights"), {"version": version}))
    if path is not None:
        pathlib.Path(path).write_bytes(reply.body)
    return reply.body


def import_file(file: str | os.PathLike[str] | bytes, name: str | None = None, *, idempotency_key: str | None = None) -> Flow[Concept]:
    """Creates a concept from a concept file (a path, or its bytes). The default name is the one in the file."""
    data = file if isinstance(file, bytes) else pathlib.Path(file).read_bytes()
    once = http.once(idempotency_key)
    once["headers"]["content-type"] = "application/octet-stream"
    params = http.given({"name": name})
    return one(Concept, http.Request(method="POST", path=http.path("concepts", "import"), params=params, content=data, **once))


def retrain(
    concept: str | Concept,
    *,
    wait: bool = False,
    on_progress: OnProgress | None = None,
    progress: bool = False,
    **options: Unpack[TrainOptions],
) -> Flow[Training]:
    """Trains a concept again: makes the next version. `wait`, `on_progress` and `progress` as with `add`."""
    body, key = body_and_key(options)
    if "captions" in body:
        body["captions"] = list(body["captions"])
    path = http.path("concepts", id_of(concept), "trainings")
    training = yield from one(Training, http.with_json("POST", path, body, **http.once(key)))
    if wait or on_progress or progress:
        training = yield from trainings.wait(training, on_progress=on_progress, progress=progress)
    return training
