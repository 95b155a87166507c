"""Parts that need no server."""

import inspect
import io

import PIL.Image
import pytest

from coar_client import AsyncCoar, Coar, CoarError, ImageFile, Progress, ProgressEvent, ServerError, StoredImage
from coar_client.http import Reply, refusal
from coar_client.images import uploads
from coar_client.objects import decode
from coar_client.progress import Line
from coar_client.sse import Decoder, ServerEvent

STREAM = (
    b': working\r\n\r\nevent: progress\r\nid: 3\r\ndata: {"step": 1,\r\ndata: "n": 2}\r\n\r\nevent: odd\ndata: no json\n\n'
    b'data: [1]\n\nevent: ended\ndata:{"a":"\xc3\xa9"}\n\nevent: half\ndata: {}\n'
)
EVENTS = [ServerEvent("progress", {"step": 1, "n": 2}), ServerEvent("message", [1]), ServerEvent("ended", {"a": "é"})]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_in_pieces_of_any_size(size):
    decoder = Decoder()
    found = [event for start in range(0, len(STREAM), size) for event in decoder.feed(STREAM[start : start + size])]
    assert found == EVENTS


def test_unknown_fields_are_kept_and_missing_ones_are_an_error():
    progress = decode(Progress, {"step": 1, "total_steps": 4, "loss": None, "colour": "red"})
    assert (progress.step, progress.loss, progress.fraction) == (1, None, 0.25)
    assert progress.raw["colour"] == "red"
    assert "colour" not in repr(progress)
    with pytest.raises(ServerError, match="a Progress without `total_steps`"):
        decode(Progress, {"step": 1})
    with pytest.raises(ServerError, match="not a Progress"):
        decode(Progress, [1])


def test_a_proxys_page_is_an_error_too():
    error = refusal(Reply(502, {}, b"<h1>Bad Gateway</h1>"))
    assert isinstance(error, ServerError)
    assert (error.code, error.status, str(error)) == ("502", 502, "The server answered 502: <h1>Bad Gateway</h1> (code 502)")
    assert isinstance(refusal(Reply(418, {}, b'["error"]')), CoarError)


def test_where_the_server_is(monkeypatch):
    monkeypatch.setenv("COAR_SERVER", "http://one:1/")
    monkeypatch.setenv("COAR_API_KEY", "")
    assert (Coar().settings.server, Coar().settings.api_key) == ("http://one:1", None)
    assert Coar("https://two", "key").settings.server == "https://two"
    assert "key" not in repr(Coar("https://two", "key")) + repr(Coar("https://two", "key").settings)
    monkeypatch.setenv("COAR_SERVER", "")
    assert Coar().settings.server == "http://127.0.0.1:8080"
    for wrong in ("localhost:8080", "ftp://x", "http://x/v1", "http://x/v1/", "http://"):
        with pytest.raises(ValueError, match="must"):
            Coar(wrong)


def test_sources_of_images(tmp_path):
    path = tmp_path / "a.png"
    PIL.Image.new("RGB", (4, 4), "red").save(path)
    data = path.read_bytes()
    with path.open("rb") as file:
        sent = uploads([path, str(path), data, file, ImageFile(data, "image/png"), io.BytesIO(data)])
    assert [(field, body) for field, (_, body, _) in sent] == [("images", data)] * 6
    (field, (_, body, _)) = uploads(PIL.Image.open(path))[0]
    assert PIL.Image.open(io.BytesIO(body)).size == (4, 4)
    for one in (path, str(path), data, io.BytesIO(data)):
        assert len(uploads(one)) == 1


def test_a_line_of_progress():
    file = io.StringIO()
    line = Line("rex", file)
    line(ProgressEvent(status="running", step=10, total_steps=60, eta_seconds=12))
    line(ProgressEvent(status="succeeded", step=60, total_steps=60))
    first, second = file.getvalue().split("\r")[1:]
    assert first == "rex: running, step 10 of 60, 12 s left"
    assert second.rstrip() == "rex: succeeded, step 60 of 60" and second.endswith("\n") and len(second) > len(first)


def test_a_stored_image_is_shown_short():
    stored = StoredImage(id="image_1", index=0, seed=1, url="http://x", width=1, height=1, content_hash="a")
    assert stored == StoredImage(id="image_1", index=0, seed=1, url="http://x", width=1, height=1, content_hash="a", raw={"new": 1})


def calls(client):
    """Every method of a client, with the flow or feed behind it."""
    found = {"": vars(type(client))} | {name: vars(type(one)) for name, one in vars(client).items() if not name.startswith("_")}
    return {(resource, name): method.make for resource, methods in found.items() for name, method in methods.items() if hasattr(method, "make")}


def test_both_clients_have_the_same_calls():
    assert calls(Coar()) == calls(AsyncCoar())
    assert len(calls(Coar())) > 30
    for client, result in ((Coar(), "list[Model]"), (AsyncCoar(), "Awaitable[list[Model]]")):
        assert inspect.signature(client.models.list).return_annotation == result
        assert client.models.list.__doc__ and "seed" in inspect.signature(client.generate).parameters
