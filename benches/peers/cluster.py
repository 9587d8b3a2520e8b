#!/usr/bin/env python3
"""A pipeline of two stages, each a process of its own on one core, under load; beside it one stage on
one core, and llama.cpp: its RPC mode on two one-core servers, and one process with two threads.

    cluster.py --model MODEL.gguf --bin DIR [--llama DIR] [--q4-0 FILE] [--mixed] [--json OUT.json]

--bin: where millrace, millrace-node and millrace-coordinator are. Everything runs in turn on this
machine, so only ratios count. Prints what a pipeline gains and where the time goes:

  stage_busy   CPU time of the engines inside their steps over the time of their cores; corrected: the
               time that coordinator, nodes and clients took beside it does not count as the stages'
  scaling      tokens/s of two stages at 32 streams over twice that of one stage at 16

With --mixed also what long prompts cost chats, what a shared prefix saves, what drafts bring.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

PATIENCE = 120
PROMPT, ANSWER, LONG, SHORT, STREAMS = 128, 64, 512, 4, 16


def wait(what, look):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        found = look()
        if found:
            return found
        time.sleep(0.05)
    raise RuntimeError(f"no {what} within {PATIENCE} s")


@contextlib.contextmanager
def process(command, log, core=None, env=None):
    if core is not None:
        command = ["taskset", "-c", str(core), *command]
    with open(log, "wb") as out:
        child = subprocess.Popen(list(map(str, command)), stdout=out, stderr=out, env=env)
        try:
            yield child
        finally:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


@contextlib.contextmanager
def cluster(args, stages, extra=()):
    """A cluster of `stages` node processes, node i on core i: its `client.toml`, and an environment
    without this user's own settings."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        root = pathlib.Path(folder)
        env = {k: v for k, v in os.environ.items() if not k.startswith("MILLRACE_")}
        env["MILLRACE_CACHE"] = str(args.cache or root / "cache")
        log = root / "coordinator.log"
        serve = [
            args.bin / "millrace-coordinator", "serve", "--dir", root / "c", "--model", args.model,
            "--stages", stages, "--port", 0, "--quic", "127.0.0.1:0", "--cluster", "127.0.0.1:0",
            "--max-model-len", 2048, "--kv-cache-tokens", 32768, *extra,
        ]  # fmt: skip
        stack.enter_context(process(serve, log, env=env))
        find = lambda pattern: lambda: re.search(pattern, log.read_text(errors="replace"))
        token = wait("join token", find(r"--token (\S+)")).group(1)
        http = wait("address", find(r"HTTP\s+(\S+)")).group(1)
        for i in range(stages):
            node = [
                args.bin / "millrace-node", "run", "--dir", root / f"n{i}", "--name", f"node-{i}",
                "--threads", 1, "--listen", "127.0.0.1:0", "--token", token, "--weights", args.model,
            ]  # fmt: skip
            stack.enter_context(process(node, root / f"n{i}.log", core=i, env=env))

        def healthy():
            try:
                return urllib.request.urlopen(f"{http}/health", timeout=2).status == 200
            except (urllib.error.URLError, OSError):
                return False

        try:
            wait("pipeline", healthy)
        except RuntimeError:
            sys.stderr.write(log.read_text(errors="replace")[-3000:])
            raise
        yield root / "c" / "client.toml", env


def bench(args, running, *flags):
    """What `bench serve` reports of a running cluster."""
    client, env = running
    command = [args.bin / "millrace", "bench", "serve", "--cluster", client, *flags, "-o", "json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout)


def levels(args, running, streams, prompt=PROMPT, answer=ANSWER):
    """Closed loops of so many clients each, by their number."""
    report = bench(
        args, running, "--concurrency", ",".join(map(str, streams)), "--prompt-tokens", prompt,
        "--max-tokens", answer, "--requests", args.requests,
    )  # fmt: skip
    return {r["concurrency"]: r for r in report["results"]}


def batched(args, streams, *, model, threads, prompt=PROMPT, answer=ANSWER, rpc=None, ubatch=None):
    """llama.cpp's tokens/s with so many streams: of answers, of prompts, of both."""
    command = [
        args.llama / "llama-batched-bench", "-m", model, "-c", (prompt + answer + 64) * streams,
        "-npp", prompt, "-ntg", answer, "-npl", streams, "-t", threads, "-tb", threads,
        "--output-format", "jsonl",
    ]  # fmt: skip
    if ubatch:
        command += ["-ub", ubatch]
    if rpc:
        command += ["--rpc", rpc, "-ngl", 99]
    env = {**os.environ, "LD_LIBRARY_PATH": str(args.llama)}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if not rows:
        raise RuntimeError(f"llama-batched-bench printed no result:\n{done.stderr[-1500:]}")
    last = rows[-1]
    return {"decode": last["speed_tg"], "prefill": last["speed_pp"], "all": last["speed"]}


RPC, ONE = "RPC, two one-core servers", "one process, two threads, best file"


def peers(args):
    """16 streams: prompts and answers, answers alone, and prompts of LONG tokens, where one token
    each follows."""
    found, answers, long = {}, {}, {}
    alone = {"prompt": SHORT, "answer": PROMPT + ANSWER}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        env = {**os.environ, "LD_LIBRARY_PATH": str(args.llama)}
        ports = [50152, 50153]
        for core, port in enumerate(ports):
            server = [args.llama / "ggml-rpc-server", "-H", "127.0.0.1", "-p", port, "-t", 1]
            log = pathlib.Path(folder) / f"rpc{core}.log"
            stack.enter_context(process(server, log, core=core, env=env))
        time.sleep(1)
        rpc = ",".join(f"127.0.0.1:{p}" for p in ports)
        found[RPC] = batched(args, STREAMS, model=args.model, threads=1, rpc=rpc)
        answers[RPC] = batched(args, STREAMS, model=args.model, threads=1, rpc=rpc, **alone)
        for ubatch in (128, 512):
            long[f"{RPC}, -ub {ubatch}"] = batched(
                args, STREAMS, model=args.model, threads=1, rpc=rpc, ubatch=ubatch, prompt=LONG,
                answer=1,
            )  # fmt: skip
    best = args.q4_0 or args.model
    found[ONE] = batched(args, STREAMS, model=best, threads=2)
    answers[ONE] = batched(args, STREAMS, model=best, threads=2, **alone)
    long[ONE] = batched(args, STREAMS, model=best, threads=2, prompt=LONG, answer=1)
    return found, answers, long


def everything(result):
    """Tokens of prompts and answers per second: what a peer's whole run is compared with. Clients
    come and go, so prompts and answers mix; a peer that does one after the other has no such figure
    for answers alone."""
    return result["decode_tokens_per_s"] * (PROMPT + ANSWER) / ANSWER


def ours(args):
    """One stage on one core; two stages with prompts and answers mixed, with answers alone (a few
    tokens of prompt, so that decoding is all there is), with long prompts alone."""
    with cluster(args, 1, ["--micro-batches", "1"]) as running:
        one = levels(args, running, [STREAMS])
    with cluster(args, 2) as running:
        two = levels(args, running, [1, STREAMS, 2 * STREAMS])
        answers = bench(
            args, running, "--concurrency", STREAMS, "--prompt-tokens", SHORT, "--max-tokens",
            PROMPT + ANSWER, "--requests", 2,
        )["results"][0]  # fmt: skip
        # Answers of one token end with their prompt: a round of prompts and nothing else.
        prompts = bench(
            args, running, "--concurrency", STREAMS, "--prompt-tokens", LONG, "--max-tokens", 1,
            "--requests", 2,
        )["results"][0]  # fmt: skip
    return one, two, answers, prompts


def mixed(args):
    """Long prompts among chats, requests with one beginning, and prompts that repeat themselves with
    drafts and without."""
    found = {}
    with cluster(args, 2) as running:
        found["mixed"] = bench(
            args, running, "--concurrency", 8, "--mixed", 2, "--prompt-tokens", 64, "--max-tokens",
            160, "--requests", args.requests,
        )  # fmt: skip
        shared = ["--shared-prefix", 1000, "--suffix", 16, "--requests", 64, "--max-tokens", 16]
        found["shared prefix"] = bench(args, running, *shared)
    for name, speculate in (("drafts", "auto"), ("no drafts", "off")):
        with cluster(args, 2, ["--speculate", speculate]) as running:
            found[name] = bench(
                args, running, "--concurrency", "1,16", "--repeat-after", 12, "--requests",
                args.requests,
            )  # fmt: skip
    return found


def table(report):
    row = "| {:<40} | {:>8} | {:>8} | {:>8} | {:>14} | {:>6} | {:>9} |"
    print(row.format("", "streams", "all tok/s", "decode", "busy by stage", "busy", "corrected"))
    print("|---|---:|---:|---:|---:|---:|---:|")
    names = (("one stage, one core", "one stage"), ("two stages, a core each", "two stages"))
    for name, key in names:
        for streams, r in report[key].items():
            stages = " ".join(f"{s['busy_share'] or 0:.2f}" for s in r["stages"])
            print(row.format(
                name, streams, f"{everything(r):.1f}", f"{r['decode_tokens_per_s']:.1f}", stages,
                f"{r['stage_busy'] or 0:.2f}", f"{r['stage_busy_corrected'] or 0:.2f}",
            ))  # fmt: skip
    for name, r in report.get("llama.cpp", {}).items():
        shown = (f"{r['all']:.1f}", f"{r['decode']:.1f}")
        print(row.format(f"llama.cpp, {name}", STREAMS, *shown, "", "", ""))
    one, two = report["one stage"], report["two stages"]
    scaling = two[2 * STREAMS]["decode_tokens_per_s"] / (2 * one[STREAMS]["decode_tokens_per_s"])
    report["scaling"] = scaling
    print(f"\nscaling: {scaling:.2f} (two stages at 32 streams over twice one stage at 16)")


def compare(report):
    """Ratios to each peer."""
    two, answers, prompts = (report[k] for k in ("two stages", "answers", "prompts"))
    alone = report["llama.cpp, answers alone"]
    answers, prompts = answers["decode_tokens_per_s"], prompts["prefill_tokens_per_s"]
    for name, r in report["llama.cpp"].items():
        print(
            f"against llama.cpp, {name}, {STREAMS} streams: prompts and answers "
            f"{everything(two[STREAMS]) / r['all']:.2f}x; answers alone {answers:.1f} tok/s "
            f"against {alone[name]['decode']:.1f}: {answers / alone[name]['decode']:.2f}x"
        )
    for name, r in report["long prompts"].items():
        print(
            f"against llama.cpp, {name}, {STREAMS} prompts of {LONG}: {prompts:.1f} tok/s against "
            f"{r['prefill']:.1f}: {prompts / r['prefill']:.2f}x"
        )


def more(report):
    """What `mixed` found."""
    for r in report["mixed"]["results"]:
        alone, beside = (r[k]["inter_token_ms"] for k in ("alone", "beside"))
        print(
            f"{r['chats']} chats beside {report['mixed']['long_clients']} long prompts: "
            f"{beside['p50']:.1f} ms between tokens, p99 {r['tail_ratio']:.2f} times that; median "
            f"{r['median_ratio']:.2f} times that of chats alone ({alone['p50']:.1f} ms, p99 "
            f"{r['tail_ratio_alone']:.2f} times that)"
        )
    for r in report["shared prefix"]["results"]:
        print(
            f"shared prefix, {r['order']}: {r['computed']} of {r['asked']} prompt tokens computed, "
            f"{100 * r['saved']:.1f} % saved"
        )
    for with_, without in zip(report["drafts"]["results"], report["no drafts"]["results"]):
        a, b = (r["decode_tokens_per_s"] for r in (with_, without))
        print(
            f"prompts that repeat, {with_['concurrency']} streams: {a:.1f} tok/s with drafts, "
            f"{b:.1f} without: {a / b:.2f}x; {with_['drafts_accepted']} of {with_['drafts']} right"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--bin", type=pathlib.Path, required=True)
    parser.add_argument("--llama", type=pathlib.Path, help="where llama_cpp.sh built llama.cpp")
    parser.add_argument("--q4-0", type=pathlib.Path, help="the model as Q4_0, llama.cpp's best file")
    parser.add_argument("--cache", type=pathlib.Path, help="cache folder [default: a fresh one]")
    parser.add_argument("--requests", type=int, default=3, help="requests of each client")
    parser.add_argument("--mixed", action="store_true", help="also chats beside long prompts …")
    parser.add_argument("--only-mixed", action="store_true", help="these alone")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    if args.llama:
        built = sorted(args.llama.rglob("llama-batched-bench"))
        if not built:
            parser.error(f"no llama-batched-bench below {args.llama}: run llama_cpp.sh {args.llama}")
        args.llama = built[0].parent
    report = {}
    if not args.only_mixed:
        names = ("one stage", "two stages", "answers", "prompts")
        report = dict(zip(names, ours(args)))
        if args.llama:
            found = peers(args)
            report["llama.cpp"], report["llama.cpp, answers alone"], report["long prompts"] = found
        table(report)
        if args.llama:
            compare(report)
    if args.mixed or args.only_mixed:
        report |= mixed(args)
        more(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
