"""Requests and replies, without a connection."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import quote

from . import errors
from ._version import __version__

#: A server that does not take the connection in this time is not there.
CONNECT_SECONDS = 10.0
#: A server that says nothing for this long is gone: event streams carry a comment every 10 seconds.
SILENCE_SECONDS = 60.0
#: The longest time that the server lets a request wait for a generation.
LONGEST_WAIT = 60

#: A file of a form: its name, its bytes, and their media type.
File = tuple[str, bytes, str]


class Connection(Protocol):
    """The body of a reply that is read piece by piece. Only the driver that made it can read it."""


@dataclass(frozen=True, kw_only=True)
class Request:
    method: str
    #: A path of the API; or a whole address, which then goes without the key.
    path: str
    params: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None
    #: Parts of a form; a list is repeated.
    form: Mapping[str, str | list[str]] | None = None
    files: tuple[tuple[str, File], ...] = ()
    #: Whether sending it twice does what sending it once does.
    repeatable: bool = False
    #: Whether the body is read piece by piece.
    stream: bool = False
    #: Seconds that the server may be silent, besides the usual ones.
    waits: float = 0.0

    @property
    def has_own_address(self) -> bool:
        return not self.path.startswith("/")


@dataclass(frozen=True)
class Reply:
    status: int
    #: With names in lower case.
    headers: Mapping[str, str]
    body: bytes
    connection: Connection | None = None

    def json(self) -> Any:
        try:
            return json.loads(self.body)
        except ValueError:
            raise errors.ServerError(
                "The answer is no JSON.", code="unexpected_answer", status=self.status, request_id=self.headers.get("x-request-id")
            ) from None


def path(*parts: str | int) -> str:
    return "/v1/" + "/".join(quote(str(part), safe="") for part in parts)


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """What is not None."""
    return {name: value for name, value in values.items() if value is not None}


def get(path: str, params: Mapping[str, str | int | None] | None = None, *, waits: float = 0.0, stream: bool = False) -> Request:
    headers = {"accept": "text/event-stream"} if stream else {}
    texts = {name: str(value) for name, value in given(params or {}).items()}
    return Request(method="GET", path=path, params=texts, headers=headers, waits=waits, stream=stream, repeatable=True)


def with_json(method: str, path: str, body: Mapping[str, Any], **more: Any) -> Request:
    """A request with a JSON body. What `more` has in `headers` is added."""
    headers = {"content-type": "application/json", **more.pop("headers", {})}
    return Request(method=method, path=path, content=json.dumps(body).encode(), headers=headers, **more)


def once(key: str | None) -> dict[str, Any]:
    """What makes a POST that creates something repeatable: the server answers the second like the first."""
    return {"headers": {"idempotency-key": key or str(uuid.uuid4())}, "repeatable": True}


def identity(api_key: str | None) -> dict[str, str]:
    """Headers of every request to the API."""
    agent = {"user-agent": f"coar-client/{__version__}"}
    return agent | ({"authorization": f"Bearer {api_key}"} if api_key else {})


def base_address(server: str) -> str:
    """The server's address without a slash at its end.

    Raises ValueError where it cannot be one.
    """
    if not re.match(r"https?://[^/]", server):
        raise ValueError(f"the server's address `{server}` must begin with http:// or https://")
    server = server.rstrip("/")
    if server.endswith("/v1"):
        raise ValueError(f"the server's address `{server}` must not end with /v1")
    return server


_KINDS: dict[int, type[errors.CoarError]] = {
    401: errors.Unauthorized,
    403: errors.Forbidden,
    404: errors.NotFound,
    409: errors.Conflict,
    429: errors.RateLimited,
}


def refusal(reply: Reply) -> errors.CoarError:
    """The error that a reply is. A proxy's page is shown as it is."""
    kind = _KINDS.get(reply.status, errors.InvalidRequest if 400 <= reply.status < 500 else errors.ServerError)
    try:
        facts = json.loads(reply.body)["error"]
        message, code = facts["message"], facts["code"]
    except (ValueError, TypeError, KeyError):
        text = reply.body[:200].decode(errors="replace").strip()
        facts, code = {}, str(reply.status)
        message = f"The server answered {reply.status}: {text}"
    return kind(
        message,
        code=code,
        param=facts.get("param"),
        limit=facts.get("limit"),
        status=reply.status,
        request_id=facts.get("request_id") or reply.headers.get("x-request-id"),
        retry_after=retry_after(reply),
    )


def retry_after(reply: Reply) -> float | None:
    value = reply.headers.get("retry-after", "")
    return float(value) if value.isascii() and value.isdigit() else None
