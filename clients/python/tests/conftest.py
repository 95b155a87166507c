"""Clients of the real server; `tests/sdk/running.py` starts it."""

import pytest
from proxy import Proxy
from running import ROOT, Server

from coar_client import Coar, Concept

PICTURES = sorted((ROOT / "concepts" / "rex").glob("*.png"))[:3]


@pytest.fixture
def coar(server):
    with Coar(server.url, max_retries=0) as client:
        yield client


@pytest.fixture
def rex_concept(coar, rex) -> Concept:
    return coar.concepts.get(rex)


@pytest.fixture
def proxy(server):
    """Makes proxies in front of the server; each cuts its first connections in the given ways."""
    made = []

    def make(*cuts):
        made.append(Proxy(server.url, *cuts))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="session")
def keyed(tmp_path_factory):
    """A server with keys, whose tenants may draw two images a minute."""
    running = Server(tmp_path_factory.mktemp("keyed") / "data", "--quota-pictures-per-minute", "2")
    return running
