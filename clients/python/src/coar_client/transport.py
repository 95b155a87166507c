"""Between requests and httpx2: the same for both clients."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx2

from . import http
from .errors import ConnectionFailed
from .http import Connection, Reply, Request

DEFAULT_SERVER = "http://127.0.0.1:8080"
MAX_RETRIES = 4

#: What fails before the server can have seen the request.
_UNSENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.ProxyError, httpx2.UnsupportedProtocol)


@dataclass(frozen=True)
class Settings:
    server: str
    api_key: str | None
    timeout: float
    max_retries: int

    @classmethod
    def of(cls, server: str | None, api_key: str | None, timeout: float, max_retries: int) -> Settings:
        """What is not given comes from the environment, as with the command line; an empty variable is none."""
        server = server or os.environ.get("COAR_SERVER") or DEFAULT_SERVER
        return cls(http.base_address(server), api_key or os.environ.get("COAR_API_KEY") or None, timeout, max_retries)

    def __repr__(self) -> str:
        return f"Settings({self.server})"

    def arguments(self, request: Request) -> dict[str, Any]:
        """Of `build_request`."""
        own = request.has_own_address
        silence = httpx2.Timeout(self.timeout + request.waits, connect=min(http.CONNECT_SECONDS, self.timeout), pool=None)
        arguments: dict[str, Any] = {
            "method": request.method,
            "url": request.path if own else self.server + request.path,
            "headers": {**http.identity(None if own else self.api_key), **request.headers},
            "timeout": silence,
        }
        if request.params:
            arguments["params"] = dict(request.params)
        if request.content is not None:
            arguments["content"] = request.content
        if request.form is not None:
            arguments["data"], arguments["files"] = dict(request.form), list(request.files)
        return arguments

    @contextlib.contextmanager
    def failures(self) -> Iterator[None]:
        """What httpx2 raises, as an error of this package."""
        try:
            yield
        except (httpx2.TransportError, httpx2.StreamError) as error:
            problem = str(error) or type(error).__name__
            if isinstance(error, _UNSENT):
                raise ConnectionFailed(f"{self.server} does not answer: {problem}", sent=False) from error
            raise ConnectionFailed(f"The connection to {self.server} broke off: {problem}", sent=True) from error


def reply(response: httpx2.Response, connection: Connection | None = None) -> Reply:
    headers = {name.lower(): value for name, value in response.headers.items()}
    return Reply(response.status_code, headers, b"" if connection else response.content, connection)
