"""The API's description is complete, and tells no lies about itself."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from service.api import responses
from service.api.examples import ANSWERS, CHUNKS
from tests.integration.api_server import scripted_app
from tests.integration.scripted_engine import ScriptedEngine, deltas


@pytest.fixture(scope="module")
def document(tiny_target: Path) -> dict[str, Any]:
    app = scripted_app(ScriptedEngine(lambda request: deltas("text")), tiny_target)
    return json.loads(json.dumps(app.openapi()))  # as a client reads it


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def objects(value: Any, where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every JSON object in the document, with its place."""
    if isinstance(value, dict):
        yield where, value
        for key, item in value.items():
            yield from objects(item, f"{where}/{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from objects(item, f"{where}/{index}")


def test_every_route_is_described(document: dict[str, Any]) -> None:
    told = {tag["name"] for tag in document["tags"] if tag["description"]}
    ids = [operation["operationId"] for _, operation in operations(document)]
    assert len(set(ids)) == len(ids) > 10
    for name, operation in operations(document):
        assert operation["summary"], name
        assert operation.get("description"), name
        assert set(operation["tags"]) <= told, name
        for parameter in operation.get("parameters", []):
            assert parameter["description"], (name, parameter)


def test_every_schema_and_field_is_described(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    assert {"CompletionRequest", "SpeculativeField", "ChatCompletionChunk", "ErrorBody", "Metrics"} <= set(schemas)
    missing = [name for name, schema in schemas.items() if not schema.get("description")]
    for name, schema in schemas.items():
        for field, about in schema.get("properties", {}).items():
            if not about.get("description") and set(about) != {"$ref"}:  # what it refers to is described
                missing.append(f"{name}.{field}")
    assert not missing


def test_every_failure_has_the_schema_of_errors_and_an_example(document: dict[str, Any]) -> None:
    adapter = TypeAdapter(responses.ErrorBody)
    for name, operation in operations(document):
        assert "200" in operation["responses"], name
        failures = {status: answer for status, answer in operation["responses"].items() if status != "200"}
        assert "500" in failures or name == "GET /metrics", name
        assert ("415" in failures) == ("requestBody" in operation), name
        for status, answer in failures.items():
            content = answer["content"]["application/json"]
            assert content["schema"] == {"$ref": "#/components/schemas/ErrorBody"}, (name, status)
            [reference] = content["examples"].values()
            example = document["components"]["examples"][reference["$ref"].rpartition("/")[2]]["value"]
            assert adapter.validate_python(example, strict=True)["error"]["type"], (name, status)
            assert answer["description"], (name, status)
            assert ("Retry-After" in answer["headers"]) == (status in ("429", "503")), (name, status)


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    references = [value["$ref"] for _, value in objects(document) if isinstance(value.get("$ref"), str)]
    assert references
    for reference in references:
        found: Any = document
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]
        assert found


def test_every_body_has_an_example(document: dict[str, Any]) -> None:
    bodies = [operation["requestBody"] for _, operation in operations(document) if "requestBody" in operation]
    assert len(bodies) == 4
    for body in bodies:
        name = body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        assert document["components"]["schemas"][name]["examples"], name


@pytest.mark.parametrize("name", ANSWERS)
def test_examples_of_answers_are_such_answers(name: str) -> None:
    TypeAdapter(getattr(responses, name)).validate_python(ANSWERS[name], strict=True)


@pytest.mark.parametrize("name", CHUNKS)
def test_examples_of_chunks_are_such_chunks(name: str) -> None:
    for chunk in CHUNKS[name]:
        TypeAdapter(getattr(responses, name)).validate_json(chunk, strict=True)


def test_streams_are_answers_of_the_routes_that_stream(document: dict[str, Any]) -> None:
    streaming = [
        name
        for name, operation in operations(document)
        if "text/event-stream" in operation["responses"]["200"]["content"]
    ]
    assert streaming == ["POST /v1/completions", "POST /v1/chat/completions"]
