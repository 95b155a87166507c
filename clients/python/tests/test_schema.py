"""The package against the OpenAPI document of the real server: neither can change without the other."""

import dataclasses
import inspect
import re
import types
import typing

import pytest
import requests

from coar_client import Coar, objects, options
from coar_client.calls import concepts, generations, images, models, trainings
from coar_client.flow import Send
from coar_client.objects import Object, json_name

CLASSES = [one for one in vars(objects).values() if isinstance(one, type) and issubclass(one, Object) and one.SCHEMAS]
OURS = {"idempotency_key", "wait", "on_progress", "progress"}


@pytest.fixture(scope="module")
def document(server):
    return requests.get(f"{server.url}/openapi.json", timeout=60).json()


@pytest.fixture(scope="module")
def schemas(document):
    return document["components"]["schemas"]


def flat(schemas, schema):
    """Properties and required names, of all parts."""
    if "$ref" in schema:
        return flat(schemas, schemas[schema["$ref"].rpartition("/")[2]])
    properties, required = dict(schema.get("properties", {})), set(schema.get("required", []))
    for part in schema.get("allOf", []):
        more, needed = flat(schemas, part)
        properties, required = properties | more, required | needed
    return properties, required


def kinds(schemas, schema):
    """What a value may be, in Python's words; None is left out."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        ours = [one for one in CLASSES if name in one.SCHEMAS]
        return {one.__name__ for one in ours} or kinds(schemas, schemas[name])
    if "oneOf" in schema:
        return set().union(*(kinds(schemas, one) for one in schema["oneOf"]))
    if "enum" in schema:
        return {f"enum {sorted(schema['enum'])}"}
    found = schema.get("type", [])
    found = set([found] if isinstance(found, str) else found) - {"null"}
    if found == {"array"}:
        return {f"tuple of {sorted(kinds(schemas, schema['items']))}"}
    words = {"integer": "int", "number": "float", "string": "str", "boolean": "bool", "object": "Mapping"}
    return {words[one] for one in found}


def hinted(hint):
    """The same of a field's type."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return set().union(*(hinted(one) for one in inner if one is not type(None)))
    if origin is typing.Literal:
        return {f"enum {sorted(inner)}"}
    if origin is tuple:
        return {f"tuple of {sorted(hinted(inner[0]))}"}
    return {(origin or hint).__name__}


@pytest.mark.parametrize(("one", "name"), [(one, name) for one in CLASSES for name in one.SCHEMAS])
def test_objects_are_those_of_the_document(schemas, one, name):
    properties, required = flat(schemas, schemas[name])
    hints = typing.get_type_hints(one)
    fields = {json_name(field.name): field for field in dataclasses.fields(one) if field.name != "raw"}
    assert set(fields) <= set(properties), "the document does not have these fields any more"
    assert required <= set(fields), "fields that every answer has are not represented"
    for key, field in fields.items():
        needed = field.default is dataclasses.MISSING
        assert not needed or key in required, f"{key} may be missing"
        expected, actual = kinds(schemas, properties[key]), hinted(hints[field.name])
        if (name, key) == ("Generation", "status"):
            # A plain string in the document; its words are those of the list's filter.
            assert expected == {"str"}
            continue
        assert actual == expected, key


def test_the_statuses_of_generations(document):
    parameters = document["paths"]["/v1/generations"]["get"]["parameters"]
    status = next(one["schema"] for one in parameters if one["name"] == "status")
    assert kinds(document["components"]["schemas"], status) == hinted(objects.GenerationStatus)


def parameters(method):
    return {json_name(name) for name in inspect.signature(method).parameters} - OURS


def test_parameters_are_those_of_the_document(schemas):
    client = Coar("http://localhost")
    drawing, needed = flat(schemas, schemas["CreateGeneration"])
    assert needed == {"prompt"}
    assert parameters(client.generations.stream) == set(drawing)
    for method in (client.generate, client.generations.create, client.generations.create_async, client.generations.validate):
        assert parameters(method) == set(drawing) - {"partial_images"}
    assert parameters(client.concepts.add) == set(flat(schemas, schemas["RegisterConcept"])[0])
    assert parameters(client.concepts.retrain) - {"concept"} == set(flat(schemas, schemas["TrainConcept"])[0])
    assert set(options.ConceptChanges.__annotations__) == set(flat(schemas, schemas["ChangeConcept"])[0])


STORED = objects.StoredImage(id="a", index=0, seed=0, url="http://x/v1/images/a.png", width=1, height=1, content_hash="")
CALLS = [
    concepts.add("a", [b""]),
    concepts.get("a"),
    concepts.list_all(kind="subject", status="ready"),
    concepts.change("a", name="b"),
    concepts.delete("a"),
    concepts.versions("a"),
    concepts.image("a", 0),
    concepts.export("a", version=1),
    concepts.import_file(b"", "a"),
    concepts.retrain("a"),
    trainings.get("a"),
    trainings.list_all(concept="a", status="failed"),
    trainings.cancel("a"),
    trainings.retry("a"),
    trainings.events("a"),
    trainings.preview("a", 1),
    generations.create("a"),
    generations.create_async("a"),
    generations.stream("a"),
    generations.wait("a"),
    generations._look("a", 1),
    generations.validate("a"),
    generations.get("a"),
    generations.list_all(status="failed"),
    generations.cancel("a"),
    generations.delete("a"),
    images.download(STORED),
    models.list_all(),
    models.get("a"),
]


@pytest.mark.parametrize("flow", CALLS, ids=lambda flow: flow.__qualname__)
def test_calls_use_routes_and_parameters_of_the_document(document, flow):
    effect = next(flow)
    assert isinstance(effect, Send)
    request = effect.request
    path = request.path.removeprefix("http://x")
    # A route without a placeholder comes first, as in the server.
    found = [route for route in document["paths"] if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", route), path)]
    operation = document["paths"][min(found, key=lambda route: route.count("{"))][request.method.lower()]
    known = {(one["in"], one["name"].lower()) for one in operation.get("parameters", [])}
    for name in request.params:
        assert ("query", name) in known
    assert (("header", "idempotency-key") in known) == ("idempotency-key" in request.headers) or "validate_only" in request.params
