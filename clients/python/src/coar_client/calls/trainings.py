"""Trainings."""

from __future__ import annotations

from .. import http
from ..errors import ConnectionFailed, ServerError, TrainingFailed
from ..events import PreviewReady, ProgressEvent, TrainingEnded, TrainingEvent
from ..flow import Feed, Flow, Item, Pause, consumed, mapped, pause
from ..images import PreviewImage
from ..objects import Concept, Preview, Training, TrainingStatus, TrainingWithLosses, decode
from ..progress import OnProgress, listeners, report
from ..sse import ServerEvent, StreamBroken, server_events
from .common import content, id_of, media_type, one, pages

#: Connections in a row that bring no event before following is given up: a restart of the server takes less.
RECONNECTS = 5


def get(training: str | Training) -> Flow[TrainingWithLosses]:
    """A training as it is now, with its loss curve."""
    return one(TrainingWithLosses, http.get(http.path("trainings", id_of(training))))


def list_all(*, concept: str | Concept | None = None, status: TrainingStatus | None = None) -> Feed[Training]:
    """Every training, newest first."""
    return pages(Training, http.path("trainings"), concept=None if concept is None else id_of(concept), status=status)


def cancel(training: str | Training) -> Flow[Training]:
    """Cancels a training that has not ended."""
    return one(Training, http.Request(method="POST", path=http.path("trainings", id_of(training), "cancel")))


def retry(training: str | Training, *, idempotency_key: str | None = None) -> Flow[Training]:
    """Requeues a training that failed or was cancelled."""
    path = http.path("trainings", id_of(training), "retry")
    return one(Training, http.Request(method="POST", path=path, **http.once(idempotency_key)))


class _Follower:
    """Events of one training over several connections, without repeated ones."""

    def __init__(self) -> None:
        self.ended = False
        self.heard = False
        self.progress: ProgressEvent | None = None
        self.previews: set[int] = set()

    def take(self, event: ServerEvent) -> Feed[TrainingEvent]:
        self.heard = True
        if event.name == "progress":
            progress = decode(ProgressEvent, event.data)
            if progress != self.progress:
                self.progress = progress
                yield Item(progress)
        elif event.name == "preview":
            preview = decode(Preview, event.data)
            if preview.step not in self.previews:
                self.previews.add(preview.step)
                yield Item(PreviewReady(preview))
        elif event.name == "ended":
            self.ended = True
            yield Item(TrainingEnded(decode(Training, event.data)))


def events(training: str | Training) -> Feed[TrainingEvent]:
    """Events of a training, beginning with the current state. Reconnects when the connection is lost, until the training has ended."""
    request = http.get(http.path("trainings", id_of(training), "events"), stream=True)
    follower = _Follower()
    silent, contact = 0, False
    while True:
        follower.heard = False
        try:
            yield from mapped(server_events(request), follower.take)
        except (ConnectionFailed, ServerError) as failed:
            contact = contact or follower.heard or isinstance(failed, StreamBroken)
            if not contact or silent >= RECONNECTS or failed.status == 500:
                raise
        if follower.ended:
            return
        contact = True
        silent = 0 if follower.heard else silent + 1
        yield Pause(pause(silent))


def wait(training: str | Training, *, on_progress: OnProgress | None = None, progress: bool = False) -> Flow[Training]:
    """Waits for the end. `on_progress` is called with every step, and `progress` writes a line to stderr.

    Raises TrainingFailed if the training failed or was cancelled.
    """
    name = training if isinstance(training, str) else training.concept
    told = listeners(name, on_progress, progress)
    ends: list[Training] = []

    def take(event: TrainingEvent) -> Flow[None]:
        if isinstance(event, ProgressEvent):
            yield from report(event, told)
        elif isinstance(event, TrainingEnded):
            ends.append(event.training)

    yield from consumed(events(training), take)
    (ended,) = ends
    if ended.status != "succeeded":
        raise TrainingFailed(ended)
    return ended


def preview(training: str | Training, step: int) -> Flow[PreviewImage]:
    """The preview that was generated after a step."""
    reply = yield from content(http.get(http.path("trainings", id_of(training), "previews", step)))
    return PreviewImage(reply.body, media_type(reply), step)


def previews(training: str | Training) -> Feed[PreviewImage]:
    """All previews of a training so far, by step."""
    now = yield from get(training)
    for step in sorted(drawn.step for drawn in now.previews):
        image = yield from preview(now, step)
        yield Item(image)
