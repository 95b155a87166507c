"""A line that shows the progress of a training."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TextIO

from .events import ProgressEvent
from .flow import Flow, Tell

#: What a caller gives to hear of a training's progress. With `AsyncCoar` it may be a coroutine function.
OnProgress = Callable[[ProgressEvent], object]


class Line:
    """Writes over itself, in a terminal and in a notebook."""

    def __init__(self, name: str, file: TextIO | None = None) -> None:
        self.name = name
        self.file = file or sys.stderr
        self.width = 0

    def __call__(self, progress: ProgressEvent) -> None:
        text = f"{self.name}: {progress.status}, step {progress.step} of {progress.total_steps}"
        if progress.eta_seconds is not None:
            text += f", {progress.eta_seconds} s left"
        self.file.write("\r" + text.ljust(self.width))
        self.width = len(text)
        if progress.status not in ("queued", "running"):
            self.file.write("\n")
        self.file.flush()


def report(event: ProgressEvent, listeners: list[OnProgress]) -> Flow[None]:
    for listener in listeners:
        yield Tell(listener, event)


def listeners(name: str, on_progress: OnProgress | None, progress: bool) -> list[OnProgress]:
    return ([on_progress] if on_progress else []) + ([Line(name)] if progress else [])
