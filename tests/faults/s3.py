"""A small durable S3 server: an acknowledged object is on disk, so `kill -9` loses nothing (moto keeps objects in memory). One
process, one folder: `s3.py FOLDER PORT`; it prints its address, so PORT may be 0.

It supports what coar's client uses: PUT, GET, HEAD, DELETE of objects, ListObjectsV2, and the multi-object delete. Keys are not
checked. Faults are set over HTTP: `POST /-/faults` with {"errors": share of requests that get 500, "delay": seconds}.
"""

import hashlib
import http.server
import json
import os
import random
import re
import sys
import threading
import time
import urllib.parse
import xml.sax.saxutils

FOLDER = ""
FAULTS = {"errors": 0.0, "delay": 0.0}
RANDOM = random.Random(1)


def path_of(key: str) -> str:
    """The file of a key: slashes are escaped, so that no key is a folder of another one."""
    return os.path.join(FOLDER, "objects", urllib.parse.quote(key, safe=""))


def write(key: str, data: bytes) -> None:
    """Writes atomically; the data is on disk when it returns."""
    temporary = os.path.join(FOLDER, "parts", f"{threading.get_ident()}-{time.monotonic_ns()}")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path_of(key))
    folder = os.open(os.path.join(FOLDER, "objects"), os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def stamp(seconds: float, form: str) -> str:
    return time.strftime(form, time.gmtime(seconds))


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60

    def log_message(self, *_):
        pass

    def setup(self):
        super().setup()
        self.connection.setsockopt(6, 1, 1)

    def answer(self, status: int, body: bytes = b"", **headers) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            whole = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                whole += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return whole
        length = int(self.headers.get("Content-Length", 0))
        data = self.rfile.read(length)
        if len(data) != length:
            raise ConnectionError("the body broke off")
        return data

    def object(self):
        """(bucket, key, query)"""
        url = urllib.parse.urlsplit(self.path)
        bucket, _, key = urllib.parse.unquote(url.path).lstrip("/").partition("/")
        return bucket, key, urllib.parse.parse_qs(url.query, keep_blank_values=True)

    def trouble(self) -> bool:
        """Answers the request with a fault, if one is due; returns whether it did."""
        if FAULTS["delay"]:
            time.sleep(FAULTS["delay"])
        if RANDOM.random() < FAULTS["errors"]:
            self.answer(500, b"<Error><Code>InternalError</Code><Message>a fault</Message></Error>", Content_Type="application/xml")
            return True
        return False

    def do_PUT(self):
        _, key, _ = self.object()
        data = self.body()
        if self.trouble():
            return
        if key:
            write(key, data)
        self.answer(200, ETag=f'"{hashlib.md5(data).hexdigest()}"')

    def do_POST(self):
        data = self.body()
        if self.path == "/-/faults":
            FAULTS.update(json.loads(data))
            return self.answer(204)
        if self.trouble():
            return None
        _, _, query = self.object()
        if "delete" in query:
            keys = re.findall(r"<Key>(.*?)</Key>", data.decode())
            for key in keys:
                self.remove(xml.sax.saxutils.unescape(key))
            gone = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
            return self.answer(200, f"<DeleteResult>{gone}</DeleteResult>".encode(), Content_Type="application/xml")
        return self.answer(501)

    def remove(self, key: str) -> None:
        try:
            os.remove(path_of(key))
        except FileNotFoundError:
            pass

    def do_DELETE(self):
        if self.trouble():
            return
        _, key, _ = self.object()
        self.remove(key)
        self.answer(204)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        if self.path == "/-/ready":
            return self.answer(200)
        if self.trouble():
            return None
        bucket, key, query = self.object()
        if not key:
            return self.list(bucket, query)
        try:
            with open(path_of(key), "rb") as file:
                data, changed = file.read(), os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>", Content_Type="application/xml")
        status, more, whole = 200, {}, len(data)
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), min(int(wanted[2] or whole - 1), whole - 1)
            if first > last:
                return self.answer(416, Content_Range=f"bytes */{whole}")
            status, data, more = 206, data[first:last + 1], {"Content_Range": f"bytes {first}-{last}/{whole}"}
        return self.answer(
            status,
            data,
            **more,
            ETag=f'"{key[-32:]}"',
            Last_Modified=stamp(changed, "%a, %d %b %Y %H:%M:%S GMT"),
            Content_Type="application/octet-stream",
        )

    def list(self, bucket, query):
        prefix = query.get("prefix", [""])[0]
        after = query.get("continuation-token", query.get("start-after", [""]))[0]
        names = sorted(urllib.parse.unquote(name) for name in os.listdir(os.path.join(FOLDER, "objects")))
        found = [name for name in names if name.startswith(prefix) and name > after]
        page, more = found[:1000], len(found) > 1000
        parts = []
        for name in page:
            try:
                state = os.stat(path_of(name))
            except FileNotFoundError:
                continue
            parts.append(
                f"<Contents><Key>{xml.sax.saxutils.escape(name)}</Key><Size>{state.st_size}</Size>"
                f"<LastModified>{stamp(state.st_mtime, '%Y-%m-%dT%H:%M:%S.000Z')}</LastModified><ETag>\"x\"</ETag></Contents>"
            )
        token = f"<NextContinuationToken>{xml.sax.saxutils.escape(page[-1])}</NextContinuationToken>" if more else ""
        body = (
            f'<?xml version="1.0"?><ListBucketResult><Name>{bucket}</Name><Prefix>{xml.sax.saxutils.escape(prefix)}</Prefix>'
            f"<KeyCount>{len(parts)}</KeyCount><IsTruncated>{'true' if more else 'false'}</IsTruncated>{token}{''.join(parts)}"
            "</ListBucketResult>"
        )
        self.answer(200, body.encode(), Content_Type="application/xml")


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True

    def handle_error(self, request, client_address):
        pass


if __name__ == "__main__":
    FOLDER = sys.argv[1]
    for name in ("objects", "parts"):
        os.makedirs(os.path.join(FOLDER, name), exist_ok=True)
    server = Server(("127.0.0.1", int(sys.argv[2])), Handler)
    print(f"listening on http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()
