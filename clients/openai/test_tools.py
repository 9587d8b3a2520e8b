"""Tool calls of /v1/chat/completions."""

import json

import openai
import pytest

from cluster import NAME

WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["C", "F"]}},
                   "required": ["city", "unit"], "additionalProperties": False}}}
TIME = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}}
ASK = {"model": NAME, "messages": [{"role": "user", "content": "How warm is it in Rome?"}], "temperature": 0,
       "max_tokens": 96, "tools": [WEATHER, TIME]}
NAMED = {"type": "function", "function": {"name": "get_weather"}}


def check(name: str, arguments: str) -> None:
    made = json.loads(arguments)
    if name == "get_weather":
        assert set(made) == {"city", "unit"} and made["unit"] in "CF" and len(made["city"]) <= 12
    else:
        assert name == "get_time" and made == {}


def test_a_function_that_is_named(client):
    whole = client.call(lambda c: c.chat.completions.create(**ASK, tool_choice=NAMED))
    (call,) = whole.choices[0].message.tool_calls
    assert call.function.name == "get_weather" and call.id and whole.choices[0].finish_reason == "tool_calls"
    assert whole.choices[0].message.content is None
    check(call.function.name, call.function.arguments)
    chunks = client.stream(lambda c: c.chat.completions.create(**ASK, tool_choice=NAMED, stream=True))
    pieces = [p for c in chunks if c.choices for p in c.choices[0].delta.tool_calls or []]
    assert pieces[0].function.name == "get_weather" and pieces[0].id and all(p.index == 0 for p in pieces)
    assert all(p.function.name is None and p.id is None for p in pieces[1:])
    assert "".join(p.function.arguments for p in pieces) == call.function.arguments
    assert not any(c.choices[0].delta.content for c in chunks if c.choices)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_call_that_is_required(client):
    one = client.call(lambda c: c.chat.completions.create(**ASK, tool_choice="required", parallel_tool_calls=False))
    (call,) = one.choices[0].message.tool_calls
    check(call.function.name, call.function.arguments)
    some = client.call(lambda c: c.chat.completions.create(**{**ASK, "max_tokens": 512}, tool_choice="required"))
    calls = some.choices[0].message.tool_calls
    assert calls and len({c.id for c in calls}) == len(calls)
    if some.choices[0].finish_reason == "tool_calls":
        for call in calls:
            check(call.function.name, call.function.arguments)


def test_results_go_back(client):
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome", "unit": "C"}'}}
    turns = ASK["messages"] + [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "21 degrees"}]
    whole = client.call(lambda c: c.chat.completions.create(**{**ASK, "messages": turns, "tool_choice": "none"}))
    assert whole.choices[0].message.content and not whole.choices[0].message.tool_calls
    less = client.call(lambda c: c.chat.completions.create(**{**ASK, "messages": turns[:1], "tool_choice": "none"}))
    assert whole.usage.prompt_tokens > less.usage.prompt_tokens


def test_as_the_model_likes(client):
    whole = client.call(lambda c: c.chat.completions.create(**ASK))
    message = whole.choices[0].message
    assert message.content or message.tool_calls
    assert "<tool_call" not in (message.content or "")
    none = client.call(lambda c: c.chat.completions.create(**ASK, tool_choice="none"))
    assert none.usage.prompt_tokens < whole.usage.prompt_tokens, "the model hears of tools only where it may call them"


def test_what_is_refused(client):
    for more in [{"functions": [{"name": "f"}]}, {"tool_choice": {"type": "function", "function": {"name": "other"}}},
                 {"tools": [{"type": "custom", "custom": {"name": "x"}}]}]:
        with pytest.raises(openai.BadRequestError) as e:
            client.call(lambda c: c.chat.completions.create(**{**ASK, **more}))
        assert e.value.param.split("[")[0] in more
