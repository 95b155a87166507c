"""What happens when connections are cut: a proxy between the client and the real server does that."""

import httpx2
import pytest
from conftest import PICTURES
from proxy import Proxy
from running import Server

from coar_client import (
    Coar,
    Conflict,
    ConnectionFailed,
    GenerationEnded,
    GenerationQueued,
    ImageReady,
    PreviewReady,
    ProgressEvent,
    TrainingEnded,
)
from coar_client.flow import Pause, Transmit, attempts
from coar_client.http import Reply, Request


@pytest.mark.parametrize("cut", ["answer", "request"])
def test_a_generation_whose_answer_is_lost_is_drawn_once(server, proxy, cut):
    before = server.metric("coar_images_total")
    through = proxy(cut)
    with Coar(through.url) as client:
        images = client.generate("a red car", n=2)
    assert len(images) == 2
    assert through.connections >= 2
    assert server.metric("coar_images_total") == before + 2


def test_a_registration_whose_answer_is_lost_is_made_once(proxy):
    through = proxy("answer")
    with Coar(through.url) as client:
        concept = client.concepts.add("lost-answer", PICTURES, class_="cat", steps=2, wait=True)
        assert concept.versions == 1 and len(list(client.trainings.list(concept=concept))) == 1
        client.concepts.delete(concept)
    assert through.connections == 2


def test_without_retries_a_lost_answer_is_a_failure(proxy):
    through = proxy("answer")
    with Coar(through.url, max_retries=0) as client, pytest.raises(ConnectionFailed) as caught:
        client.generate("a red car")
    assert caught.value.sent is True
    assert through.connections == 1


def test_what_is_not_repeatable_is_sent_once(proxy):
    through = proxy("answer", "answer")
    with Coar(through.url) as client, pytest.raises(ConnectionFailed):
        client.concepts.delete("no-such-concept")
    assert through.connections == 1


def test_what_was_refused_is_sent_once(server, rex):
    sent = []

    class Counting(httpx2.HTTPTransport):
        def handle_request(self, request):
            sent.append(request)
            return super().handle_request(request)

    with Coar(server.url, http_client=httpx2.Client(transport=Counting())) as client, pytest.raises(Conflict):
        client.concepts.add("rex", PICTURES, class_="cat")
    assert len(sent) == 1
    assert sent[0].headers["idempotency-key"]


def test_a_signed_address_gets_no_key(server):
    seen = []

    class Watching(httpx2.HTTPTransport):
        def handle_request(self, request):
            seen.append((request.url.path, request.headers.get("authorization")))
            return super().handle_request(request)

    with Coar(server.url, "a-key", http_client=httpx2.Client(transport=Watching())) as client:
        client.generate("a red car")
    assert [key for path, key in seen if path == "/v1/generations"] == ["Bearer a-key"]
    assert [key for path, key in seen if path.startswith("/v1/images/")] == [None]


def test_a_training_is_followed_over_broken_connections(coar, proxy):
    concept = coar.concepts.add("followed", PICTURES, class_="cat", steps=12)
    through = proxy(700, 2000)
    with Coar(through.url) as client:
        events = list(client.trainings.events(concept.training))
    coar.concepts.delete(concept)
    assert through.connections == 3
    heard = [event for event in events if isinstance(event, ProgressEvent)]
    assert all(before != after for before, after in zip(heard, heard[1:]))
    assert [event.step for event in heard] == sorted(event.step for event in heard)
    previews = [event.preview.step for event in events if isinstance(event, PreviewReady)]
    assert len(previews) == len(set(previews))
    assert isinstance(events[-1], TrainingEnded) and events[-1].training.status == "succeeded"


def test_a_training_is_followed_over_a_restart_of_the_server(tmp_path):
    server = Server(tmp_path / "data").start()
    through = Proxy(server.url)
    heard = []

    def restart_once(progress):
        heard.append(progress)
        if not restarts and progress.step >= 1:
            restarts.append(progress.step)
            server.stop()
            through.aim(server.start().url)

    restarts = []
    try:
        with Coar(through.url) as client:
            concept = client.concepts.add("restarted", PICTURES, class_="cat", steps=20)
            training = client.trainings.wait(concept.training, on_progress=restart_once)
        assert restarts and restarts[0] < 20
        assert training.status == "succeeded" and heard[-1].step == 20
    finally:
        through.close()
        server.stop()


def test_a_generations_stream_that_breaks_off_is_drawn_once(server, proxy):
    before = server.metric("coar_images_total")
    through = proxy(4000)
    with Coar(through.url) as client:
        events = list(client.generations.stream("a red car", n=2, partial_images=1))
    assert through.connections >= 2
    assert isinstance(events[0], GenerationQueued) and isinstance(events[-1], GenerationEnded)
    ready = [event.stored.id for event in events if isinstance(event, ImageReady)]
    assert sorted(ready) == sorted(stored.id for stored in events[-1].generation.images)
    assert server.metric("coar_images_total") == before + 2


def test_a_generations_stream_that_breaks_off_before_its_first_event(server, proxy):
    before = server.metric("coar_images_total")
    through = proxy(300)
    with Coar(through.url) as client:
        events = list(client.generations.stream("a red car"))
    assert isinstance(events[0], GenerationQueued) and isinstance(events[-1], GenerationEnded)
    assert server.metric("coar_images_total") == before + 1


# ---- the rules alone, without waiting


GET = Request(method="GET", path="/", repeatable=True)
ONCE = Request(method="POST", path="/")


def refused(status, code="overloaded", **headers):
    return Reply(status, headers, b'{"error": {"code": "%s", "message": "no"}}' % code.encode())


def outcome(request, answers, max_retries=4):
    """How often it is sent, the pauses, and what comes of it."""
    flow = attempts(request, max_retries)
    effect, sent, pauses = next(flow), 0, []
    answers = iter(answers)
    while True:
        try:
            if isinstance(effect, Pause):
                pauses.append(effect.seconds)
                effect = flow.send(None)
                continue
            assert isinstance(effect, Transmit)
            sent += 1
            answer = next(answers)
            effect = flow.throw(answer) if isinstance(answer, Exception) else flow.send(answer)
        except StopIteration as end:
            return sent, pauses, end.value.status
        except Exception as error:
            return sent, pauses, error


def lost(sent):
    return ConnectionFailed("lost", sent=sent)


def test_pauses_grow_and_the_servers_wish_is_obeyed():
    busy = refused(429, **{"retry-after": "3"})
    sent, pauses, end = outcome(ONCE, [busy, busy, Reply(200, {}, b"")])
    assert (sent, end) == (3, 200)
    assert all(3.0 <= seconds < 4.0 for seconds in pauses)
    sent, pauses, end = outcome(GET, [lost(True)] * 5)
    assert sent == 5 and isinstance(end, ConnectionFailed)
    for seconds, least in zip(pauses, (0.5, 1.0, 2.0, 4.0), strict=True):
        assert least <= seconds <= least * 1.25


@pytest.mark.parametrize(
    ("request_", "answer", "sent"),
    [
        (GET, lost(True), 5),
        (ONCE, lost(True), 1),
        (ONCE, lost(False), 5),
        (ONCE, refused(503, "loading", **{"retry-after": "2"}), 5),
        (GET, refused(503), 5),
        (ONCE, refused(503), 1),
        (GET, refused(502), 5),
        (GET, refused(500, "internal_error"), 1),
        (GET, refused(429, "quota_exceeded", **{"retry-after": "120"}), 1),
        (GET, refused(409, "name_taken"), 1),
        (GET, refused(404), 1),
        (GET, Reply(308, {"location": "/"}, b""), 1),
    ],
)
def test_what_is_sent_again(request_, answer, sent):
    assert outcome(request_, [answer] * 9)[0] == sent
    assert outcome(request_, [answer] * 9, max_retries=0)[0] == 1


def test_work_in_progress_is_waited_for_and_no_failure():
    busy = refused(409, "idempotency_in_progress", **{"retry-after": "1"})
    sent, pauses, end = outcome(GET, [lost(True), *[busy] * 20, Reply(200, {}, b"")], max_retries=1)
    assert (sent, end) == (22, 200)
    assert max(pauses) <= 10
    sent, pauses, end = outcome(GET, [busy] * 1000)
    assert isinstance(end, Conflict) and 300 <= sum(pauses) < 320
