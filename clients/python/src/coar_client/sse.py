"""Server-sent events."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from .errors import ConnectionFailed
from .flow import Close, Feed, Item, Read, Send
from .http import Reply, Request


@dataclass(frozen=True)
class ServerEvent:
    name: str
    data: Any


class Decoder:
    """Events of bytes that come in any pieces. Comments, ids and events whose data is no JSON are left out."""

    def __init__(self) -> None:
        self._rest = b""
        self._name = ""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[ServerEvent]:
        # A "\r" at the end may be half of a "\r\n".
        text = self._rest + piece
        held = b"\r" if text.endswith(b"\r") else b""
        *lines, rest = text.removesuffix(held).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest = rest + held
        events = []
        for line in lines:
            if line:
                self._field(line)
            elif (event := self._event()) is not None:
                events.append(event)
        return events

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"event":
            self._name = value.decode(errors="replace")
        elif name == b"data":
            self._data.append(value)

    def _event(self) -> ServerEvent | None:
        name, data = self._name or "message", b"\n".join(self._data)
        self._name, self._data = "", []
        try:
            return ServerEvent(name, json.loads(data))
        except ValueError:
            return None


class StreamBroken(ConnectionFailed):
    """The connection was there and broke off."""


def server_events(request: Request) -> Feed[ServerEvent]:
    """The events of one connection, until it ends. Raises StreamBroken where it breaks off."""
    reply: Reply = yield Send(request)
    decoder = Decoder()
    try:
        while (piece := (yield Read(reply.connection))) is not None:
            for event in decoder.feed(piece):
                yield Item(event)
    except ConnectionFailed as failed:
        raise StreamBroken(failed.message, sent=True) from failed
    finally:
        yield Close(reply.connection)
