#!/usr/bin/env python3
"""Answers under random JSON schemas, from a cluster that serves, and whether they hold.

    pip install jsonschema
    python3 benches/schemas/run.py --url http://127.0.0.1:8000 --key KEY [--schemas 200] [--seed 1]

Draws bounded schemas (strings, numbers, enumerations, arrays and objects with limits, nested), asks
for an answer to each, and prints how many stopped, how many of those are valid by `jsonschema`, and
how long they were. With --save FILE the answers are written, with --against FILE compared with those
of another run: a run in which stages were killed must be the same. Ends with 1 where a document
that stopped is not valid, fewer than 95 % stopped, or a comparison fails.
"""

import argparse
import concurrent.futures
import json
import random
import sys
import urllib.request

import jsonschema

NAMES = ["name", "kind", "size", "when", "where", "tags", "note", "parts", "count", "price", "owner"]
WORDS = ["red", "green", "blue", "north", "south", "small", "large", "open", "closed"]


def schema(draw, depth):
    """A schema whose documents are bounded in length."""
    kinds = ["string", "integer", "number", "boolean", "enum"]
    if depth > 0:
        kinds += ["object", "object", "array"]
    kind = draw.choice(kinds)
    if kind == "string":
        low = draw.randint(0, 4)
        return {"type": "string", "minLength": low, "maxLength": low + draw.randint(1, 24)}
    if kind == "integer":
        low = draw.randint(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 1000)}
    if kind == "number":
        return {"type": "number", "minimum": 0, "maximum": draw.randint(1, 100)}
    if kind == "boolean":
        return {"type": "boolean"}
    if kind == "enum":
        return {"enum": draw.sample(WORDS, draw.randint(1, 4))}
    if kind == "array":
        low = draw.randint(0, 2)
        items = schema(draw, depth - 1)
        return {"type": "array", "items": items, "minItems": low, "maxItems": low + draw.randint(1, 3)}
    return object_schema(draw, depth)


def object_schema(draw, depth):
    names = draw.sample(NAMES, draw.randint(1, 4))
    required = [name for name in names if draw.random() < 0.8]
    return {
        "type": "object",
        "properties": {name: schema(draw, depth - 1) for name in names},
        "required": required,
        "additionalProperties": False,
    }


def ask(args, index, wanted):
    body = {
        "messages": [{"role": "user", "content": f"Describe thing number {index} as JSON."}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "thing", "schema": wanted}},
        "max_tokens": 1024,
        "temperature": 0.8,
        "seed": index,
    }
    request = urllib.request.Request(
        args.url + "/v1/chat/completions",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {args.key}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        answer = json.load(response)
    choice = answer["choices"][0]
    return {
        "reason": choice["finish_reason"],
        "text": choice["message"]["content"],
        "tokens": answer["usage"]["completion_tokens"],
    }


def valid(text, wanted):
    try:
        jsonschema.validate(json.loads(text), wanted)
        return True
    except (ValueError, jsonschema.ValidationError) as error:
        print(f"not valid: {text!r}: {error}", file=sys.stderr)
        return False


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", required=True)
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--save")
    parser.add_argument("--against")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    wanted = [object_schema(draw, 3) for _ in range(args.schemas)]
    with concurrent.futures.ThreadPoolExecutor(args.at_once) as pool:
        answers = list(pool.map(lambda pair: ask(args, *pair), enumerate(wanted)))
    stopped = [(a, w) for a, w in zip(answers, wanted) if a["reason"] == "stop"]
    good = sum(valid(a["text"], w) for a, w in stopped)
    tokens = sorted(a["tokens"] for a in answers)
    print(f"schemas {len(wanted)}, stopped {len(stopped)}, valid {good}")
    print(f"tokens p50 {tokens[len(tokens) // 2]}, p99 {tokens[len(tokens) * 99 // 100]}, most {tokens[-1]}")
    fine = good == len(stopped) and len(stopped) >= 0.95 * len(wanted)
    if args.save:
        with open(args.save, "w", encoding="utf-8") as file:
            json.dump(answers, file)
    if args.against:
        with open(args.against, encoding="utf-8") as file:
            other = json.load(file)
        same = sum(a == b for a, b in zip(answers, other))
        print(f"the same as in {args.against}: {same} of {len(other)}")
        fine = fine and same == len(other) == len(answers)
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
