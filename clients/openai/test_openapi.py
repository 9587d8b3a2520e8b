"""/openapi.json: a sound document, and one that real answers and errors hold to."""

import json
import urllib.error
import urllib.request

import jsonschema
import pytest
from openapi_spec_validator import validate

from cluster import NAME


def ask(cluster, path, body=None, method=None):
    data = None if body is None else json.dumps(body).encode()
    headers = {"authorization": f"Bearer {cluster.key}", "content-type": "application/json"}
    request = urllib.request.Request(cluster.url + path, data=data, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()


@pytest.fixture(scope="module")
def page(cluster):
    status, text = ask(cluster, "/openapi.json")
    assert status == 200
    return json.loads(text)


def schema(page, found):
    """What a schema refers to, with the whole document beside it."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "components": page["components"], **found}


def hold(page, path, verb, body):
    told = page["paths"][path][verb]["responses"]["200"]["content"]["application/json"]["schema"]
    jsonschema.validate(body, schema(page, told))


def test_the_document_is_sound(page):
    assert page["openapi"].startswith("3.1")
    validate(page)


CALLS = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions", {"model": NAME, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 60, "n": 2,
                              "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
                              "tool_choice": "required"}),
    ("/v1/completions", {"prompt": ["Once", "The"], "max_tokens": 4, "logprobs": 2}),
    ("/v1/embeddings", {"input": ["Once", "The sea"]}),
    ("/v1/embeddings", {"input": [1, 2, 3], "encoding_format": "base64", "dimensions": 8, "pooling": "last"}),
    ("/v1/responses", {"input": "Hi", "max_output_tokens": 4}),
    ("/v1/responses", {"input": [{"role": "user", "content": "Hi"}], "max_output_tokens": 60, "tool_choice": "required",
                       "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}]}),
    ("/tokenize", {"prompt": "Once upon"}),
    ("/tokenize", {"messages": [{"role": "user", "content": "Hi"}]}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
]


@pytest.mark.parametrize("path,body", CALLS)
def test_requests_and_answers_are_as_described(cluster, page, path, body):
    asked = page["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    jsonschema.validate(body, schema(page, asked))
    status, text = ask(cluster, path, body)
    assert status == 200, text
    hold(page, path, "post", json.loads(text))


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/ready", "/live", "/version", "/v1/cluster",
                                  "/v1/cluster/timeline", "/v1/cluster/events", "/admin/requests"])
def test_what_is_read_is_as_described(cluster, page, path):
    status, text = ask(cluster, path)
    assert status == 200, text
    hold(page, path, "get", json.loads(text))


def test_chunks_of_streams(cluster, page):
    status, text = ask(cluster, "/v1/chat/completions", {
        "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "stream": True, "stream_options": {"include_usage": True}})
    told = page["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]["text/event-stream"]["x-event-schema"]
    chunks = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert chunks[-1] == "[DONE]" and len(chunks) > 4
    for chunk in chunks[:-1]:
        jsonschema.validate(json.loads(chunk), schema(page, told))


def test_a_response_that_is_asked_for_again(cluster, page):
    made = json.loads(ask(cluster, "/v1/responses", {"input": "Hi", "max_output_tokens": 4})[1])
    path = f"/v1/responses/{made['id']}"
    hold(page, "/v1/responses/{id}", "get", json.loads(ask(cluster, path)[1]))
    hold(page, "/v1/responses/{id}/cancel", "post", json.loads(ask(cluster, path + "/cancel", {})[1]))
    hold(page, "/v1/responses/{id}", "delete", json.loads(ask(cluster, path, method="DELETE")[1]))


def test_errors(cluster, page):
    told = page["components"]["responses"]["Error"]["content"]["application/json"]["schema"]
    for path, body, expected in [
        ("/v1/models/none", None, 404), ("/v1/embeddings", {}, 400), ("/v1/embeddings", {"input": "a", "model": "x"}, 404),
        ("/v1/chat/completions", {"messages": [], "temperature": "hot"}, 400), ("/v1/nothing", None, 404),
    ]:
        status, text = ask(cluster, path, body)
        assert status == expected, text
        jsonschema.validate(json.loads(text), schema(page, told))
