"""A TCP proxy with faults: latency, low bandwidth, refused and reset connections, dropped packets, truncated responses.

One asyncio loop in a separate thread serves all links. Faults are set from outside by plain assignment: `link.delay = 0.2`.
"""

import asyncio
import random
import socket
import threading
import time

PIECE = 16384


class Network:
    """The loop that serves links."""

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def link(self, name: str, port: int, target: int) -> "Link":
        link = Link(self, name, port, target)
        asyncio.run_coroutine_threadsafe(link.listen(), self.loop).result()
        return link


class Link:
    """From `port` to `target`, both on 127.0.0.1."""

    def __init__(self, network: Network, name: str, port: int, target: int):
        self.network, self.name, self.port, self.target = network, name, port, target
        self.streams: set = set()
        self.heal()

    def heal(self) -> None:
        """Removes all faults."""
        self.delay = 0.0  # seconds per piece
        self.jitter = 0.0
        self.rate = 0  # bytes per second; 0: unlimited
        self.refuse = False  # new connections are reset
        self.silent = False  # all data is held back, without an error
        self.truncate = 0.0  # probability that a piece is cut and the connection reset

    async def listen(self) -> None:
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", self.port)

    def cut(self) -> None:
        """Resets every connection."""
        self.network.loop.call_soon_threadsafe(self._cut)

    def _cut(self) -> None:
        for stream in list(self.streams):
            reset(stream)

    def freeze(self) -> None:
        """Existing connections stay open but carry no more data, as behind a router that has lost its state; new ones work."""
        self.network.loop.call_soon_threadsafe(self._freeze)

    def _freeze(self) -> None:
        for stream in self.streams:
            stream.frozen = True

    async def serve(self, reader, writer) -> None:
        if self.refuse:
            return reset(writer)
        while self.silent:
            await asyncio.sleep(0.05)
        try:
            onward_reader, onward = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            return reset(writer)
        for stream in (writer, onward):
            stream.frozen = False
            stream.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.streams.add(stream)
        try:
            pumps = [asyncio.create_task(self.pump(reader, onward)), asyncio.create_task(self.pump(onward_reader, writer))]
            # The end of one direction is forwarded; the other direction continues until it ends or fails.
            await asyncio.wait(pumps, return_when=asyncio.FIRST_EXCEPTION)
            for pump in pumps:
                pump.cancel()
        finally:
            for stream in (writer, onward):
                self.streams.discard(stream)
                reset(stream) if self.refuse else stream.close()
        return None

    async def pump(self, reader, writer) -> None:
        while True:
            piece = await reader.read(PIECE)
            while writer.frozen or self.silent:
                await asyncio.sleep(0.05)
            if not piece:
                if writer.can_write_eof():
                    writer.write_eof()
                return
            if self.delay or self.jitter:
                await asyncio.sleep(self.delay + random.random() * self.jitter)
            if self.rate:
                await asyncio.sleep(len(piece) / self.rate)
            if self.truncate and random.random() < self.truncate:
                writer.write(piece[: len(piece) // 2])
                await writer.drain()
                raise ConnectionError("truncated")
            writer.write(piece)
            await writer.drain()


def reset(stream) -> None:
    """Resets a connection: the other side gets ECONNRESET."""
    try:
        raw = stream.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        stream.transport.abort()
    except OSError:
        pass


def wait_for_port(port: int, seconds: float = 30.0) -> None:
    """Waits until a process listens on the port."""
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise TimeoutError(f"nobody listens on {port}") from None
            time.sleep(0.05)


def free_ports(count: int) -> list[int]:
    """Distinct ports that are not in use."""
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports
