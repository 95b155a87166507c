"""A client that behaves as the documentation recommends: it retries with the same idempotency key, on any API process that
answers, and trusts every acknowledgement."""

import http.client
import json
import random
import socket
import threading
import time
import uuid


class Answer:
    def __init__(self, status: int, headers: dict, body: bytes):
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self):
        return json.loads(self.body or b"null")

    @property
    def code(self) -> str:
        try:
            return self.json["error"]["code"]
        except (ValueError, KeyError, TypeError):
            return ""


# Seconds for which a request is retried.
PATIENCE = 120.0


class Client:
    """The client of one tenant, over all API processes."""

    def __init__(self, ports: list[int], key: str | None, timeout: float = 60.0):
        self.ports, self.key, self.timeout = list(ports), key, timeout
        self.local = threading.local()

    def once(self, port: int, method: str, path: str, body=None, headers=None, timeout=None) -> Answer:
        """One attempt. Raises OSError or HTTPException if there is no answer."""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout or self.timeout)
        try:
            connection.connect()
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sent = {"Connection": "close", **(headers or {})}
            if self.key:
                sent["Authorization"] = f"Bearer {self.key}"
            if isinstance(body, (dict, list)):
                body, sent["Content-Type"] = json.dumps(body).encode(), "application/json"
            connection.request(method, path, body=body, headers=sent)
            answer = connection.getresponse()
            return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def send(self, method: str, path: str, body=None, headers=None, patience: float = PATIENCE, stop=None) -> Answer | None:
        """Retries until the answer is final. At the timeout returns the last answer, or None if there was none."""
        until, last = time.monotonic() + patience, None
        ports = random.sample(self.ports, len(self.ports))
        while time.monotonic() < until:
            for port in ports:
                try:
                    last = self.once(port, method, path, body, headers)
                except (OSError, http.client.HTTPException):
                    continue
                again = last.status >= 500 or last.status in (408, 429) or last.code in ("idempotency_in_progress", "lease_lost")
                if not again:
                    return last
            if stop is not None and stop.is_set():
                return last
            time.sleep(0.3)
        return last


def key() -> str:
    return str(uuid.uuid4())


def form(fields: list[tuple[str, object]]) -> tuple[bytes, str]:
    """A multipart/form-data body and its content type; values of type bytes are files."""
    boundary = uuid.uuid4().hex
    parts = []
    for name, value in fields:
        if isinstance(value, bytes):
            head = f'Content-Disposition: form-data; name="{name}"; filename="{name}.png"\r\nContent-Type: image/png'
            data = value
        else:
            head, data = f'Content-Disposition: form-data; name="{name}"', str(value).encode()
        parts.append(f"--{boundary}\r\n{head}\r\n\r\n".encode() + data + b"\r\n")
    return b"".join(parts) + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"
