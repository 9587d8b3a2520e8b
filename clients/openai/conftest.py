"""A cluster of two stages for all tests, and clients of the openai package, sync and async."""

import asyncio
import inspect
import os
import pathlib
import signal
import socket
import subprocess
import tempfile
import time
import tomllib
import urllib.error
import urllib.request

import openai
import pytest

MODEL = os.environ.get("MILLRACE_TEST_MODEL") or "smollm2:135m"
NAME = "tested"
# A debug build on a busy machine.
PATIENCE = 120.0


class Cluster:
    """`millrace up --stages 2` in a folder of its own; can be killed and started again."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder, self.process = folder, None
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        log = (self.folder / "log").open("a")
        self.process = subprocess.Popen(
            [os.environ["MILLRACE_BIN"], "up", "--model", MODEL, "--served-model-name", NAME, "--stages", "2",
             "--port", str(self.port), "--quic", "127.0.0.1:0", "--dir", str(self.folder / "cluster"), "--max-model-len", "2048"],
            stdout=log, stderr=log)
        until = time.monotonic() + PATIENCE
        while not self.is_ready():
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError("the cluster does not start:\n" + (self.folder / "log").read_text())
            time.sleep(0.1)

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(self.url + "/ready", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def kill(self) -> None:
        """kill -9: nothing is said, nothing is written any more."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()

    @property
    def key(self) -> str:
        return tomllib.loads((self.folder / "cluster" / "client.toml").read_text())["api_key"]


@pytest.fixture(scope="session")
def cluster():
    with tempfile.TemporaryDirectory(prefix="millrace-openai-") as folder:
        cluster = Cluster(pathlib.Path(folder))
        cluster.start()
        yield cluster
        cluster.stop()


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
