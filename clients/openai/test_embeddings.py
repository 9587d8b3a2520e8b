"""/v1/embeddings."""

import math
from array import array

import openai
import pytest

from cluster import NAME

TEXTS = ["The cat sleeps on the sofa.", "A cat is sleeping on a couch.", "Shares of the firm dropped a lot today."]


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b))


def test_the_packages_own_encoding_is_the_plain_one(client):
    # Without encoding_format the package asks for base64.
    coded = client.call(lambda c: c.embeddings.create(model=NAME, input=TEXTS))
    plain = client.call(lambda c: c.embeddings.create(model=NAME, input=TEXTS, encoding_format="float"))
    assert [d.index for d in coded.data] == [0, 1, 2] and coded.model == NAME
    # The same 32-bit floats, every bit of them.
    assert [array("f", d.embedding) for d in coded.data] == [array("f", d.embedding) for d in plain.data]
    assert coded.usage.prompt_tokens == coded.usage.total_tokens == plain.usage.prompt_tokens > 15
    first, same, other = (d.embedding for d in coded.data)
    assert dot(first, first) == pytest.approx(1, abs=1e-5)
    assert dot(first, same) > dot(first, other)


def test_inputs_one_by_one_and_together(client):
    together = client.call(lambda c: c.embeddings.create(model=NAME, input=TEXTS))
    for text, found in zip(TEXTS, together.data):
        alone = client.call(lambda c: c.embeddings.create(model=NAME, input=text))
        assert alone.data[0].embedding == found.embedding
    ids = client.call(lambda c: c.embeddings.create(model=NAME, input=[[5, 6, 7], [8]]))
    one = client.call(lambda c: c.embeddings.create(model=NAME, input=[5, 6, 7]))
    assert (len(ids.data), ids.usage.prompt_tokens) == (2, 4)
    assert ids.data[0].embedding == one.data[0].embedding


def test_dimensions_and_pooling(client):
    whole = client.call(lambda c: c.embeddings.create(model=NAME, input=TEXTS[0]))
    short = client.call(lambda c: c.embeddings.create(model=NAME, input=TEXTS[0], dimensions=32))
    cut = whole.data[0].embedding[:32]
    length = math.sqrt(dot(cut, cut))
    assert short.data[0].embedding == [pytest.approx(x / length, abs=1e-6) for x in cut]
    last = client.call(lambda c: c.embeddings.create(model=NAME, input=TEXTS[0], extra_body={"pooling": "last"}))
    assert last.data[0].embedding != whole.data[0].embedding


def test_what_is_wrong_is_named(client):
    for wrong, param in [({"input": []}, "input"), ({"input": "a", "dimensions": 100_000}, "dimensions")]:
        with pytest.raises(openai.BadRequestError) as refused:
            client.call(lambda c: c.embeddings.create(model=NAME, **wrong))
        assert refused.value.param == param
