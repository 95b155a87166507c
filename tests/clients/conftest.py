"""Servers with a key; `tests/sdk/running.py` starts them."""

import pytest
from running import Server


def keyed(folder, *flags: str) -> Server:
    server = Server(folder / "data", *flags)
    server.key = server.make_key("clients")
    return server.start()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A server with default settings."""
    running = keyed(tmp_path_factory.mktemp("default"))
    yield running
    running.stop()


#: The settings of docs/howto/clients.md for clients with fixed models and sizes.
FIXED = ("--model-alias", "gpt-image-1=coar,dall-e-2=coar,dall-e-3=coar", "--size-policy", "nearest")


@pytest.fixture(scope="session")
def fixed(tmp_path_factory):
    """A server for clients with fixed models and sizes."""
    running = keyed(tmp_path_factory.mktemp("fixed"), *FIXED)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def addresses(tmp_path_factory):
    """The same for clients that expect addresses without asking for them."""
    running = keyed(tmp_path_factory.mktemp("addresses"), *FIXED, "--response-format", "url")
    yield running
    running.stop()
