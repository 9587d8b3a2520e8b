"""Writes cases.json: what Hugging Face's transformers make of conversations with tools.

    python3 make.py [TEMPLATE.jinja ...]

Needs transformers (5.x). Without arguments the templates beside this file are taken.
"""

import json
import pathlib
import sys

from transformers.utils.chat_template_utils import render_jinja_template

HERE = pathlib.Path(__file__).parent
WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "Weather of a city, in °C & \"now\"",
    "parameters": {"type": "object", "properties": {
        "city": {"type": "string", "description": "its <name>"}, "days": {"type": "integer", "minimum": 1}},
        "required": ["city"]}}}
TIME = {"type": "function", "function": {"name": "time", "description": "", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "abcDEF123", "type": "function", "function": {
    "name": "get_weather", "arguments": {"city": "Zürich", "days": 2, "exact": True, "at": [1.5, None]}}}
SHORT = [{"role": "user", "content": "How warm is it in Zürich?"}]
LONG = [
    {"role": "system", "content": "Be brief."}, *SHORT,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abcDEF123", "content": "{\"celsius\": 21}"},
]
CONVERSATIONS = [(SHORT, [WEATHER, TIME]), (LONG, [WEATHER]), (SHORT, None), (LONG, None)]


def main() -> None:
    files = [pathlib.Path(a) for a in sys.argv[1:]] or sorted(HERE.glob("*.jinja"))
    cases = []
    for file in files:
        for messages, tools in CONVERSATIONS:
            texts, _ = render_jinja_template(
                [messages], tools=tools, chat_template=file.read_text(), add_generation_prompt=True,
                bos_token="<s>", eos_token="</s>")
            cases.append({"template": file.name, "messages": messages, "tools": tools or [], "text": texts[0]})
    (HERE / "cases.json").write_text(json.dumps(cases, ensure_ascii=False, indent=1) + "\n")


main()
