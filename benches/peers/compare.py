#!/usr/bin/env python3
"""Measures Millrace and llama.cpp side by side: the same files and shapes, in turn, on this machine.

    compare.py --model MODEL.gguf --llama DIR [--quick] [--json OUT.json] [--svg OUT.svg]

DIR is where llama.cpp is; llama_cpp.sh builds it there if it is not there yet. Machines drift, so only
ratios of one run count: every repetition runs all programs one after the other. Prints Markdown tables
of medians and ratios; after ± stands half the distance from the least to the most.

Files: MODEL as it is, and llama.cpp's best case, Q4_0 (made by its llama-quantize unless --q4-0 names
one). Shapes: decode of one stream, decode of 16 sequences at 128+64 tokens, prefill of 128 and 512, with
one thread and with two; and Millrace alone at context 4096, with f16 and int8 KV.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import plot  # noqa: E402

# (name, key of the shape, Millrace's threads, llama.cpp's threads, its file, at least)
TARGETS = [
    ("decode, 1 stream: same file", "decode 1", 1, 1, "same", 1.4),
    ("decode, 1 stream: its Q4_0", "decode 1", 1, 1, "q4_0", 1.15),
    ("decode, 16 sequences: same file", "decode 16", 1, 1, "same", 3.0),
    ("decode, 16 sequences, one thread: its Q4_0 on two", "decode 16", 1, 2, "q4_0", 1.1),
    ("prefill 128: same file", "prefill 128", 1, 1, "same", 4.0),
    ("prefill 512: same file", "prefill 512", 1, 1, "same", 4.0),
    ("prefill 128: its Q4_0", "prefill 128", 1, 1, "q4_0", 1.8),
    ("prefill 512: its Q4_0", "prefill 512", 1, 1, "q4_0", 1.8),
]
SHAPES = ["decode 1", "decode 16", "prefill 128", "prefill 512"]
THREADS = [1, 2]


def run(command, env=None):
    """Standard output of a program; ends with its errors if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode != 0:
        tail = "\n".join(done.stderr.splitlines()[-15:])
        raise RuntimeError(f"{' '.join(map(str, command))}: exit {done.returncode}\n{tail}")
    return done.stdout


class Millrace:
    """`millrace bench engine`."""

    def __init__(self, binary):
        self.binary = binary

    def bench(self, model, threads, *, prefill, batch, decode, depth=0, kv="f16"):
        out = run([
            self.binary, "bench", "engine", "-m", model, "-t", str(threads), "--repeat", "1",
            "--prefill", ",".join(map(str, prefill)), "--batch", ",".join(map(str, batch)),
            "--decode", str(decode), "--depth", str(depth), "--kv-cache-dtype", kv, "-o", "json",
        ])  # fmt: skip
        return json.loads(out)

    def shapes(self, model, threads):
        """Tokens per second of every shape, and the share of the bound where there is one."""
        one = self.bench(model, threads, prefill=[128, 512], batch=[1], decode=128)
        many = self.bench(model, threads, prefill=[1], batch=[16], decode=64, depth=128)
        found = {}
        for m in one["results"] + many["results"]:
            if m["test"] == "decode":
                key = f"decode {m['batch']}"
            else:
                key = f"prefill {m['tokens']}"
            if key in SHAPES:
                found[key] = (m["tokens_per_s"], m.get("share_of_bound"))
        return found

    def context(self, model, threads, depth, kv, batch):
        result = self.bench(
            model, threads, prefill=[1], batch=[batch], decode=32, depth=depth, kv=kv
        )
        return next(m["tokens_per_s"] for m in result["results"] if m["test"] == "decode")

    def nll(self, model):
        out = run([
            self.binary, "bench", "engine", "-m", model, "--prefill", "1", "--batch", "1",
            "--decode", "1", "--repeat", "1", "--nll", "-o", "json",
        ])  # fmt: skip
        return json.loads(out)["mean_nll"]


class Llama:
    """llama-bench and llama-batched-bench."""

    def __init__(self, folder):
        pattern = "llama_cpp_python-*/vendor/llama.cpp/build/bin/llama-bench"
        if not list(pathlib.Path(folder).glob(pattern)):
            subprocess.run([HERE / "llama_cpp.sh", folder], check=True)
        self.bin = sorted(pathlib.Path(folder).glob(pattern))[-1].parent
        self.env = {**os.environ, "LD_LIBRARY_PATH": str(self.bin)}

    def version(self):
        command = [self.bin / "llama-bench", "--version"]
        said = subprocess.run(command, capture_output=True, text=True, env=self.env, check=False)
        return (said.stdout + said.stderr).strip().splitlines()[0]

    def shapes(self, model, threads):
        out = run([
            self.bin / "llama-bench", "-m", model, "-t", str(threads), "-p", "128,512", "-n", "128",
            "-r", "1", "-o", "json",
        ], self.env)  # fmt: skip
        found = {}
        for m in json.loads(out):
            key = "decode 1" if m["n_gen"] else f"prefill {m['n_prompt']}"
            found[key] = (m["avg_ts"], None)
        out = run([
            self.bin / "llama-batched-bench", "-m", model, "-t", str(threads), "-c", "4096",
            "-b", "2048", "-ub", "512", "-npp", "128", "-ntg", "64", "-npl", "16",
            "--output-format", "jsonl",
        ], self.env)  # fmt: skip
        lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        found["decode 16"] = (lines[-1]["speed_tg"], None)
        return found

    def quantize(self, model, out):
        tool = self.bin / "llama-quantize"
        if tool.exists():
            run([tool, "--allow-requantize", model, out, "Q4_0"], self.env)
            return True
        return False


class Samples:
    """All figures, by what they are of."""

    def __init__(self):
        self.all = {}

    def add(self, key, value, share=None):
        entry = self.all.setdefault(key, {"tokens_per_s": [], "share_of_bound": []})
        entry["tokens_per_s"].append(value)
        if share is not None:
            entry["share_of_bound"].append(share)

    def median(self, key, what="tokens_per_s"):
        values = self.all.get(key, {}).get(what)
        return statistics.median(values) if values else None

    def spread(self, key):
        values = self.all[key]["tokens_per_s"]
        return (max(values) - min(values)) / statistics.median(values)


def key(engine, file, shape, threads):
    return f"{engine} | {file} | {shape} | {threads}"


def measure(args, ours, theirs, files, samples):
    """Everything once per repetition, the programs in turn."""
    for repetition in range(args.repeat):
        for threads in args.threads:
            for file, path in files.items():
                for engine, program in (("millrace", ours), ("llama.cpp", theirs)):
                    print(f"{repetition + 1}/{args.repeat}: {engine}, {file}, {threads} thread(s)",
                          file=sys.stderr, flush=True)  # fmt: skip
                    for shape, (speed, share) in program.shapes(path, threads).items():
                        samples.add(key(engine, file, shape, threads), speed, share)
        context(args, ours, files["same"], samples)


def context(args, ours, model, samples):
    """Millrace at depth; a cache type that this build does not have is left out."""
    for depth, batch, kv in [
        (0, 1, "f16"), (4096, 1, "f16"), (4096, 1, "int8"), (4096, 16, "f16"), (4096, 16, "int8"),
    ]:  # fmt: skip
        name = f"context {depth} {kv} x{batch}"
        try:
            speed = ours.context(model, 1, depth, kv, batch)
        except RuntimeError as e:
            print(f"left out: {name}: {e}", file=sys.stderr)
            continue
        samples.add(key("millrace", "same", name, 1), speed)


def table(samples, args):
    """Speeds, as Markdown."""
    lines = [
        "| shape | threads | millrace | share of bound | its Q4_0 | llama.cpp | its Q4_0 | ratio | of Q4_0s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for shape in SHAPES:
        for threads in args.threads:
            at = {
                (e, f): samples.median(key(e, f, shape, threads))
                for e in ("millrace", "llama.cpp")
                for f in ("same", "q4_0")
            }
            share = samples.median(key("millrace", "same", shape, threads), "share_of_bound")
            cells = [shape, str(threads)]
            cells.append(cell(samples, key("millrace", "same", shape, threads)))
            cells.append(f"{share * 100:.0f} %" if share else "-")
            cells.append(cell(samples, key("millrace", "q4_0", shape, threads)))
            cells.append(cell(samples, key("llama.cpp", "same", shape, threads)))
            cells.append(cell(samples, key("llama.cpp", "q4_0", shape, threads)))
            for file in ("same", "q4_0"):
                pair = at["millrace", file], at["llama.cpp", file]
                cells.append(f"{pair[0] / pair[1]:.2f}x" if all(pair) else "-")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(samples, name):
    median = samples.median(name)
    return "-" if median is None else f"{median:.0f} (±{samples.spread(name) * 50:.0f} %)"


def ratios(samples):
    """What is promised: (what, ratio, target, whether a smaller ratio is better)."""
    rows = []
    for name, shape, ours, theirs, file, target in TARGETS:
        a = samples.median(key("millrace", "same", shape, ours))
        b = samples.median(key("llama.cpp", file, shape, theirs))
        if a and b:
            rows.append((name, a / b, target, False))
    for shape, target in (("prefill 128", 1.8), ("prefill 512", 1.8), ("decode 16", 1.6)):
        one, two = (samples.median(key("millrace", "same", shape, t)) for t in (1, 2))
        if one and two:
            rows.append((f"two threads over one: {shape}", two / one, target, False))

    def at(depth, kv, batch):
        return samples.median(key("millrace", "same", f"context {depth} {kv} x{batch}", 1))

    for kv, target in (("f16", 2.6), ("int8", 2.0)):
        if at(0, "f16", 1) and at(4096, kv, 1):
            ratio = at(0, "f16", 1) / at(4096, kv, 1)
            rows.append((f"no context over context 4096, {kv} KV", ratio, target, True))
    if at(4096, "f16", 16) and at(4096, "int8", 16):
        ratio = at(4096, "int8", 16) / at(4096, "f16", 16)
        rows.append(("context 4096, 16 streams: int8 KV over f16", ratio, 1.2, False))
    share = samples.median(key("millrace", "same", "decode 1", 1), "share_of_bound")
    if share:
        rows.append(("decode, 1 stream: share of the bound", share, 0.8, False))
    return rows


def ratio_table(rows):
    lines = ["| ratio | measured | must | |", "|---|---|---|---|"]
    for name, ratio, target, less in rows:
        met = ratio <= target if less else ratio >= target
        sign = "<=" if less else ">="
        lines.append(f"| {name} | {ratio:.2f} | {sign} {target:g} | {'met' if met else 'MISSED'} |")
    return "\n".join(lines)


def draw(samples, args, path):
    """Bars of tokens per second: one panel per shape and thread count."""
    series = [
        ("millrace, same file", "millrace", "same"),
        ("millrace, Q4_0", "millrace", "q4_0"),
        ("llama.cpp, same file", "llama.cpp", "same"),
        ("llama.cpp, Q4_0", "llama.cpp", "q4_0"),
    ]
    groups = []
    for shape in SHAPES:
        for threads in args.threads:
            names = [key(engine, file, shape, threads) for _, engine, file in series]
            bars = [(samples.median(n), samples.all.get(n, {}).get("tokens_per_s", [])) for n in names]
            plural = "" if threads == 1 else "s"
            groups.append((shape, f"{threads} thread{plural}", bars))
    title = f"{pathlib.Path(args.model).stem}: tokens per second"
    path.write_text(plot.bars(title, [name for name, _, _ in series], groups))


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="GGUF file, the same for both")
    parser.add_argument("--llama", required=True, help="folder with llama.cpp")
    parser.add_argument("--millrace", default="millrace", help="program to measure")
    parser.add_argument("--q4-0", help="the model as Q4_0")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions, medians count")
    parser.add_argument("--threads", type=lambda s: [int(n) for n in s.split(",")], default=THREADS)
    parser.add_argument("--quick", action="store_true", help="one repetition")
    parser.add_argument("--json", type=pathlib.Path, help="write all samples here")
    parser.add_argument("--svg", type=pathlib.Path, help="draw the speeds here")
    parser.add_argument("--from-json", type=pathlib.Path, help="measure nothing: show a former run")
    args = parser.parse_args()
    args.repeat = 1 if args.quick else args.repeat
    return args


def machine():
    info = pathlib.Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    names = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
    return {"cpu": names[0] if names else "unknown", "cores": os.cpu_count()}


def main():
    args = arguments()
    samples = Samples()
    report = {"machine": machine(), "date": time.strftime("%Y-%m-%d %H:%M"), "model": args.model}
    if args.from_json:
        report = json.loads(args.from_json.read_text())
        samples.all = report["samples"]
    else:
        ours, theirs = Millrace(args.millrace), Llama(args.llama)
        with tempfile.TemporaryDirectory() as scratch:
            q4_0 = args.q4_0 or f"{scratch}/q4_0.gguf"
            if not args.q4_0 and not theirs.quantize(args.model, q4_0):
                run([args.millrace, "quantize", args.model, q4_0, "--type", "q4_0"])
            files = {"same": args.model, "q4_0": q4_0}
            report["mean_nll"] = {name: ours.nll(path) for name, path in files.items()}
            measure(args, ours, theirs, files, samples)
        report.update(llama=theirs.version(), repeat=args.repeat, samples=samples.all)
    nll = ", ".join(f"{name} {value:.4f}" for name, value in report["mean_nll"].items())
    print(f"{report['machine']['cpu']}, {report['machine']['cores']} cores, {report['date']}; medians of "
          f"{report['repeat']}, tokens per second; mean_nll of Millrace: {nll}\n")  # fmt: skip
    print(table(samples, args), "\n\n", ratio_table(ratios(samples)), sep="")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.svg:
        args.svg.parent.mkdir(parents=True, exist_ok=True)
        draw(samples, args, args.svg)


if __name__ == "__main__":
    main()
