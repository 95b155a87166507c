"""By how much one tenant can increase the memory of a default server: `memory.py [MIB]`, with the limit in MiB (default 256).

A real server with its defaults (one thread, a small KV memory) is attacked in ways that once took gigabytes: concept files far larger
than those of a training, requests that name many concepts, concurrent images of 40 million pixels with 16-bit samples, forms that are
held open. Prints one line of JSON for each attack: the increase of peak resident memory in MB. Needs only Python 3.10. COAR_BIN selects
a binary other than target/debug/coar.
"""

import concurrent.futures
import http.client
import json
import os
import pathlib
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIDE = 6324  # 40 million pixels


class Server:
    def __init__(self, place: pathlib.Path):
        binary = os.environ.get("COAR_BIN", str(ROOT / "target/debug/coar"))
        command = [binary, "serve", "--listen", "127.0.0.1:0", "--threads", "1", "--kv-memory", "256", "--device", "cpu", "--data", str(place / "data")]
        self.child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=open(place / "log", "wb"), text=True)
        self.port = int(self.child.stdout.readline().strip().rsplit(":", 1)[1])
        until = time.monotonic() + 300
        while self.send("GET", "/readyz")[0] != 200:
            assert time.monotonic() < until, "the server does not become ready"
            time.sleep(0.2)

    def send(self, method: str, path: str, body=None, kind: str | None = None):
        """Status and JSON of an answer; the status is 0 if the connection breaks."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        if isinstance(body, dict):
            body, kind = json.dumps(body).encode(), "application/json"
        try:
            connection.request(method, path, body, {"Content-Type": kind} if kind else {})
            answer = connection.getresponse()
            raw = answer.read()
        except OSError:
            return 0, None
        finally:
            connection.close()
        try:
            return answer.status, json.loads(raw)
        except ValueError:
            return answer.status, raw

    def memory(self, line: str) -> int:
        text = pathlib.Path(f"/proc/{self.child.pid}/status").read_text()
        return next(int(row.split()[1]) for row in text.splitlines() if row.startswith(line)) * 1024

    def grown(self, attack) -> dict:
        # Resets the peak.
        pathlib.Path(f"/proc/{self.child.pid}/clear_refs").write_text("5")
        before, begun = self.memory("VmRSS"), time.monotonic()
        told = attack(self)
        return {"MB more": round((self.memory("VmHWM") - before) / 1e6), "seconds": round(time.monotonic() - begun, 1), "answers": told}


def form(parts) -> tuple[bytes, str]:
    body = b""
    for name, value in parts:
        file = '; filename="x.png"' if isinstance(value, bytes) else ""
        body += f'--x\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode()
        body += (value if isinstance(value, bytes) else str(value).encode()) + b"\r\n"
    return body + b"--x--\r\n", "multipart/form-data; boundary=x"


def register(server: Server, name: str, image: bytes):
    body, kind = form([("name", name), ("kind", "style"), ("steps", 1), ("images", image)])
    return server.send("POST", "/v1/concepts", body, kind)


def png(side: int) -> bytes:
    """An RGBA image with 16-bit samples, all zeros: a few hundred kilobytes."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, row = zlib.compressobj(9), bytes(1 + 8 * side)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 16, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def inflated(file: bytes, size: int) -> bytes:
    """The concept file with enough text tokens for about `size` bytes."""
    length = struct.unpack("<Q", file[:8])[0]
    header = json.loads(file[8 : 8 + length])
    layers, _, hidden = header["text"]["shape"]
    tokens = size // (4 * layers * hidden)
    image = 4 * layers * header["image"]["shape"][1] * hidden
    text = 4 * layers * tokens * hidden
    header["text"].update(shape=[layers, tokens, hidden], data_offsets=[0, text])
    header["image"]["data_offsets"] = [text, text + image]
    spec = json.loads(header["__metadata__"]["hyper_parameters"])
    header["__metadata__"]["hyper_parameters"] = json.dumps({**spec, "text_tokens": tokens})
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + bytes(text + image)


def together(calls) -> list[int]:
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        return [future.result()[0] for future in [pool.submit(*call) for call in calls]]


def concept_files(server: Server) -> list:
    """Eight concurrent imports of 62 MiB, and requests with 40 concept names."""
    _, weights = server.send("GET", "/v1/concepts/seed/weights")
    big = inflated(weights, 62 << 20)
    told = together([(server.send, "POST", f"/v1/concepts/import?name=big{n}", big, "application/octet-stream") for n in range(8)])
    names = {"prompt": "x", "concepts": [f"big{n}" for n in range(40)]}
    return [*told, *together([(server.send, "POST", "/v1/generations?validate_only=true", names) for _ in range(8)])]


def bombs(server: Server) -> list:
    """Four concurrent registrations, for a name that is already taken and for new names."""
    bomb = png(SIDE)
    taken = together([(register, server, "seed", bomb) for _ in range(4)])
    return [*taken, *together([(register, server, f"bomb{n}", bomb) for n in range(4)])]


def held_forms(server: Server) -> list:
    """Six forms of 190 MB without their last byte."""
    body, kind = form([("name", "held"), ("kind", "style"), *[("images", bytes(19_900_000)) for _ in range(9)], ("images", bytes(10_000_000))])

    def hold():
        one = socket.create_connection(("127.0.0.1", server.port), timeout=15)
        head = f"POST /v1/concepts HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        try:
            one.sendall(head.encode())
            one.sendall(body[:-1])
        except OSError:
            pass
        return len(body), one

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        held = [future.result() for future in [pool.submit(hold) for _ in range(6)]]
    for _, one in held:
        one.close()
    return [f"{len(held)} forms of {held[0][0] // 10**6} MB"]


def main() -> int:
    limit = int(sys.argv[1]) if len(sys.argv) > 1 else 256
    place = pathlib.Path(tempfile.mkdtemp(prefix="coar-memory-"))
    server = Server(place)
    try:
        status, made = register(server, "seed", (ROOT / "concepts/rex/1.png").read_bytes())
        assert status == 202, made
        until = time.monotonic() + 300
        while server.send("GET", "/v1/concepts/seed")[1]["status"] != "ready":
            assert time.monotonic() < until, "the training does not end"
            time.sleep(0.2)
        # Occupy the only slot for trainings, so that only uploads are measured: a training holds its own images in memory.
        body, kind = form([("name", "busy"), ("kind", "style"), ("steps", 20_000), ("images", (ROOT / "concepts/rex/2.png").read_bytes())])
        assert server.send("POST", "/v1/concepts", body, kind)[0] == 202
        while server.send("GET", "/v1/concepts/busy")[1]["training"]["status"] != "running":
            assert time.monotonic() < until, "the training does not begin"
            time.sleep(0.2)
        worst = 0
        for attack in (concept_files, bombs, held_forms):
            found = server.grown(attack)
            worst = max(worst, found["MB more"])
            print(json.dumps({attack.__name__: found}), flush=True)
        assert server.send("GET", "/livez")[0] == 200
        print(json.dumps({"worst": worst, "limit": limit, "ok": worst <= limit}))
        return 0 if worst <= limit else 1
    finally:
        server.child.kill()
        server.child.wait()
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
