"""Starts coar and nginx as described in docs/howto/service.md, without TLS, and uses the server through the proxy.

`python3 behind.py COAR`. Exits with a message if something is not reachable at the address that clients use.
"""

import http.client
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from urllib.parse import urljoin, urlsplit

PATIENCE = 240
GUIDE = pathlib.Path("docs/howto/service.md").read_text()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def blocks():
    return re.findall(r"```nginx\n(.*?)```", GUIDE, re.DOTALL)


def nginx_conf(work, block, port, upstream):
    block = re.sub(r"listen 443 ssl;", f"listen 127.0.0.1:{port};", block)
    block = re.sub(r"\s*ssl_certificate\S*\s[^;]*;", "", block)
    block = re.sub(r"server_name [^;]*;", "server_name localhost;", block)
    block = re.sub(r"proxy_pass http://127\.0\.0\.1:8080", f"proxy_pass {upstream}", block)
    # Here the client's URL has a port.
    block = block.replace("Host $host;", "Host $http_host;")
    temp = "".join(f"{kind}_temp_path {work}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    return (f"daemon off;\nworker_processes 1;\npid {work}/pid;\nerror_log stderr;\nevents {{}}\n"
            f"http {{\naccess_log off;\n{temp}{block}}}\n")


class Clients:
    def __init__(self, base):
        self.base = base

    def open(self, path, data=None, headers=None, method=None):
        """Status, URL, headers and body for a URL relative to the base; redirects are followed, as in a browser."""
        url = urljoin(self.base + "/", path)
        request = urllib.request.Request(url, data=data, headers=headers or {}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return answer.status, answer.geturl(), answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, url, error.headers, error.read()

    def json(self, path, body):
        headers = {"Content-Type": "application/json"}
        status, _, _, text = self.open(path, json.dumps(body).encode(), headers)
        assert status == 200, (path, status, text)
        return json.loads(text)


def links(page):
    """The relative URLs of everything that a page loads."""
    return [link for link in re.findall(r'(?:src|href)="([^"#]+)"', page) if not link.startswith("data:")]


def check(base):
    clients = Clients(base)
    deadline = time.monotonic() + PATIENCE
    while clients.open("readyz")[0] != 200:
        assert time.monotonic() < deadline, "the server is not ready"
        time.sleep(0.2)
    prefix = urlsplit(base).path
    assert clients.open("metrics")[0] == 404, "the metrics are public"
    # Studio, with all its files, also at its old address and without the slash.
    for start in ("", "studio") + (() if not prefix else (base,)):
        status, url, _, page = clients.open(start)
        assert status == 200 and url.startswith(base), (start, status, url)
        page = page.decode()
        assert "coar Studio" in page
        parts = links(page)
        assert len(parts) > 4, parts
        modules = set()
        for part in parts:
            status, found, headers, text = clients.open(urljoin(url, part))
            assert status == 200 and found.startswith(base), (part, status, found)
            modules |= {urljoin(found, name) for name in re.findall(r'from "(\./[^"]+)"', text.decode())}
        assert modules and all(clients.open(module)[0] == 200 for module in modules), modules
    # The documentation page, its files, and its content.
    status, url, _, page = clients.open("docs")
    assert status == 200 and url == f"{base}/docs/", (status, url)
    for part in links(page.decode()):
        assert clients.open(urljoin(url, part))[0] == 200, part
    initializer = clients.open(urljoin(url, "swagger-initializer.js"))[3].decode()
    described = urljoin(url, re.search(r'"url":\s*"([^"]+)"', initializer)[1])
    document = json.loads(clients.open(described)[3])
    server = document.get("servers", [{"url": base}])[0]["url"]
    assert server == base, server
    assert clients.open(server + "/v1/models")[0] == 200
    # URLs in responses.
    made = clients.json("v1/generations", {"prompt": "a red car"})
    image = made["images"][0]["url"]
    assert image.startswith(base + "/v1/images/"), image
    status, _, headers, _ = clients.open(image)
    assert (status, headers["content-type"]) == (200, "image/png"), (status, headers)
    # Events of a stream pass through the proxy.
    body = json.dumps({"prompt": "a red car", "n": 2}).encode()
    headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
    request = urllib.request.Request(f"{base}/v1/generations", data=body, headers=headers)
    with urllib.request.urlopen(request, timeout=PATIENCE) as stream:
        events = [line.decode() for line in stream if line.startswith(b"event:")]
    assert len(events) > 2, events
    # Several requests on one connection, one of them with an error response.
    place = urlsplit(base)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=PATIENCE)
    for path, expected in ((f"{prefix}/livez", 200), (f"{prefix}/v1/concepts/none", 404), (f"{prefix}/livez", 200)):
        connection.request("GET", path)
        answer = connection.getresponse()
        answer.read()
        assert answer.status == expected, (path, answer.status)
    return len(parts) + len(modules)


def run(coar, work, block, prefix, unix):
    port = free_port()
    base = f"http://127.0.0.1:{port}{prefix}"
    listen = f"unix:{work}/coar.sock" if unix else f"127.0.0.1:{free_port()}"
    upstream = f"http://{listen}" + (":" if unix and prefix else "")
    conf = work / "nginx.conf"
    conf.write_text(nginx_conf(work, block, port, upstream))
    server = subprocess.Popen([coar, "serve", "--listen", listen, "--data", str(work / "data"), "--public-url", base,
                               "--device", "cpu", "--threads", "1", "--kv-memory", "256"],
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    proxy = None
    try:
        assert server.stdout.readline().startswith("listening on "), "the server does not start"
        os.chmod(work, 0o755)
        if unix:
            # If nginx's master runs as root, its workers run as another user.
            os.chmod(work / "coar.sock", 0o666)
        proxy = subprocess.Popen(["nginx", "-e", "stderr", "-p", str(work), "-c", str(conf)])
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert proxy.poll() is None and time.monotonic() < deadline, "nginx does not start"
                time.sleep(0.05)
        count = check(base)
        print(f"ok       {'under ' + prefix if prefix else 'at the root'}{', over a Unix socket' if unix else ''}: "
              f"Studio with {count} parts, the documentation, addresses in answers, events")
    finally:
        for process in (proxy, server):
            if process and process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait()


def main(coar):
    root, path = blocks()
    assert "location / {" in root and "location /coar/ {" in path, "the guide has other blocks"
    for block, prefix, unix in ((root, "", False), (path, "/coar", False), (path, "/coar", True)):
        work = pathlib.Path(tempfile.mkdtemp(prefix="coar-proxy-"))
        try:
            run(coar, work, block, prefix, unix)
        finally:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1])
