"""The synchronous client against the real server."""

import base64
import io
import re

import PIL.Image
import pytest
from conftest import PICTURES
from running import ROOT

import coar_client.calls.common
from coar_client import (
    Coar,
    Conflict,
    ConnectionFailed,
    Forbidden,
    GenerationEnded,
    GenerationFailed,
    GenerationQueued,
    ImageReady,
    InvalidRequest,
    NotFound,
    PartialImage,
    PreviewReady,
    ProgressEvent,
    RateLimited,
    TrainingEnded,
    TrainingFailed,
    Unauthorized,
)


def decoded(file: bytes) -> PIL.Image.Image:
    image = PIL.Image.open(io.BytesIO(file))
    image.load()
    return image


def test_a_concept_is_added_from_every_kind_of_source_and_waited_for(coar):
    heard = []
    sources = [str(PICTURES[0]), PICTURES[1].read_bytes(), PIL.Image.open(PICTURES[2]), coar.generate("a red car", seed=1)[0]]
    concept = coar.concepts.add(
        "sources",
        sources,
        class_="cat",
        steps=4,
        captions=["on the grass", "in the snow"],
        description="from everywhere",
        metadata={"order": "4711"},
        wait=True,
        on_progress=heard.append,
    )
    try:
        assert (concept.status, concept.kind, concept.class_, concept.images) == ("ready", "subject", "cat", 4)
        assert (concept.description, concept.metadata) == ("from everywhere", {"order": "4711"})
        assert concept.version is not None and concept.version.number == 1
        assert concept.training is not None and concept.training.status == "succeeded"
        assert concept.training.hyper_parameters["captions"][:2] == ["on the grass", "in the snow"]
        assert all(isinstance(event, ProgressEvent) for event in heard)
        assert heard[-1].status == "succeeded" and heard[-1].step == heard[-1].total_steps == 4
        assert heard[-1].fraction == 1.0
        steps = [event.step for event in heard]
        assert steps == sorted(steps)
        assert decoded(coar.concepts.image(concept, 3).bytes).size
        assert coar.trainings.get(concept.training).losses[-1].step <= 4
        previews = list(coar.trainings.previews(concept.training))
        assert [preview.step for preview in previews] == sorted(one.step for one in coar.trainings.get(concept.training).previews)
        assert all(decoded(preview.bytes).size == (96, 96) for preview in previews)
    finally:
        coar.concepts.delete("sources")


def test_one_source_is_enough_for_a_style(coar):
    concept = coar.concepts.add("one-image", ROOT / "concepts" / "sepia" / "1.png", kind="style", steps=2)
    assert (concept.status, concept.kind, concept.class_, concept.images) == ("training", "style", None, 1)
    trained = coar.trainings.wait(concept.training)
    assert trained.version == 1
    coar.concepts.delete(concept)


def test_concepts_are_changed_trained_again_and_deleted(coar):
    concept = coar.concepts.add("changing", PICTURES, class_="cat", steps=2, wait=True)
    assert coar.concepts.change(concept, description="a cat", metadata={"a": "b"}).description == "a cat"
    renamed = coar.concepts.change(concept, name="changed", description=None)
    assert (renamed.name, renamed.description, renamed.metadata) == ("changed", None, {"a": "b"})
    training = coar.concepts.retrain("changed", steps=3, captions=["on the beach"], wait=True)
    assert (training.version, training.progress.total_steps) == (2, 3)
    assert [version.number for version in coar.concepts.versions("changed")] == [2, 1]
    assert coar.concepts.change("changed", version=1).version.number == 1
    assert coar.concepts.export("changed", version=1) != coar.concepts.export("changed", version=2)
    assert len(list(coar.trainings.list(concept="changed"))) == 2
    coar.concepts.delete("changed")
    with pytest.raises(NotFound) as caught:
        coar.concepts.get("changed")
    assert (caught.value.code, caught.value.status) == ("concept_not_found", 404)


def test_a_concept_file_goes_out_and_comes_back(coar, rex_concept, tmp_path):
    path = tmp_path / "rex.safetensors"
    exported = coar.concepts.export("rex", path)
    assert path.read_bytes() == exported
    by_path = coar.concepts.import_file(path, "rex-by-path")
    by_bytes = coar.concepts.import_file(exported, "rex-by-bytes")
    try:
        for imported in (by_path, by_bytes):
            assert (imported.status, imported.images, imported.class_) == ("ready", 0, "cat")
            assert imported.version.hash == rex_concept.version.hash
            assert coar.concepts.export(imported) == exported
        first, second = (coar.generate(f"a photo of <{name}> cat", seed=5)[0] for name in ("rex", "rex-by-path"))
        assert decoded(first.bytes).tobytes() == decoded(second.bytes).tobytes()
    finally:
        coar.concepts.delete(by_path)
        coar.concepts.delete(by_bytes)


def test_images_are_generated_saved_and_drawn_again(coar, rex, tmp_path):
    images = coar.generate("a photo of <rex> cat on the beach", n=3, seed=7, guidance_scale=1.5, metadata={"order": "1"})
    assert [(image.seed, image.index) for image in images] == [(7, 0), (7, 1), (7, 2)]
    again = coar.generate("a photo of <rex> cat on the beach", seed=7, first_index=1, guidance_scale=1.5)[0]
    assert decoded(again.bytes).tobytes() == decoded(images[1].bytes).tobytes() != decoded(images[0].bytes).tobytes()
    file = images[0].save(tmp_path / "rex.png")
    assert file.read_bytes() == images[0].bytes
    assert decoded(images[0].bytes).size == (images[0].stored.width, images[0].stored.height) == (96, 96)


@pytest.mark.parametrize(("output_format", "word"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_a_notebook_shows_the_image(coar, output_format, word):
    images = coar.generate("a red car", seed=1, output_format=output_format)
    image = images[0]
    bundle = image._repr_mimebundle_()
    assert base64.b64decode(bundle[f"image/{output_format}"]) == image.bytes
    assert "seed=1" in bundle["text/plain"] and len(bundle["text/plain"]) < 200
    assert decoded(image.bytes).format == word
    data = re.search(r'src="data:image/(\w+);base64,([^"]+)"', images._repr_html_())
    assert (data[1], base64.b64decode(data[2])) == (output_format, image.bytes)
    png = image._repr_png_()
    assert png == image.bytes if output_format == "png" else png is None


def test_generations_are_kept_listed_and_deleted(coar, rex):
    generation = coar.generations.create("a cat in the snow", concepts=["rex"], n=2, priority=3)
    assert (generation.status, generation.priority, len(generation.images)) == ("succeeded", 3, 2)
    assert generation.prompt == "a <rex> cat in the snow"
    assert [(used.name, used.version) for used in generation.concepts] == [("rex", 1)]
    assert generation.usage.total_tokens == generation.usage.input_tokens + generation.usage.output_tokens
    assert generation.progress.fraction == 1.0
    assert generation.id in [one.id for one in coar.generations.list(status="succeeded")]
    images = coar.images.of(coar.generations.get(generation.id))
    assert coar.images.download(generation.images[0]).bytes == images[0].bytes
    assert coar.images.fetch(generation.images[1].url).bytes == images[1].bytes
    coar.generations.delete(generation)
    with pytest.raises(NotFound):
        coar.generations.get(generation)


def test_a_generation_is_queued_and_waited_for_or_cancelled(coar):
    queued = coar.generations.create_async("a red car", n=2)
    assert queued.status in ("queued", "running")
    assert len(coar.generations.wait(queued).images) == 2
    long = coar.generations.create_async("a red car", n=10)
    assert coar.generations.cancel(long).status == "cancelled"
    with pytest.raises(GenerationFailed) as caught:
        coar.generations.wait(long.id)
    assert (caught.value.code, caught.value.generation.id) == ("cancelled", long.id)


def test_validating_draws_nothing(coar, rex):
    before = len(list(coar.generations.list()))
    plan = coar.generations.validate("a cat", concepts=["rex"], n=4)
    assert (plan.valid, plan.prompt, plan.request.n) == (True, "a <rex> cat", 4)
    assert plan.usage.output_tokens == 4 * 144
    assert len(list(coar.generations.list())) == before


def test_a_stream_has_unfinished_images_and_then_the_image(coar):
    events = list(coar.generations.stream("a red car", seed=7, partial_images=3, n=2))
    assert isinstance(events[0], GenerationQueued) and isinstance(events[-1], GenerationEnded)
    partial = [event for event in events if isinstance(event, PartialImage)]
    assert sorted((event.index, event.number) for event in partial) == [(index, number) for index in range(2) for number in range(3)]
    assert all(decoded(event.image.bytes).size == (96, 96) for event in partial)
    ready = [event.stored for event in events if isinstance(event, ImageReady)]
    assert sorted(stored.index for stored in ready) == [0, 1]
    assert {stored.id for stored in events[-1].generation.images} == {stored.id for stored in ready}


def test_leaving_a_stream_cancels_the_generation(coar):
    for event in coar.generations.stream("a red car", n=10):
        assert isinstance(event, GenerationQueued)
        break
    assert coar.generations.get(event.generation).status == "cancelled"


def test_a_trainings_events_begin_with_the_present_state(coar, rex_concept):
    events = list(coar.trainings.events(rex_concept.training))
    assert isinstance(events[0], ProgressEvent) and events[0].status == "succeeded"
    assert [event.preview.step for event in events if isinstance(event, PreviewReady)] == [
        preview.step for preview in rex_concept.training.previews
    ]
    assert isinstance(events[-1], TrainingEnded) and events[-1].training.id == rex_concept.training.id


def test_a_cancelled_training_is_a_failure_for_its_waiter_and_can_be_tried_again(coar):
    asked = []

    def cancel(progress):
        # Progress may skip steps.
        if progress.step >= 1 and not asked:
            asked.append(progress.step)
            coar.trainings.cancel(concept.training)

    concept = coar.concepts.add("cancelled", PICTURES, class_="cat", steps=5000)
    with pytest.raises(TrainingFailed) as caught:
        coar.trainings.wait(concept.training, on_progress=cancel)
    assert (caught.value.code, caught.value.training.status) == ("cancelled", "cancelled")
    again = coar.trainings.retry(concept.training)
    assert again.status in ("queued", "running")
    coar.trainings.cancel(again)
    coar.concepts.delete(concept)


def test_lists_go_over_all_pages(coar, rex, monkeypatch):
    ids = [coar.generations.create_async("a red car").id for _ in range(5)]
    monkeypatch.setattr(coar_client.calls.common, "PAGE", 2)
    listed = [generation.id for generation in coar.generations.list()]
    assert listed[:5] == ids[::-1]
    assert len(set(listed)) == len(listed)
    assert coar.concepts.get(rex) in list(coar.concepts.list(kind="subject", status="ready"))
    for generation in ids:
        coar.generations.wait(generation)


def test_models(coar, rex):
    models = coar.models.list()
    assert {"coar", "coar:rex"} <= {model.id for model in models}
    model = coar.models.get("coar:rex")
    assert [(concept.name, concept.class_) for concept in model.concepts] == [("rex", "cat")]
    assert model.sizes[0] == "96x96"


def test_errors_have_the_servers_facts(coar, rex):
    with pytest.raises(InvalidRequest) as caught:
        coar.generate("a cat", n=11)
    error = caught.value
    assert (error.code, error.param, error.limit, error.status) == ("invalid_value", "n", 10, 400)
    assert error.request_id and error.request_id in str(error) and error.message in str(error)
    with pytest.raises(NotFound) as caught:
        coar.generate("a photo of <unknown> cat")
    assert caught.value.code == "concept_not_found"
    with pytest.raises(Conflict) as caught:
        coar.concepts.add("rex", PICTURES, class_="cat")
    assert caught.value.code == "name_taken"
    with pytest.raises(InvalidRequest) as caught:
        coar.concepts.add("broken", [b"no image"], class_="cat")
    assert caught.value.code == "unknown_image_format"
    with pytest.raises(InvalidRequest) as caught:
        coar.generate("a cat", idempotency_key="same")
        coar.generate("another cat", idempotency_key="same")
    assert (caught.value.code, caught.value.status) == ("idempotency_key_reused", 422)


def test_a_server_that_is_not_there():
    with Coar("http://127.0.0.1:1", max_retries=0) as client:
        with pytest.raises(ConnectionFailed) as caught:
            client.models.list()
        for feed in (client.trainings.events("a"), client.generations.stream("a"), client.concepts.list()):
            with pytest.raises(ConnectionFailed):
                next(feed)
    assert caught.value.sent is False and caught.value.status is None


def test_keys_scopes_and_quotas(keyed, monkeypatch):
    keyed.start()
    try:
        key, reader = keyed.make_key("one"), keyed.make_key("one", scopes="read")
        monkeypatch.setenv("COAR_SERVER", keyed.url)
        monkeypatch.setenv("COAR_API_KEY", "none")
        with Coar(max_retries=0) as client, pytest.raises(Unauthorized) as caught:
            client.models.list()
        assert caught.value.code == "invalid_api_key"
        with Coar(api_key=reader, max_retries=0) as client, pytest.raises(Forbidden) as caught:
            client.generate("a cat")
        assert caught.value.code == "missing_scope"
        monkeypatch.setenv("COAR_API_KEY", key)
        with Coar(max_retries=0) as client:
            assert len(client.generate("a cat", n=2)) == 2
            with pytest.raises(RateLimited) as caught:
                client.generate("a cat", n=2)
        assert caught.value.code == "quota_exceeded" and 0 < caught.value.retry_after <= 60
    finally:
        keyed.stop()
