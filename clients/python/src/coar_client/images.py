"""Image files: what is sent, and what comes back."""

from __future__ import annotations

import base64
import builtins
import io
import os
import pathlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import IO, Any, Protocol, Union, cast, runtime_checkable

from .http import File
from .objects import StoredImage

__all__ = ["Image", "ImageFile", "ImageSource", "Images", "PreviewImage"]


@dataclass(frozen=True)
class ImageFile:
    """An image as bytes. A notebook shows it."""

    bytes: builtins.bytes = field(repr=False)
    #: `image/png`, `image/jpeg` or `image/webp`.
    media_type: str

    def save(self, path: str | os.PathLike[str]) -> pathlib.Path:
        """Writes the file, in the format that the server returned."""
        file = pathlib.Path(path)
        file.write_bytes(self.bytes)
        return file

    def _repr_png_(self) -> builtins.bytes | None:
        return self.bytes if self.media_type == "image/png" else None

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {self.media_type: base64.b64encode(self.bytes).decode(), "text/plain": repr(self)}


@dataclass(frozen=True)
class Image(ImageFile):
    """A generated image. Its `seed` and `index` (as `first_index`) generate it again, alone."""

    stored: StoredImage

    @property
    def seed(self) -> int:
        return self.stored.seed

    @property
    def index(self) -> int:
        return self.stored.index

    def __repr__(self) -> str:
        return f"Image(seed={self.seed}, index={self.index}, {self.stored.width}x{self.stored.height}, {self.media_type})"


class Images(list[Image]):
    """Generated images. A notebook shows all of them."""

    def _repr_html_(self) -> str:
        def tag(image: Image) -> str:
            data = base64.b64encode(image.bytes).decode()
            return f'<img src="data:{image.media_type};base64,{data}" title="seed {image.seed}, index {image.index}">'

        return " ".join(tag(image) for image in self)


@dataclass(frozen=True)
class PreviewImage(ImageFile):
    """A preview: an image that was generated after a step of a training."""

    step: int


@runtime_checkable
class PillowImage(Protocol):
    """What is used of a `PIL.Image.Image`; Pillow need not be installed."""

    def tobytes(self) -> bytes: ...

    def save(self, fp: IO[bytes], format: str | None = None, **params: Any) -> None: ...


#: A path, the bytes of an image file, an open file, an image of this package, or a Pillow image.
ImageSource = Union[str, "os.PathLike[str]", bytes, IO[bytes], ImageFile, PillowImage]


def upload(source: ImageSource, number: int) -> File:
    """A file of a form. The server recognises the format by the content."""
    name, kind = f"{number}.png", "application/octet-stream"
    if isinstance(source, (str, os.PathLike)):
        file = pathlib.Path(source)
        return (file.name, file.read_bytes(), kind)
    if isinstance(source, bytes):
        return (name, source, kind)
    if isinstance(source, ImageFile):
        return (name, source.bytes, source.media_type)
    if isinstance(source, PillowImage):
        memory = io.BytesIO()
        source.save(memory, format="PNG")
        return (name, memory.getvalue(), "image/png")
    return (name, source.read(), kind)


def uploads(sources: ImageSource | Iterable[ImageSource]) -> tuple[tuple[str, File], ...]:
    """Several images, or one."""
    several: Iterable[ImageSource]
    if isinstance(sources, (str, bytes, os.PathLike, ImageFile, PillowImage, io.IOBase)):
        several = [cast(ImageSource, sources)]
    else:
        several = sources
    return tuple(("images", upload(source, number)) for number, source in enumerate(several, 1))
