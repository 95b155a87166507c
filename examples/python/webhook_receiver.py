"""Receives webhooks and checks who sent them (Standard Webhooks: HMAC-SHA256 over id, time and body).

    COAR_WEBHOOK_SECRET=whsec_... python examples/python/webhook_receiver.py 9000

Nothing beyond Python's own library is needed. A server on the same machine sends to it when it is started with
--webhook-allow-private; give it "webhook_url": "http://127.0.0.1:9000/".
"""

import base64
import hashlib
import hmac
import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

#: Older and newer messages are refused, so that nobody sends a recorded one again.
TOLERANCE_SECONDS = 300
BODY_LIMIT = 1 << 20


def verify(secret: str, headers, body: bytes, now: float | None = None) -> None:
    """Raises ValueError where the message is not from whoever has the secret, or not of this time."""
    identifier, sent = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
    if not sent.isdigit() or abs((time.time() if now is None else now) - int(sent)) > TOLERANCE_SECONDS:
        raise ValueError("the timestamp is missing, too old or too new")
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signed = hmac.new(key, f"{identifier}.{sent}.".encode() + body, hashlib.sha256).digest()
    wanted = "v1," + base64.b64encode(signed).decode()
    # There may be several while a secret is being changed.
    given = headers.get("webhook-signature", "").split()
    if not any(hmac.compare_digest(wanted.encode(), one.encode()) for one in given):
        raise ValueError("the signature is wrong")


class Receiver(BaseHTTPRequestHandler):
    #: Messages may come twice, with the same id: what was done once is not done again.
    seen: set[str] = set()

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length", 0))
        if length > BODY_LIMIT:
            return self.answer(413)
        body = self.rfile.read(length)
        try:
            verify(os.environ["COAR_WEBHOOK_SECRET"], self.headers, body)
        except ValueError as problem:
            print(f"refused: {problem}")
            return self.answer(401)
        identifier = self.headers["webhook-id"]
        if identifier not in self.seen:
            self.seen.add(identifier)
            message = json.loads(body)
            print(message["type"], message["data"].get("id"), flush=True)
        # Anything but a 2xx is sent again later.
        self.answer(204)

    def answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("content-length", "0")
        self.end_headers()


def main() -> None:
    if "COAR_WEBHOOK_SECRET" not in os.environ:
        sys.exit(__doc__)
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 9000
    print(f"listening on http://127.0.0.1:{port}/")
    ThreadingHTTPServer(("127.0.0.1", port), Receiver).serve_forever()


if __name__ == "__main__":
    main()
