"""Behaviour that users of the official OpenAI package can rely on."""

import base64
import concurrent.futures
import struct

import httpx2
import openai
import pytest
import requests
from running import Server

PNG = b"\x89PNG\r\n\x1a\n"


def pixels(image) -> bytes:
    data = base64.b64decode(image.b64_json)
    assert data.startswith(PNG)
    return data


def size(png: bytes) -> tuple[int, int]:
    return struct.unpack(">II", png[16:24])


def draw(client, prompt="a photo of a red car", **more):
    own = {name: more.pop(name) for name in ("seed", "first_index", "concepts", "top_k") if name in more}
    more.setdefault("response_format", "b64_json")
    return client.images.generate(model=more.pop("model", "coar"), prompt=prompt, extra_body=own, **more)


def test_a_picture_is_drawn(client):
    answer = draw(client, seed=7)
    assert size(pixels(answer.data[0])) == (96, 96)
    assert answer.created > 1_700_000_000
    usage = answer.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens > 144
    assert usage.input_tokens_details.image_tokens == 0


def test_base64_is_the_default(client):
    answer = client.images.generate(model="coar", prompt="a red car")
    assert size(pixels(answer.data[0])) == (96, 96)
    assert answer.data[0].url is None


def test_answers_have_the_types_of_the_package(client):
    """The package builds its objects without validating them, so they are validated here."""
    answer = draw(client, seed=1, quality="max", user="user-1")
    checked = type(answer).model_validate(answer.model_dump(), strict=True)
    assert (checked.quality, checked.background, checked.safety_identifier) == ("max", "opaque", "user-1")
    assert checked.usage.output_tokens_details.image_tokens == checked.usage.output_tokens
    type(answer).model_validate(draw(client, seed=1).model_dump(), strict=True)
    for event in draw(client, seed=1, stream=True, partial_images=1, safety_identifier="person-1"):
        type(event).model_validate(event.model_dump(), strict=True)
    assert event.safety_identifier == "person-1"


def test_the_same_seed_draws_the_same_picture(client):
    first, again, other = draw(client, seed=7), draw(client, seed=7), draw(client, seed=8)
    assert pixels(first.data[0]) == pixels(again.data[0]) != pixels(other.data[0])


def test_four_pictures_and_one_of_them_alone(client):
    four = draw(client, n=4, seed=7)
    drawn = [pixels(image) for image in four.data]
    assert len(set(drawn)) == 4
    assert [(image.seed, image.index) for image in four.data] == [(7, index) for index in range(4)]
    alone = draw(client, n=1, seed=7, first_index=2)
    assert pixels(alone.data[0]) == drawn[2]
    assert alone.data[0].index == 2


def test_urls_are_signed_and_need_no_key(client):
    answer = draw(client, seed=7, response_format="url")
    url = answer.data[0].url
    file = requests.get(url, timeout=60)
    assert (file.status_code, file.headers["content-type"]) == (200, "image/png")
    assert file.content == pixels(draw(client, seed=7).data[0])
    assert "signature=" in url and "expires=" in url
    forged = url[:-4] + ("AAAA" if not url.endswith("AAAA") else "BBBB")
    assert requests.get(forged, timeout=60).status_code in (403, 404)


@pytest.mark.parametrize(("name", "magic"), [("png", PNG), ("jpeg", b"\xff\xd8\xff"), ("webp", b"RIFF")])
def test_every_output_format(client, name, magic):
    answer = draw(client, seed=1, output_format=name)
    assert base64.b64decode(answer.data[0].b64_json).startswith(magic)
    assert answer.output_format == name


def test_parameters_without_a_meaning_here_are_accepted_where_they_change_nothing(client):
    answer = draw(
        client,
        seed=1,
        quality="xhigh",
        background="opaque",
        moderation="low",
        complexity="high",
        safety_identifier="person-1",
        user="user-1",
        size="auto",
        style="vivid",
    )
    assert len(answer.data) == 1


def test_a_stream_has_partial_pictures_and_then_the_picture(client):
    events = list(draw(client, seed=7, stream=True, partial_images=3))
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    assert len({event.b64_json for event in events}) == 4
    for event in events:
        assert size(pixels(event)) == (96, 96)
        assert (event.output_format, event.size) == ("png", "96x96")
    completed = events[-1]
    assert completed.usage.total_tokens > 144
    assert pixels(completed) == pixels(draw(client, seed=7).data[0])


def test_concepts_by_prompt_by_field_and_by_model(client, rex):
    written = draw(client, "a photo of <rex> cat on the beach", seed=3)
    assert [concept["name"] for concept in written.concepts] == ["rex"]
    plain = draw(client, "a photo of a cat on the beach", seed=3)
    assert pixels(written.data[0]) != pixels(plain.data[0])
    by_model = draw(client, "a photo of a cat on the beach", seed=3, model="coar:rex")
    by_field = draw(client, "a photo of a cat on the beach", seed=3, concepts=["rex"])
    assert pixels(by_model.data[0]) == pixels(by_field.data[0])
    assert [concept["name"] for concept in by_model.concepts] == ["rex"]
    assert {model.id for model in client.models.list()} >= {"coar", "coar:rex"}
    for model in client.models.list():
        assert client.models.retrieve(model.id).id == model.id


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"n": 11}, "n"),
        ({"size": "97x96"}, "size"),
        ({"background": "transparent"}, "background"),
        ({"response_format": "xml"}, "response_format"),
        ({"seed": -2}, "seed"),
    ],
)
def test_what_cannot_be_used_is_a_bad_request_that_names_it(client, more, param):
    with pytest.raises(openai.BadRequestError) as caught:
        draw(client, **more)
    assert caught.value.param == param
    assert caught.value.request_id
    assert caught.value.code


def test_an_unknown_field_is_refused(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="a cat", extra_body={"sede": 1})
    assert (caught.value.code, caught.value.param) == ("unknown_parameter", "sede")


def test_unknown_models_and_concepts_are_not_found(client):
    with pytest.raises(openai.NotFoundError):
        draw(client, model="gpt-image-1")
    with pytest.raises(openai.NotFoundError) as caught:
        draw(client, "a photo of <nobody> cat")
    assert caught.value.code == "concept_not_found"


class Counting(httpx2.HTTPTransport):
    """Counts requests; can drop the first responses, after the server has processed them."""

    def __init__(self, lose: int = 0):
        super().__init__()
        self.count, self.lose = 0, lose

    def handle_request(self, request):
        self.count += 1
        answer = super().handle_request(request)
        if self.count <= self.lose:
            answer.read()
            answer.close()
            raise httpx2.ReadError("the answer is lost", request=request)
        return answer


def counted(server, lose=0):
    transport = Counting(lose)
    return transport, server.client(max_retries=2, http_client=httpx2.Client(transport=transport))


def test_a_concept_in_training_is_a_conflict_that_is_not_asked_again(server):
    concept = server.register("slow", steps=5000)
    transport, client = counted(server)
    try:
        with pytest.raises(openai.ConflictError) as caught:
            draw(client, "a photo of <slow> cat")
        assert caught.value.code == "concept_not_ready"
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert transport.count == 1
    finally:
        server.http("POST", f"/v1/trainings/{concept['training']['id']}/cancel")
        server.http("DELETE", "/v1/concepts/slow")


def test_a_retry_after_a_lost_answer_does_the_work_once(server):
    before = server.metric("coar_images_total")
    transport, client = counted(server, lose=1)
    headers = {"Idempotency-Key": "lost-answer-1"}
    answer = client.images.with_raw_response.generate(
        model="coar", prompt="a cat", n=2, response_format="b64_json", extra_headers=headers
    )
    assert transport.count == 2
    assert answer.headers["idempotency-replayed"] == "true"
    assert len(answer.parse().data) == 2
    assert server.metric("coar_images_total") == before + 2
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.images.generate(model="coar", prompt="another cat", extra_headers=headers)
    assert caught.value.code == "idempotency_key_reused"


def test_edits_and_variations_say_what_to_use_instead(server):
    transport, client = counted(server)
    picture = base64.b64decode(draw(client, seed=1).data[0].b64_json)
    asked = transport.count
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(image=("cat.png", picture, "image/png"), prompt="the same with a hat")
    assert caught.value.code == "unsupported_endpoint"
    assert "/v1/images/generations" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.create_variation(image=("cat.png", picture, "image/png"))
    assert caught.value.code == "unsupported_endpoint"
    assert transport.count == asked + 2


def test_a_full_queue_is_a_rate_limit_with_a_time(tmp_path):
    server = Server(tmp_path / "small", "--rows", "2", "--queue", "1").start()
    try:
        client = server.client(max_retries=0)
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            asked = [pool.submit(draw, client, n=4) for _ in range(12)]
            refused = [one.exception() for one in asked if one.exception()]
        assert refused
        for error in refused:
            assert isinstance(error, openai.RateLimitError)
            assert 1 <= int(error.response.headers["retry-after"]) <= 120
        assert len(refused) < 12
        # With retries enabled the package succeeds.
        assert len(draw(server.client(max_retries=5)).data) == 1
    finally:
        server.stop()


def test_keys(tmp_path):
    server = Server(tmp_path / "keys").start()
    try:
        server.key = server.make_key("one")
        assert len(draw(server.client(max_retries=0), seed=1).data) == 1
        for wrong in ("none", server.key[:-1] + ("A" if server.key[-1] != "A" else "B")):
            with pytest.raises(openai.AuthenticationError) as caught:
                draw(server.client(api_key=wrong, max_retries=0))
            assert caught.value.code == "invalid_api_key"
        reader = server.make_key("one", scopes="read")
        with pytest.raises(openai.PermissionDeniedError) as caught:
            draw(server.client(api_key=reader, max_retries=0))
        assert caught.value.code == "missing_scope"
        server.register("rex", steps=2)
        server.until_ready("rex")
        stranger = server.client(api_key=server.make_key("two"), max_retries=0)
        with pytest.raises(openai.NotFoundError):
            draw(stranger, "a photo of <rex> cat")
        assert "coar:rex" not in {model.id for model in stranger.models.list()}
    finally:
        server.stop()
