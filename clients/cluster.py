"""A cluster in a process of its own, for the tests of every folder here."""

import os
import pathlib
import signal
import socket
import subprocess
import time
import tomllib
import urllib.error
import urllib.request

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

    def new_key(self, scope: str) -> str:
        """Another API key."""
        asked = [os.environ["MILLRACE_BIN"], "keys", "--cluster", str(self.folder / "cluster" / "client.toml"),
                 "create", "--name", scope, "--scope", scope]
        return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()

    @property
    def key(self) -> str:
        return tomllib.loads((self.folder / "cluster" / "client.toml").read_text())["api_key"]
