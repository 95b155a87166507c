"""The programs in examples/python, run as a reader of the documentation would run them."""

import importlib.util
import os
import subprocess
import sys

import pytest
from running import PATIENCE_SECONDS, ROOT

EXAMPLES = ROOT / "examples" / "python"


def run(server, folder, name, *args):
    environment = os.environ | {"COAR_SERVER": server.url, "COAR_API_KEY": server.key, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *args],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_quickstart(server, rex, tmp_path):
    out = run(server, tmp_path, "quickstart.py")
    assert (tmp_path / "rex-0.png").exists() and (tmp_path / "rex-1.png").exists()
    assert "/v1/images/" in out.splitlines()[-1]


def test_stream(server, tmp_path):
    run(server, tmp_path, "stream.py", "a photo of a red car")
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["partial-0.png", "partial-1.png", "partial-2.png", "picture.png"]


def test_concepts(server, rex, tmp_path):
    assert "rex" in run(server, tmp_path, "concepts.py", "list")
    run(server, tmp_path, "concepts.py", "export", "rex", "kept.safetensors")
    assert '"status": "ready"' in run(server, tmp_path, "concepts.py", "import", "kept.safetensors", "rex-copy")
    assert '"name": "rex-copy"' in run(server, tmp_path, "concepts.py", "show", "rex-copy")
    run(server, tmp_path, "concepts.py", "delete", "rex-copy")
    assert "rex-copy" not in run(server, tmp_path, "concepts.py", "list")


def receiver():
    spec = importlib.util.spec_from_file_location("webhook_receiver", EXAMPLES / "webhook_receiver.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


#: The example secret of the Standard Webhooks libraries.
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
BODY = b'{"test": 2432232314}'
HEADERS = {
    "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
    "webhook-timestamp": "1614265330",
    "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
}


def test_the_receiver_believes_the_specifications_example_and_nothing_else():
    verify = receiver().verify
    verify(SECRET, HEADERS, BODY, now=1614265330)
    verify(SECRET, HEADERS | {"webhook-signature": "v1,AAAA " + HEADERS["webhook-signature"]}, BODY, now=1614265330)
    for headers, body, now in [
        (HEADERS, BODY + b" ", 1614265330),
        (HEADERS, BODY, 1614265330 + 301),
        (HEADERS | {"webhook-id": "msg_other"}, BODY, 1614265330),
        (HEADERS | {"webhook-signature": ""}, BODY, 1614265330),
        ({}, BODY, 1614265330),
    ]:
        with pytest.raises(ValueError):
            verify(SECRET, headers, body, now=now)
