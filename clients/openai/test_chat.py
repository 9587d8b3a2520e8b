"""/v1/chat/completions and /v1/models."""

import json

import openai
import pytest

from cluster import NAME

ASK = {"model": NAME, "messages": [{"role": "user", "content": "Say hello."}], "temperature": 0, "max_tokens": 12}


def text_of(chunks) -> str:
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def test_models(client):
    assert [m.id for m in client.call(lambda c: c.models.list()).data] == [NAME]
    assert client.call(lambda c: c.models.retrieve(NAME)).object == "model"


def test_whole_and_streamed(client):
    whole = client.call(lambda c: c.chat.completions.create(**ASK))
    assert whole.choices[0].message.role == "assistant" and whole.choices[0].message.content
    usage = whole.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens and 0 < usage.completion_tokens <= 12
    assert usage.prompt_tokens_details.cached_tokens is not None
    chunks = client.stream(lambda c: c.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    assert text_of(chunks) == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == usage.completion_tokens
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons[-1] == whole.choices[0].finish_reason and set(reasons[:-1]) == {None}


def test_several_choices_and_seeds(client):
    more = {**ASK, "temperature": 1.0, "seed": 7, "n": 3}
    whole = client.call(lambda c: c.chat.completions.create(**more))
    assert [c.index for c in whole.choices] == [0, 1, 2]
    again = client.call(lambda c: c.chat.completions.create(**more))
    assert [c.message.content for c in again.choices] == [c.message.content for c in whole.choices]
    chunks = client.stream(lambda c: c.chat.completions.create(**more, stream=True))
    for choice in whole.choices:
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices and c.choices[0].index == choice.index)
        assert text == choice.message.content


def test_stop_bias_penalties_and_limits(client):
    whole = client.call(lambda c: c.chat.completions.create(**ASK)).choices[0].message.content
    stop = whole[3:6]
    stopped = client.call(lambda c: c.chat.completions.create(**ASK, stop=[stop]))
    assert stopped.choices[0].message.content == whole[:whole.index(stop)] and stopped.choices[0].finish_reason == "stop"
    short = client.call(lambda c: c.chat.completions.create(**{**ASK, "max_tokens": None, "max_completion_tokens": 2}))
    assert short.usage.completion_tokens == 2 and short.choices[0].finish_reason == "length"
    biased = client.call(lambda c: c.chat.completions.create(**ASK, logit_bias={"100": 100}, presence_penalty=0.5, frequency_penalty=0.5))
    assert biased.choices[0].message.content != whole


def test_logprobs(client):
    whole = client.call(lambda c: c.chat.completions.create(**ASK, logprobs=True, top_logprobs=3))
    entries = whole.choices[0].logprobs.content
    assert len(entries) >= whole.usage.completion_tokens - 1 and all(len(e.top_logprobs) == 3 for e in entries)
    assert all(e.logprob <= 0 and e.top_logprobs[0].logprob >= e.logprob for e in entries)


def test_answers_of_a_form(client):
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
              "required": ["ok", "n"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    more = {**ASK, "max_tokens": 64, "response_format": form}
    whole = client.call(lambda c: c.chat.completions.create(**more))
    made = json.loads(whole.choices[0].message.content)
    assert isinstance(made["ok"], bool) and 0 <= made["n"] <= 99 and whole.choices[0].finish_reason == "stop"
    chunks = client.stream(lambda c: c.chat.completions.create(**more, stream=True))
    assert json.loads(text_of(chunks)) == made


def test_errors(client):
    with pytest.raises(openai.NotFoundError) as e:
        client.call(lambda c: c.chat.completions.create(**{**ASK, "model": "none"}))
    assert e.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as e:
        client.call(lambda c: c.chat.completions.create(**{**ASK, "temperature": -1}))
    assert e.value.param == "temperature"
    with pytest.raises(openai.AuthenticationError):
        client.call(lambda c: c.with_options(api_key="wrong").chat.completions.create(**ASK))
    raw = client.call(lambda c: c.chat.completions.with_raw_response.create(**ASK, extra_body={"mystery": 1}))
    assert raw.headers["x-millrace-ignored"] == "mystery" and raw.headers["x-request-id"]
