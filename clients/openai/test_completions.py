"""/v1/completions."""

from cluster import NAME

ASK = {"model": NAME, "prompt": "Once upon a time", "temperature": 0, "max_tokens": 8}


def test_whole_and_streamed(client):
    whole = client.call(lambda c: c.completions.create(**ASK))
    assert whole.choices[0].text and whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 8
    chunks = client.stream(lambda c: c.completions.create(**ASK, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text
    best = client.call(lambda c: c.completions.create(**{**ASK, "temperature": 1.0}, n=1, best_of=3, seed=3))
    assert len(best.choices) == 1 and best.usage.completion_tokens > 8


def test_logprobs(client):
    found = client.call(lambda c: c.completions.create(**ASK, logprobs=2)).choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == 8


def test_several_prompts_and_echo(client):
    one = [client.call(lambda c: c.completions.create(**{**ASK, "prompt": p})) for p in ("Once upon a time", "The sea")]
    both = client.call(lambda c: c.completions.create(**{**ASK, "prompt": ["Once upon a time", "The sea"]}))
    assert [c.index for c in both.choices] == [0, 1]
    assert [c.text for c in both.choices] == [o.choices[0].text for o in one]
    assert both.usage.prompt_tokens == sum(o.usage.prompt_tokens for o in one)
    said = client.call(lambda c: c.completions.create(**ASK, echo=True))
    assert said.choices[0].text == ASK["prompt"] + one[0].choices[0].text
    chunks = client.stream(lambda c: c.completions.create(**{**ASK, "prompt": [[1, 2, 3], [4, 5]]}, stream=True))
    assert {c.choices[0].index for c in chunks} == {0, 1}


def test_a_prompt_is_scored(client):
    scored = {**ASK, "echo": True, "logprobs": 2}
    whole = client.call(lambda c: c.completions.create(**scored)).choices[0]
    of = whole.logprobs
    assert of.token_logprobs[0] is None and of.top_logprobs[0] is None and all(p <= 0 for p in of.token_logprobs[1:])
    assert "".join(of.tokens) == whole.text and of.text_offset[-1] + len(of.tokens[-1]) == len(whole.text)
    alone = client.call(lambda c: c.completions.create(**{**scored, "max_tokens": 0}))
    told = alone.choices[0].logprobs
    assert alone.choices[0].text == ASK["prompt"] and alone.usage.completion_tokens == 0
    assert told.token_logprobs == of.token_logprobs[: len(told.tokens)] and len(told.tokens) == len(of.tokens) - 8
    chunks = client.stream(lambda c: c.completions.create(**scored, stream=True))
    parts = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
    assert [p for part in parts for p in part.token_logprobs] == of.token_logprobs
