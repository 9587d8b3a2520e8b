#!/usr/bin/env python3
"""A client of Millrace's QUIC API in one file: connects, generates, streams.

    pip install aioquic
    python3 millrace_client.py --cluster ~/.local/share/millrace/client.toml "Why is the sky blue?"

The protocol is docs/PROTOCOL.md. Messages are bincode ("standard" configuration); the functions below
write and read exactly what this client needs. Without aioquic, `--self-test golden.json` compares them
with the bytes that the Rust programs make.
"""

import argparse
import asyncio
import contextlib
import json
import pathlib
import struct
import sys
import uuid
from dataclasses import dataclass, field
from typing import AsyncIterator, Optional, Union

ALPN = "millrace-client/11"
# Name in the coordinator's certificate, where that is of the cluster's own CA.
SERVER_NAME = "coordinator.millrace.internal"
MAX_REPLY_BYTES = 16 << 20
# What the server says at most this many seconds apart; it sends tokens or an end.
SILENCE = 120.0

# ErrorCode, by its place on the wire; with gRPC's number.
CODES = [
    ("CANCELLED", 1), ("INVALID_ARGUMENT", 3), ("DEADLINE_EXCEEDED", 4), ("NOT_FOUND", 5),
    ("PERMISSION_DENIED", 7), ("RESOURCE_EXHAUSTED", 8), ("FAILED_PRECONDITION", 9),
    ("UNIMPLEMENTED", 12), ("INTERNAL", 13), ("UNAVAILABLE", 14), ("UNAUTHENTICATED", 16),
]
REASONS = ["stop", "length", "cancelled", "tool_calls", "content_filter"]
TOOL_CHOICES = ["auto", "none", "required"]
POOLINGS = ["mean", "last"]


# ---- bincode

class Writer:
    """Appends values in bincode's standard configuration."""

    def __init__(self) -> None:
        self.out = bytearray()

    def uint(self, n: int) -> None:
        """u16, u32, u64, lengths and numbers of variants: 1, 3, 5 or 9 bytes."""
        if n < 251:
            self.out.append(n)
        elif n < 1 << 16:
            self.out += b"\xfb" + struct.pack("<H", n)
        elif n < 1 << 32:
            self.out += b"\xfc" + struct.pack("<I", n)
        else:
            self.out += b"\xfd" + struct.pack("<Q", n)

    def byte(self, n: int) -> None:
        self.out.append(n)

    def f32(self, x: float) -> None:
        self.out += struct.pack("<f", x)

    def text(self, s: str) -> None:
        data = s.encode()
        self.uint(len(data))
        self.out += data

    def option(self, value, write) -> None:
        self.byte(value is not None)
        if value is not None:
            write(value)

    def list(self, values, write) -> None:
        self.uint(len(values))
        for value in values:
            write(value)


class Reader:
    """Reads what a Writer writes; raises ValueError where bytes are missing or left over."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, n: int) -> bytes:
        if self.at + n > len(self.data):
            raise ValueError("the message ends too early")
        self.at += n
        return self.data[self.at - n:self.at]

    def end(self) -> None:
        if self.at != len(self.data):
            raise ValueError(f"{len(self.data) - self.at} bytes left over")

    def byte(self) -> int:
        return self.take(1)[0]

    def uint(self) -> int:
        first = self.byte()
        wide = {251: "<H", 252: "<I", 253: "<Q"}.get(first)
        if wide:
            return struct.unpack(wide, self.take(struct.calcsize(wide)))[0]
        if first > 253:
            raise ValueError("a number is too long")
        return first

    def f32(self) -> float:
        return struct.unpack("<f", self.take(4))[0]

    def f64(self) -> float:
        return struct.unpack("<d", self.take(8))[0]

    def text(self) -> str:
        return self.take(self.uint()).decode()

    def option(self, read):
        return read() if self.byte() else None

    def list(self, read) -> list:
        return [read() for _ in range(self.uint())]


# ---- messages

@dataclass
class Params:
    """SamplingParams: how to choose tokens and when to stop."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: list = field(default_factory=list)  # of (token id, bias)
    seed: Optional[int] = None
    max_tokens: Optional[int] = None
    stop: list = field(default_factory=list)
    stop_token_ids: list = field(default_factory=list)
    ignore_eos: bool = False
    logprobs: Optional[int] = None
    grammar: Optional[tuple] = None  # ("json_object",), or ("json_schema" | "regex" | "lark", source)

    def write(self, w: Writer) -> None:
        w.f32(self.temperature)
        w.uint(self.top_k)
        for x in (self.top_p, self.min_p, self.repetition_penalty, self.presence_penalty, self.frequency_penalty):
            w.f32(x)
        w.list(self.logit_bias, lambda pair: (w.uint(pair[0]), w.f32(pair[1])))
        w.option(self.seed, w.uint)
        w.option(self.max_tokens, w.uint)
        w.list(self.stop, w.text)
        w.list(self.stop_token_ids, w.uint)
        w.byte(self.ignore_eos)
        w.option(self.logprobs, w.byte)
        w.option(self.grammar, lambda grammar: write_grammar(w, *grammar))


def write_grammar(w: Writer, kind: str, source: str = "") -> None:
    number = ("json_object", "json_schema", "regex", "lark").index(kind)
    w.uint(number)
    if number:
        w.text(source)


@dataclass
class CallPiece:
    """What became known of a tool call: `id` and `name` come with its first piece, then arguments."""

    call: int
    id: str
    name: str
    arguments: str


@dataclass
class Started:
    request_id: uuid.UUID
    prompt_token_ids: list
    seed: int
    choices: int
    left_out: int  # tokens of a prompt that was too long


@dataclass
class Token:
    choice: int
    index: int
    token_id: int
    text: str
    logprob: Optional[float]
    top: list  # of (token id, log-probability)
    calls: list = field(default_factory=list)  # of CallPiece


@dataclass
class Finished:
    choice: int
    reason: str
    text: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    discarded_tokens: int
    queue_ms: float
    ttft_ms: float
    decode_ms: float
    calls: list = field(default_factory=list)  # of CallPiece


@dataclass
class Embedded:
    """The vector of a text, and how many tokens the text has."""
    prompt_tokens: int
    vector: list  # of float


class Failed(Exception):
    """The call failed; `code` is gRPC's name of what kind of failure it is."""

    def __init__(self, code: str, message: str, param: Optional[str] = None, retry_after_ms: Optional[int] = None):
        super().__init__(f"{code}: {message}")
        self.code, self.message, self.param, self.retry_after_ms = code, message, param, retry_after_ms


DONE = object()
Event = Union[Started, Token, Finished]


def frame(body: bytes) -> bytes:
    """A message behind its length."""
    return struct.pack("<I", len(body)) + body


def call_header(api_key: str, deadline_ms: Optional[int] = None, metadata: tuple = ()) -> bytes:
    """CallHeader: who asks, and until when."""
    w = Writer()
    pairs = [("authorization", f"Bearer {api_key}"), *metadata]
    w.list(pairs, lambda pair: (w.text(pair[0]), w.text(pair[1])))
    w.option(deadline_ms, w.uint)
    return bytes(w.out)


def write_message(w: Writer, message: dict) -> None:
    w.text(message["role"])
    w.text(message.get("content") or "")
    calls = [(c["id"], c["function"]) for c in message.get("tool_calls", [])]
    w.list(calls, lambda c: (w.text(c[0]), w.text(c[1]["name"]), w.text(c[1]["arguments"])))
    w.option(message.get("tool_call_id"), w.text)


def generate(
    prompt, params: Params, model: str = "", n: int = 1, best_of: Optional[int] = None,
    tools: tuple = (), tool_choice: str = "auto", single_call: bool = False,
) -> bytes:
    """Method::Generate. `prompt`: a text, a list of token ids, or a list of messages as of OpenAI's API.
    `tools`: functions, each {"name", "description", "parameters"}; `tool_choice`: auto, none, required,
    or the name of one."""
    w = Writer()
    w.uint(0)
    w.text(model)
    if isinstance(prompt, str):
        w.uint(0)
        w.text(prompt)
    elif prompt and isinstance(prompt[0], dict):
        w.uint(2)
        w.list(prompt, lambda message: write_message(w, message))
        w.list(tools, lambda tool: w.text(json.dumps(tool)))
        named = tool_choice not in TOOL_CHOICES
        w.uint(len(TOOL_CHOICES) if named else TOOL_CHOICES.index(tool_choice))
        if named:
            w.text(tool_choice)
        w.byte(single_call)
    else:
        w.uint(1)
        w.list(prompt, w.uint)
    params.write(w)
    w.uint(n)
    w.uint(n if best_of is None else best_of)
    return bytes(w.out)


def embed(inputs, model: str = "", pooling: str = "mean", dimensions: Optional[int] = None) -> bytes:
    """Method::Embed; each of `inputs` is a text or a list of token ids."""
    w = Writer()
    w.uint(9)
    w.text(model)

    def one(given) -> None:
        w.uint(0 if isinstance(given, str) else 1)
        w.text(given) if isinstance(given, str) else w.list(given, w.uint)

    w.list(inputs, one)
    w.uint(POOLINGS.index(pooling))
    w.option(dimensions, w.uint)
    return bytes(w.out)


def reply(body: bytes):
    """A Reply: an Event of a generation, a list of embeddings, DONE, or Failed is raised."""
    r = Reader(body)
    kind = r.uint()
    if kind == 0:
        made = _event(r)
    elif kind == 7:
        made = DONE
    elif kind == 9:
        made = r.list(lambda: Embedded(r.uint(), r.list(r.f32)))
    elif kind == 8:
        code = CODES[r.uint()][0]
        made = Failed(code, r.text(), r.option(r.text), r.option(r.uint))
    else:
        raise ValueError(f"a reply of kind {kind} is not one that this client asks for")
    r.end()
    if isinstance(made, Failed):
        raise made
    return made


def _piece(r: Reader) -> CallPiece:
    return CallPiece(r.uint(), r.text(), r.text(), r.text())


def _event(r: Reader) -> Event:
    kind = r.uint()
    if kind == 0:
        # A UUID is its sixteen bytes behind their number.
        return Started(uuid.UUID(bytes=r.take(r.uint())), r.list(r.uint), r.uint(), r.uint(), r.uint())
    if kind == 1:
        choice, index, token_id, text = r.uint(), r.uint(), r.uint(), r.text()
        pair = lambda: (r.uint(), r.f32())
        logprobs = r.option(lambda: (r.f32(), r.list(pair)))
        return Token(choice, index, token_id, text, *(logprobs or (None, [])), r.list(lambda: _piece(r)))
    if kind == 2:
        choice, reason, text, calls = r.uint(), REASONS[r.uint()], r.text(), r.list(lambda: _piece(r))
        return Finished(choice, reason, text, *(r.uint() for _ in range(4)), *(r.f64() for _ in range(3)), calls)
    raise ValueError(f"there is no event of kind {kind}")


# ---- QUIC

class Client:
    """A connection to a cluster; `async with Client.open(...)`. Each call is a stream of its own."""

    def __init__(self, connection, api_key: str) -> None:
        self.connection, self.api_key = connection, api_key

    @staticmethod
    def open(quic: str, api_key: str, ca_pem: str = "", server_name: Optional[str] = None):
        """Where, with which key, whom to trust: as `client.toml` says."""
        return _Opening(quic, api_key, ca_pem, server_name)

    async def generate(self, prompt, params: Optional[Params] = None, deadline_ms: Optional[int] = None, **choices) -> AsyncIterator[Event]:
        """Events as they come. Leaving the loop cancels the request."""
        async with contextlib.aclosing(self._call(generate(prompt, params or Params(), **choices), deadline_ms)) as replies:
            async for event in replies:
                yield event

    async def embed(self, inputs, deadline_ms: Optional[int] = None, **how) -> list[Embedded]:
        """A vector of each text, in order."""
        async with contextlib.aclosing(self._call(embed(inputs, **how), deadline_ms)) as replies:
            return [one async for some in replies for one in some]

    async def _call(self, body: bytes, deadline_ms: Optional[int]):
        """Replies as they come."""
        reader, writer = await self.connection.create_stream()
        ended = False
        try:
            writer.write(frame(call_header(self.api_key, deadline_ms)) + frame(body))
            writer.write_eof()
            while True:
                head = await asyncio.wait_for(reader.readexactly(4), SILENCE)
                (length,) = struct.unpack("<I", head)
                if length > MAX_REPLY_BYTES:
                    raise ValueError(f"a reply of {length} bytes is too long")
                found = reply(await asyncio.wait_for(reader.readexactly(length), SILENCE))
                if found is DONE:
                    ended = True
                    return
                yield found
        except asyncio.IncompleteReadError:
            raise Failed("UNAVAILABLE", "the answer was cut off") from None
        except Failed:
            ended = True
            raise
        finally:
            if not ended:
                # Says that nobody listens: the server stops computing.
                self.connection._quic.stop_stream(writer.get_extra_info("stream_id"), 0)
                self.connection.transmit()


class _Opening:
    def __init__(self, quic: str, api_key: str, ca_pem: str, server_name: Optional[str]) -> None:
        self.quic, self.api_key, self.ca_pem, self.server_name = quic, api_key, ca_pem, server_name

    async def __aenter__(self) -> Client:
        from aioquic.asyncio import connect
        from aioquic.quic.configuration import QuicConfiguration

        host, _, port = self.quic.rpartition(":")
        host = host.strip("[]")
        own = SERVER_NAME if self.ca_pem else host
        settings = QuicConfiguration(is_client=True, alpn_protocols=[ALPN], server_name=self.server_name or own)
        settings.idle_timeout = SILENCE
        if self.ca_pem:
            settings.load_verify_locations(cadata=self.ca_pem.encode())
        self.context = connect(host, int(port), configuration=settings)
        return Client(await self.context.__aenter__(), self.api_key)

    async def __aexit__(self, *why) -> None:
        await self.context.__aexit__(*why)


# ---- the program

def self_test(path: str) -> None:
    """Compares this file's bytes with those of the Rust programs."""
    golden = json.loads(pathlib.Path(path).read_text())
    asked = {m["name"]: bytes.fromhex(m["hex"]) for m in golden}
    params = Params(
        temperature=0.5, top_k=40, logit_bias=[(300, -1.5)], seed=1 << 40, max_tokens=70_000,
        stop=["\n", "né"], stop_token_ids=[2], ignore_eos=True, logprobs=5,
    )
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    called = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "content": "4", "tool_call_id": "c1"},
    ]
    made = {
        "header": call_header("key", 2500, (("millrace-priority", "high"),)),
        "generate text": generate("Once upon", Params()),
        "generate tokens": generate([1, 250, 251, 65_535, 65_536], params, "m", 2, 3),
        "generate chat": generate(chat, params),
        "generate tools": generate(called, Params(), tools=({"name": "f"},), tool_choice="f", single_call=True),
        "generate regex": generate("x", Params(grammar=("regex", "a+"))),
        "embed": embed(["né", [1, 300]], "m", "last", 256),
    }
    for name, body in made.items():
        assert body == asked[name], f"{name}: {body.hex()} is not {asked[name].hex()}"
    ident = uuid.UUID("0193a5b0-0000-7000-8000-000000000001")
    heard = {
        "started": Started(ident, [1, 2, 300], 1 << 33, 2, 5),
        "token": Token(1, 7, 42, " né", -0.5, [(42, -0.5), (43, -1.25)]),
        "token without": Token(0, 8, 0, "", None, []),
        "token with a call": Token(0, 9, 1, "", None, [], [CallPiece(1, "c1", "f", "{")]),
        "finished with a call": Finished(0, "tool_calls", "", 0, 0, 0, 0, 0.0, 0.0, 0.0, [CallPiece(1, "", "", "}")]),
        "finished": Finished(0, "length", "end", 3, 260, 1, 0, 0.5, 12.25, 1e3),
        "embeddings": [Embedded(3, [0.75, -0.5]), Embedded(300, [])],
        "done": DONE,
    }
    for name, event in heard.items():
        assert reply(asked[name]) == event, f"{name}: {reply(asked[name])} is not {event}"
    try:
        reply(asked["failed"])
    except Failed as e:
        assert (e.code, e.message, e.param, e.retry_after_ms) == ("RESOURCE_EXHAUSTED", "full", "n", 1000), e
    else:
        raise AssertionError("a failure was not raised")
    for broken in (b"", asked["token"][:-1], asked["token"] + b"\0"):
        try:
            reply(broken)
        except ValueError:
            continue
        raise AssertionError(f"{broken.hex()} was taken for a reply")
    names = set(made) | set(heard) | {"failed"}
    assert names == set(asked), f"not compared: {set(asked) ^ names}"
    print(f"{len(asked)} messages agree")


async def ask(args: argparse.Namespace) -> None:
    import tomllib

    config = tomllib.loads(pathlib.Path(args.cluster).expanduser().read_text())
    params = Params(temperature=args.temperature, max_tokens=args.max_tokens, seed=args.seed)
    prompt = args.prompt if args.plain else [{"role": "user", "content": args.prompt}]
    opening = Client.open(config["quic"], config["api_key"], config["ca_pem"], config.get("server_name"))
    async with opening as client:
        async for event in client.generate(prompt, params):
            if isinstance(event, Token):
                print(event.text, end="", flush=True)
            elif isinstance(event, Finished):
                print(event.text)
                print(f"[{event.completion_tokens} tokens, {event.reason}, first after {event.ttft_ms:.0f} ms]", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a Millrace cluster over QUIC.")
    parser.add_argument("prompt", nargs="?", default="Why is the sky blue?")
    parser.add_argument("--cluster", metavar="FILE", default="~/.local/share/millrace/client.toml", help="client.toml of the cluster")
    parser.add_argument("--plain", action="store_true", help="go on with the text, without a chat template")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--self-test", metavar="FILE", help="compare encodings with golden.json, and end")
    args = parser.parse_args()
    if args.self_test:
        self_test(args.self_test)
        return
    try:
        asyncio.run(ask(args))
    except Failed as e:
        sys.exit(f"error: {e}")
    except (OSError, ConnectionError) as e:
        sys.exit(f"error: the cluster does not answer: {e}")


if __name__ == "__main__":
    main()
