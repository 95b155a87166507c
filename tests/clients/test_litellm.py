"""LiteLLM: as a library, and its proxy between OpenAI's package and the server."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import litellm
import openai
import pytest
import requests
from checks import TALL, TOO_MANY, from_base64, from_url
from running import PATIENCE_SECONDS, poll

MASTER_KEY = "sk-clients"
#: docs/howto/clients.md
CONFIG = """\
model_list:
  - model_name: coar
    litellm_params: &coar
      model: openai/coar
      api_base: os.environ/COAR_URL
      api_key: os.environ/COAR_KEY
    model_info: &images
      mode: image_generation
  - model_name: "coar:*"
    litellm_params:
      <<: *coar
      model: "openai/coar:*"
    model_info: *images
  - model_name: coar-url
    litellm_params:
      <<: *coar
      extra_body:
        response_format: url
    model_info: *images
general_settings:
  master_key: os.environ/LITELLM_MASTER_KEY
"""


def draw(server, **more):
    """`litellm.image_generation` on the server."""
    own = {"model": "openai/coar", "prompt": "a red car", "api_base": f"{server.url}/v1", "api_key": server.key}
    return litellm.image_generation(**(own | more))


def test_library_draws_two_images(server):
    answer = draw(server, n=2, size="80x112")
    images = [from_base64(image.b64_json, TALL) for image in answer.data]
    assert len(set(images)) == 2
    assert answer.usage.total_tokens > 144


def test_library_takes_addresses(server):
    answer = draw(server, n=2, extra_body={"response_format": "url"})
    assert len({from_url(image.url) for image in answer.data}) == 2


def test_library_passes_unknown_fields_and_concepts(server, rex):
    first, again = (draw(server, model=f"openai/coar:{rex}", prompt="a photo of a cat", extra_body={"seed": 7}) for _ in range(2))
    other = draw(server, prompt="a photo of a cat", extra_body={"seed": 7})
    assert from_base64(first.data[0].b64_json) == from_base64(again.data[0].b64_json) != from_base64(other.data[0].b64_json)


def test_library_raises_its_own_errors(server):
    with pytest.raises(litellm.BadRequestError, match=TOO_MANY):
        draw(server, n=11)
    with pytest.raises(litellm.NotFoundError, match="nothing"):
        draw(server, model="openai/nothing")
    with pytest.raises(litellm.AuthenticationError):
        draw(server, api_key="wrong")


@pytest.fixture(scope="module")
def proxy(server, rex, tmp_path_factory):
    """LiteLLM's proxy in front of the server; an OpenAI client of it."""
    folder = tmp_path_factory.mktemp("litellm")
    (folder / "config.yaml").write_text(CONFIG)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = os.environ | {
        "COAR_URL": f"{server.url}/v1",
        "COAR_KEY": server.key,
        "LITELLM_MASTER_KEY": MASTER_KEY,
        # Without this the proxy fetches a list of prices.
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    program = pathlib.Path(sys.executable).parent / "litellm"
    command = [str(program), "--config", str(folder / "config.yaml"), "--host", "127.0.0.1", "--port", str(port)]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)

    def look():
        assert process.poll() is None, (folder / "log").read_text(errors="replace")[-4000:]
        try:
            return True if requests.get(f"http://127.0.0.1:{port}/health/liveliness", timeout=5).ok else None
        except requests.ConnectionError:
            return None

    try:
        poll("the start of the proxy", look)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=MASTER_KEY, timeout=300, max_retries=0)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_SECONDS)


def test_proxy_lists_the_models(proxy):
    assert {model.id for model in proxy.models.list()} >= {"coar", "coar-url"}


def test_proxy_passes_both_forms(proxy):
    answer = proxy.images.generate(model="coar", prompt="a red car", n=2, size="80x112")
    assert len({from_base64(image.b64_json, TALL) for image in answer.data}) == 2
    answer = proxy.images.generate(model="coar-url", prompt="a red car", n=2)
    assert len({from_url(image.url) for image in answer.data}) == 2


def test_response_format_is_refused_by_the_client_itself(proxy, server):
    """If this fails, docs/howto/clients.md can do without the model `coar-url`."""
    with pytest.raises(openai.BadRequestError, match="UnsupportedParamsError"):
        proxy.images.generate(model="coar", prompt="a red car", response_format="url")
    with pytest.raises(litellm.UnsupportedParamsError):
        draw(server, response_format="url")


def test_proxy_passes_seeds_and_concepts(proxy):
    more = {"prompt": "a photo of a cat", "extra_body": {"seed": 7}}
    first, again, other = (proxy.images.generate(model=model, **more) for model in ("coar:rex", "coar:rex", "coar"))
    assert from_base64(first.data[0].b64_json) == from_base64(again.data[0].b64_json) != from_base64(other.data[0].b64_json)


def test_proxy_passes_errors(proxy):
    with pytest.raises(openai.BadRequestError, match=TOO_MANY):
        proxy.images.generate(model="coar", prompt="a red car", n=11)
