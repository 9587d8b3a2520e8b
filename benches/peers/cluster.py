#!/usr/bin/env python3
"""A pipeline of two stages, each a process of its own on one core, under load; beside it one stage on
one core, and llama.cpp: its RPC mode on two one-core servers, and one process with two threads.

    cluster.py --model MODEL.gguf --bin DIR [--llama DIR] [--q4-0 FILE] [--json OUT.json]

--bin: where millrace, millrace-node and millrace-coordinator are. Everything runs in turn on this
machine, so only ratios count. Prints what a pipeline gains and where the time goes:

  stage_busy   CPU time of the engines inside their steps over the time of their cores; corrected: the
               time that coordinator, nodes and clients took beside it does not count as the stages'
  scaling      tokens/s of two stages at 32 streams over twice that of one stage at 16
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
PROMPT, ANSWER = 128, 64


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


def bench(args, stages, levels, extra=()):
    """`bench serve` against `stages` node processes, node i on core i."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        root = pathlib.Path(folder)
        env = {k: v for k, v in os.environ.items() if not k.startswith("MILLRACE_")}
        env["MILLRACE_CACHE"] = str(args.cache or root / "cache")
        log = root / "coordinator.log"
        serve = [
            args.bin / "millrace-coordinator", "serve", "--dir", root / "c", "--model", args.model,
            "--stages", stages, "--port", 0, "--quic", "127.0.0.1:0", "--cluster", "127.0.0.1:0",
            "--max-model-len", 1024, "--kv-cache-tokens", 32768, *extra,
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
        command = [
            args.bin / "millrace", "bench", "serve", "--cluster", root / "c" / "client.toml",
            "--concurrency", ",".join(map(str, levels)), "--prompt-tokens", PROMPT,
            "--max-tokens", ANSWER, "--requests", args.requests, "-o", "json",
        ]  # fmt: skip
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env)
        if done.returncode != 0:
            raise RuntimeError(done.stderr[-2000:])
        return {r["concurrency"]: r for r in json.loads(done.stdout)["results"]}


def batched(args, streams, *, model, threads, rpc=None, ubatch=None):
    """llama.cpp's decode and prefill tokens/s with so many streams at 128+64."""
    command = [
        args.llama / "llama-batched-bench", "-m", model, "-c", 512 * streams, "-npp", PROMPT,
        "-ntg", ANSWER, "-npl", streams, "-t", threads, "-tb", threads, "--output-format", "jsonl",
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


def peers(args):
    found = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        env = {**os.environ, "LD_LIBRARY_PATH": str(args.llama)}
        ports = [50152, 50153]
        for core, port in enumerate(ports):
            server = [args.llama / "ggml-rpc-server", "-H", "127.0.0.1", "-p", port, "-t", 1]
            log = pathlib.Path(folder) / f"rpc{core}.log"
            stack.enter_context(process(server, log, core=core, env=env))
        time.sleep(1)
        rpc = ",".join(f"127.0.0.1:{p}" for p in ports)
        found["rpc"] = batched(args, 16, model=args.model, threads=1, rpc=rpc)
    found["best file, 2 threads"] = batched(args, 16, model=args.q4_0 or args.model, threads=2)
    return found


def everything(result):
    """Tokens of prompts and answers per second: what a peer's whole run is compared with. Clients
    come and go, so prompts and answers mix; a peer that does one after the other has no such figure
    for answers alone."""
    return result["decode_tokens_per_s"] * (PROMPT + ANSWER) / ANSWER


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--bin", type=pathlib.Path, required=True)
    parser.add_argument("--llama", type=pathlib.Path, help="where llama_cpp.sh built llama.cpp")
    parser.add_argument("--q4-0", type=pathlib.Path, help="the model as Q4_0, llama.cpp's best file")
    parser.add_argument("--cache", type=pathlib.Path, help="cache folder [default: a fresh one]")
    parser.add_argument("--requests", type=int, default=3, help="requests of each client")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    if args.llama:
        built = sorted(args.llama.rglob("llama-batched-bench"))
        if not built:
            parser.error(f"no llama-batched-bench below {args.llama}: run llama_cpp.sh {args.llama}")
        args.llama = built[0].parent
    one = bench(args, 1, [16], ["--micro-batches", "1"])
    two = bench(args, 2, [1, 16, 32])
    report = {"one stage": one, "two stages": two}
    if args.llama:
        report["llama.cpp"] = peers(args)

    row = "| {:<34} | {:>8} | {:>8} | {:>8} | {:>14} | {:>6} | {:>9} |"
    print(row.format("", "streams", "all tok/s", "decode", "busy by stage", "busy", "corrected"))
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, results in (("one stage, one core", one), ("two stages, a core each", two)):
        for streams, r in results.items():
            stages = " ".join(f"{s['busy_share'] or 0:.2f}" for s in r["stages"])
            print(row.format(
                name, streams, f"{everything(r):.1f}", f"{r['decode_tokens_per_s']:.1f}", stages,
                f"{r['stage_busy'] or 0:.2f}", f"{r['stage_busy_corrected'] or 0:.2f}",
            ))  # fmt: skip
    for name, r in report.get("llama.cpp", {}).items():
        shown = (f"{r['all']:.1f}", f"{r['decode']:.1f}")
        print(row.format(f"llama.cpp, {name}", 16, *shown, "", "", ""))
    scaling = two[32]["decode_tokens_per_s"] / (2 * one[16]["decode_tokens_per_s"])
    print(f"\nscaling: {scaling:.2f} (two stages at 32 streams over twice one stage at 16)")
    for name, r in report.get("llama.cpp", {}).items():
        print(f"against llama.cpp, {name}: {everything(two[16]) / r['all']:.2f}x at 16 streams")
    report["scaling"] = scaling
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
