#!/usr/bin/env python3
"""Prompts that Millrace makes with the chat templates of real models, beside those of `transformers`.

The templates are those in the source package of `llama-cpp-python` (vendor/llama.cpp/models/templates),
which pip fetches; conversations are plain, of several turns, with tools, with calls and their results,
each with the opening of an answer and without. Where a template does not tell the model of tools in a
form that Millrace knows, it describes them in words, which is not compared ("words"); nor is what fails
in `transformers` alone, such as templates for tools without any.

usage: templates.py PROGRAM [FOLDER]
PROGRAM is target/release/examples/templates (cargo build --release -p millrace-coordinator --example templates);
FOLDER holds *.jinja, instead of what pip fetches
needs: pip install transformers jinja2
"""

import json
import pathlib
import subprocess
import sys
import tarfile
import tempfile

from transformers.utils.chat_template_utils import render_jinja_template

PROGRAM, *FOLDER = sys.argv[1:]
SOURCE = "llama-cpp-python==0.3.36"
BOS, EOS = "<s>", "</s>"
# How Millrace begins to describe tools in words.
WORDS = "You can call these functions, which are given as JSON"

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "Where: a city's name, \"Zürich\" or <other>"},
        "days": {"type": "integer", "enum": [1, 3, 7]},
        "unit": {"type": "string", "default": "C"},
    },
    "required": ["city"],
}
WEATHER = {"name": "weather", "description": "Says how the weather is & will be.", "parameters": SCHEMA}
CLOCK = {"name": "clock", "description": "Says what time it is.", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": tool} for tool in (WEATHER, CLOCK)]


def says(role, content, **more):
    return {"role": role, "content": content, **more}


def call(number, name, arguments):
    return {"id": f"call{number:05}", "type": "function", "function": {"name": name, "arguments": arguments}}


SYSTEM = says("system", "You are a miller.\nAnswer in one line.")
ASK = says("user", "  How is the weather in Zürich?\n")
ONE = [call(1, "weather", {"city": "Zürich", "days": 3})]
RESULT = says("tool", '{"sky": "grey", "degrees": 7.5}', tool_call_id="call00001", name="weather")
THINKS = says("assistant", "<think>\nThe sky, then.\n</think>\n\nGrey.")
CONVERSATIONS = {
    "one turn": ([says("user", "Why is the sky blue?")], []),
    "system": ([SYSTEM, ASK], []),
    "several turns": ([SYSTEM, ASK, says("assistant", "Grey."), says("user", "And <tomorrow>?")], []),
    "thoughts": ([ASK, THINKS, says("user", "Why?")], []),
    "tools": ([SYSTEM, ASK], TOOLS),
    "a call": ([ASK, says("assistant", "", tool_calls=ONE)], TOOLS),
    "its result": ([SYSTEM, ASK, says("assistant", "", tool_calls=ONE), RESULT], TOOLS),
    "after it": (
        [ASK, says("assistant", "", tool_calls=ONE), RESULT, says("assistant", "Grey."), says("user", "Thanks!")],
        TOOLS,
    ),
    "two calls": (
        [
            ASK,
            says("assistant", "", tool_calls=[*ONE, call(2, "clock", {})]),
            RESULT,
            says("tool", "12:30", tool_call_id="call00002", name="clock"),
        ],
        TOOLS,
    ),
}


def templates(folder):
    if FOLDER:
        return sorted(pathlib.Path(FOLDER[0]).glob("*.jinja"))
    fetch = ["download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python", SOURCE]
    subprocess.run([sys.executable, "-m", "pip", *fetch, "--dest", folder], check=True)
    with tarfile.open(next(pathlib.Path(folder).glob("*.tar.gz"))) as package:
        package.extractall(folder, filter="data")
    return sorted(pathlib.Path(folder).glob("*/vendor/llama.cpp/models/templates/*.jinja"))


def theirs(case):
    names = {"bos_token": case["bos"], "eos_token": case["eos"]}
    try:
        texts, _ = render_jinja_template(
            conversations=[case["messages"]],
            tools=case["tools"] or None,
            chat_template=case["template"],
            add_generation_prompt=case["add_generation_prompt"],
            **names,
        )
        return {"text": texts[0]}
    except Exception as error:  # whatever a template does
        return {"error": f"{type(error).__name__}: {error}"}


def compared(own, peer):
    """A verdict, and what differs first."""
    if WORDS in own.get("text", ""):
        return "words", ""
    if "error" in own and "error" in peer:
        return "refused", ""
    if own == peer:
        return "same", ""
    if "error" in peer:
        return "ours alone", ""
    if "error" in own:
        return "different", f"ours {own}, theirs {peer}"[:400]
    a, b = own["text"], peer["text"]
    at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return "different", f"at {at}: ours {a[max(at - 30, 0) : at + 50]!r}, theirs {b[max(at - 30, 0) : at + 50]!r}"


def main():
    with tempfile.TemporaryDirectory() as folder:
        sources = {path.stem: path.read_text() for path in templates(folder)}
    keys, cases = [], []
    for name, source in sources.items():
        for about, (messages, tools) in CONVERSATIONS.items():
            for opened in (True, False):
                keys.append((name, about, opened))
                cases.append(
                    {
                        "template": source,
                        "bos": BOS,
                        "eos": EOS,
                        "messages": messages,
                        "tools": tools,
                        "add_generation_prompt": opened,
                    }
                )
    done = subprocess.run([PROGRAM], input=json.dumps(cases), check=True, capture_output=True, text=True)
    counts, firsts = {}, {}
    for (name, about, opened), own, case in zip(keys, json.loads(done.stdout), cases, strict=True):
        verdict, why = compared(own, theirs(case))
        row = counts.setdefault(name, dict.fromkeys(("same", "refused", "ours alone", "words", "different"), 0))
        row[verdict] += 1
        if why:
            firsts.setdefault(name, f"{about}{' with the opening' if opened else ''}: {why}")
    print("| template | same | refused by both | by theirs | words | different | first difference |\n|---|---|---|---|---|---|---|")
    for name, row in counts.items():
        told = firsts.get(name, "").replace("|", "\\|").replace("\n", " ")
        print(f"| {name} | " + " | ".join(map(str, row.values())) + f" | {told} |")
    all_same = sum(row["different"] == 0 for row in counts.values())
    cases_same = sum(row["same"] + row["refused"] for row in counts.values())
    compared_cases = cases_same + sum(row["different"] for row in counts.values())
    print(f"\n{all_same} of {len(counts)} templates and {cases_same} of {compared_cases} prompts agree")


main()
