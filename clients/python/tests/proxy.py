"""A TCP proxy that cuts connections."""

import contextlib
import socket
import threading
from urllib.parse import urlsplit


class Proxy:
    """Passes connections on to a server. Each of `cuts` is for one connection, in order; later ones are left alone.

    "request": cut as soon as the server has the request. "answer": cut when the server answers, of which nothing arrives. A number: cut
    after so many bytes of the answers.
    """

    def __init__(self, target: str, *cuts: str | int):
        self.aim(target)
        self.cuts = list(cuts)
        self.connections = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = "http://127.0.0.1:%d" % self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def aim(self, target: str) -> None:
        """Where connections go from now on."""
        address = urlsplit(target)
        self.target = (address.hostname, address.port)

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                self.connections += 1
                cut = self.cuts.pop(0) if self.cuts else None
                threading.Thread(target=self.serve, args=(client, cut), daemon=True).start()

    def serve(self, client: socket.socket, cut: str | int | None) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection(self.target) as server:
            if cut == "request":
                server.sendall(read_request(client))
                return
            up = threading.Thread(target=pump, args=(client, server), daemon=True)
            up.start()
            left = 0 if cut == "answer" else cut
            while piece := server.recv(65536):
                if left is not None and len(piece) > left:
                    client.sendall(piece[:left])
                    break
                client.sendall(piece)
                left = None if left is None else left - len(piece)
            for one in (client, server):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.listener.close()


def pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(65536):
            sink.sendall(piece)
        sink.shutdown(socket.SHUT_WR)


def read_request(client: socket.socket) -> bytes:
    """One whole request with a content-length."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += client.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    while len(body) < int(lengths[0]):
        body += client.recv(65536)
    return head + b"\r\n\r\n" + body
