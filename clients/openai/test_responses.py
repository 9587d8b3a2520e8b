"""/v1/responses, and what is left of it when the coordinator is killed."""

import json
import time

import openai
import pytest

from cluster import NAME

ASK = {"model": NAME, "input": "Say hello.", "temperature": 0, "max_output_tokens": 16}


def test_whole_and_streamed(client):
    whole = client.call(lambda c: c.responses.create(**ASK, instructions="Be brief.", metadata={"a": "b"}))
    assert whole.output_text and whole.id.startswith("resp_") and whole.metadata == {"a": "b"}
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    events = client.stream(lambda c: c.responses.create(**ASK, instructions="Be brief.", stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert events[0].type == "response.created" and events[-1].response.output_text == whole.output_text
    assert events[-1].type == ("response.completed" if whole.status == "completed" else "response.incomplete")
    again = client.call(lambda c: c.responses.retrieve(whole.id))
    assert again.output_text == whole.output_text and again.instructions == "Be brief."


def test_one_after_another(client):
    first = client.call(lambda c: c.responses.create(**{**ASK, "input": "My name is Ada."}))
    second = client.call(lambda c: c.responses.create(**{**ASK, "input": "What is my name?"}, previous_response_id=first.id))
    assert second.previous_response_id == first.id and second.usage.input_tokens > first.usage.input_tokens + 10
    client.call(lambda c: c.responses.delete(first.id))
    for ask in [lambda c: c.responses.retrieve(first.id), lambda c: c.responses.create(**ASK, previous_response_id=first.id)]:
        with pytest.raises(openai.NotFoundError):
            client.call(ask)
    unkept = client.call(lambda c: c.responses.create(**ASK, store=False))
    with pytest.raises(openai.NotFoundError):
        client.call(lambda c: c.responses.retrieve(unkept.id))


def test_a_form_and_tools(client):
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
    text = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    made = client.call(lambda c: c.responses.create(**{**ASK, "max_output_tokens": 48}, text=text))
    assert isinstance(json.loads(made.output_text)["ok"], bool)
    tool = {"type": "function", "name": "check", "parameters": schema, "strict": True}
    ask = {**ASK, "max_output_tokens": 96, "tools": [tool], "tool_choice": {"type": "function", "name": "check"}}
    called = client.call(lambda c: c.responses.create(**ask))
    (call,) = called.output
    assert call.type == "function_call" and isinstance(json.loads(call.arguments)["ok"], bool)
    events = client.stream(lambda c: c.responses.create(**ask, stream=True))
    pieces = "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta")
    assert pieces == call.arguments
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    after = client.call(lambda c: c.responses.create(**{**ASK, "input": [output]}, previous_response_id=called.id))
    assert after.output_text


def test_in_the_background(client):
    queued = client.call(lambda c: c.responses.create(**ASK, background=True))
    assert queued.status == "queued"
    until = time.monotonic() + 60
    while (now := client.call(lambda c: c.responses.retrieve(queued.id))).status in ("queued", "in_progress"):
        assert time.monotonic() < until
        time.sleep(0.05)
    direct = client.call(lambda c: c.responses.create(**ASK))
    assert (now.status, now.output_text) == (direct.status, direct.output_text)
    events = client.stream(lambda c: c.responses.retrieve(queued.id, stream=True, starting_after=3))
    assert [e.sequence_number for e in events] == list(range(4, 4 + len(events)))
    assert events[-1].response.output_text == direct.output_text
    long = {**ASK, "input": "Tell a long story.", "max_output_tokens": 1500}
    going = client.call(lambda c: c.responses.create(**long, background=True))
    assert client.call(lambda c: c.responses.cancel(going.id)).status == "cancelled"
    assert client.call(lambda c: c.responses.retrieve(going.id)).status == "cancelled"


def test_it_goes_on_after_kill_9(client, cluster):
    ask = {**ASK, "input": "Tell a story of a lighthouse.", "max_output_tokens": 120}
    truth = client.call(lambda c: c.responses.create(**ask))

    seen = []
    if client.loop is None:
        for event in client.client.responses.create(**ask, stream=True, background=True):
            seen.append(event)
            if len(seen) == 12:
                break
    else:
        async def begin():
            async for event in await client.client.responses.create(**ask, stream=True, background=True):
                seen.append(event)
                if len(seen) == 12:
                    break
        client.loop.run_until_complete(begin())
    cluster.kill()
    cluster.start()
    ident, last = seen[0].response.id, seen[-1].sequence_number
    rest = client.stream(lambda c: c.responses.retrieve(ident, stream=True, starting_after=last))
    assert [e.sequence_number for e in seen + rest] == list(range(len(seen) + len(rest)))
    text = "".join(e.delta for e in seen + rest if e.type == "response.output_text.delta")
    assert text == truth.output_text == rest[-1].response.output_text
