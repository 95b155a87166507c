"""Runs a file of node's test runner against a server."""

import os
import pathlib
import subprocess

from checks import TALL, decoded
from running import PATIENCE_SECONDS


def run(file: str, server, concept: str, out: pathlib.Path) -> list[str]:
    """Runs a file of the folder CLIENT_NODE. Returns the names of the images that it wrote: 80x112, and no two alike."""
    environment = os.environ | {
        "COAR_URL": server.url,
        "COAR_KEY": server.key,
        "COAR_MODEL": f"coar:{concept}",
        "COAR_OUT": str(out),
    }
    command = ["node", "--test", str(pathlib.Path(os.environ["CLIENT_NODE"]) / file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    images = {path.name: path.read_bytes() for path in sorted(out.glob("*.png"))}
    for data in images.values():
        decoded(data, TALL)
    assert len(set(images.values())) == len(images)
    return list(images)
