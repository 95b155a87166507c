"""Why a call has failed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .objects import Generation, Training

__all__ = [
    "CoarError",
    "Conflict",
    "ConnectionFailed",
    "Forbidden",
    "GenerationFailed",
    "InvalidRequest",
    "NotFound",
    "RateLimited",
    "ServerError",
    "TrainingFailed",
    "Unauthorized",
]


class CoarError(Exception):
    """Any failure of a call. `code` is stable and can be compared; `message` is a sentence for people.

    `param` is the parameter that is wrong, `limit` the limit that was exceeded, `status` the HTTP status, `request_id` the id under which
    the server's log has the request, and `retry_after` the number of seconds after which another attempt may succeed. What does not apply
    is None.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str,
        param: str | None = None,
        limit: int | None = None,
        status: int | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param
        self.limit = limit
        self.status = status
        self.request_id = request_id
        self.retry_after = retry_after

    def __str__(self) -> str:
        facts = [f"code {self.code}"]
        if self.param is not None:
            facts.append(f"param {self.param}")
        if self.retry_after is not None:
            facts.append(f"try again in {self.retry_after:g} s")
        if self.request_id is not None:
            facts.append(f"request {self.request_id}")
        return f"{self.message} ({', '.join(facts)})"


class InvalidRequest(CoarError):
    """The request cannot be used; `param` names what is wrong with it (400, 405, 408, 413, 415, 422)."""


class Unauthorized(CoarError):
    """The API key is missing or not valid (401)."""


class Forbidden(CoarError):
    """The API key may not do this, or an image's address has expired (403)."""


class NotFound(CoarError):
    """There is no such object, or it belongs to another tenant (404)."""


class Conflict(CoarError):
    """The state of an object does not permit it: a name that is taken, a training that has ended (409)."""


class RateLimited(CoarError):
    """A quota is used up or the server's queue is full; `retry_after` says for how long (429)."""


class ServerError(CoarError):
    """The server has failed or is not available (5xx), or its answer cannot be read."""


class ConnectionFailed(CoarError):
    """There is no connection, or it broke off. `sent` is False where the server cannot have seen the request."""

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message, code="connection_failed")
        self.sent = sent


class TrainingFailed(CoarError):
    """A training that was waited for has failed or was cancelled."""

    def __init__(self, training: Training) -> None:
        error = training.error
        super().__init__(
            error.message if error else f"The training of {training.concept} ended as {training.status}.",
            code=error.code if error else training.status,
            param=error.field if error else None,
        )
        self.training = training


class GenerationFailed(CoarError):
    """A generation that was waited for has failed or was cancelled; images that it finished are in `generation.images`."""

    def __init__(self, generation: Generation) -> None:
        error = generation.error
        super().__init__(
            error.message if error else f"The generation ended as {generation.status}.",
            code=error.code if error else generation.status,
            param=error.field if error else None,
        )
        self.generation = generation
