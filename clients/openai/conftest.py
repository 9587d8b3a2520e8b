"""Clients of the openai package, sync and async."""

import asyncio
import inspect

import openai
import pytest

from cluster import PATIENCE


class Client:
    """One of the package's two clients; `call` and `stream` hide which."""

    def __init__(self, client, loop) -> None:
        self.client, self.loop = client, loop

    def call(self, ask):
        made = ask(self.client)
        return self.loop.run_until_complete(made) if inspect.isawaitable(made) else made

    def stream(self, ask) -> list:
        if self.loop is None:
            with ask(self.client) as events:
                return list(events)

        async def collect() -> list:
            async with await ask(self.client) as events:
                return [event async for event in events]

        return self.loop.run_until_complete(collect())


@pytest.fixture(params=["sync", "async"])
def client(request, cluster):
    options = {"base_url": cluster.url + "/v1", "api_key": cluster.key, "timeout": PATIENCE, "max_retries": 2}
    if request.param == "sync":
        with openai.OpenAI(**options) as made:
            yield Client(made, None)
        return
    loop = asyncio.new_event_loop()
    made = openai.AsyncOpenAI(**options)
    yield Client(made, loop)
    loop.run_until_complete(made.close())
    loop.close()
