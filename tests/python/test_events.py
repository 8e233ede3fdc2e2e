"""The events of streams against the schemas that the server's own document has for them."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from serving import EXAMPLE, Served

jsonschema_rs = pytest.importorskip("jsonschema_rs", reason="not where only a device's tests run")

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
MESSAGES = {"messages": [{"role": "user", "content": "abc"}]}
USAGE = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, MESSAGES),
    (CHAT, MESSAGES | USAGE | {"n": 2, "logprobs": True, "top_logprobs": 3, "return_token_ids": True}),
    (CHAT, MESSAGES | {"logprobs": True, "stop": ["a", "b", "c"], "prompt_logprobs": 1}),
    (COMPLETION, {"prompt": "abc"}),
    (COMPLETION, {"prompt": ["abc", "x"], "echo": True, "logprobs": 2, "n": 2, "return_token_ids": True} | USAGE),
    (COMPLETION, {"prompt": "abc", "echo": True, "logprobs": 0, "max_tokens": 0, "prompt_logprobs": 1}),
    (COMPLETION, {"prompt": "abc", "model": "upper", "stop_token_ids": list(range(80, 106))}),
]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with Served(*EXAMPLE) as served:
        yield served


def closed(schema: Any) -> Any:
    """The schema, allowing of an object only the properties that it lists."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: closed(part) for name, part in schema.items()}
    return {"additionalProperties": False} | found if "properties" in found else found


def validator(document: dict[str, Any], path: str) -> jsonschema_rs.Validator:
    """Of the data of a route's events."""
    content = document["paths"][path]["post"]["responses"]["200"]["content"]
    schemas = closed(document["components"]["schemas"])
    whole = content["text/event-stream"]["schema"] | {"components": {"schemas": schemas}}
    return jsonschema_rs.Draft202012Validator(whole)


@pytest.mark.parametrize(("path", "fields"), REQUESTS)
def test_events_are_what_the_document_says(served: Served, path: str, fields: dict[str, Any]) -> None:
    events = validator(json.loads(served.call("/openapi.json")[1]), path)
    status, body = served.call(path, {"max_tokens": 6} | fields | {"stream": True})
    assert status == 200
    data = [line.removeprefix("data: ") for line in body.split("\n\n") if line and not line.startswith(":")]
    assert data.pop() == "[DONE]"
    assert data
    for event in map(json.loads, data):
        events.validate(event)
        for name in event:
            assert not events.is_valid(event | {name: {"unexpected": 1}}), f"the schema says nothing of {name}"
    assert not events.is_valid(json.loads(data[0]) | {"further": 1})
