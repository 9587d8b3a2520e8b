"""Clients that people use, each through its own interface: what it makes of the answers is looked at."""

import asyncio
import json
import subprocess
import sys

import pytest
from pydantic import BaseModel, Field

from cluster import NAME, PATIENCE

QUESTION = "What is the capital of France?"


class City(BaseModel):
    """Where the weather is asked for."""

    city: str = Field(max_length=12)
    unit: str = Field(pattern="^[CF]$")


def url(cluster) -> str:
    return cluster.url + "/v1"


def test_litellm(cluster):
    import litellm

    asked = {"model": f"openai/{NAME}", "api_base": url(cluster), "api_key": cluster.key, "temperature": 0, "timeout": PATIENCE,
             "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 16}
    whole = litellm.completion(**asked)
    assert whole.choices[0].message.content and whole.usage.completion_tokens <= 16
    chunks = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    again = asyncio.run(litellm.acompletion(**asked))
    assert again.choices[0].message.content == whole.choices[0].message.content
    vectors = litellm.embedding(model=f"openai/{NAME}", input=["one", "two"], api_base=url(cluster), api_key=cluster.key)
    assert len(vectors.data) == 2 and len(vectors.data[0]["embedding"]) > 100
    text = litellm.text_completion(model=f"text-completion-openai/{NAME}", prompt="Paris is", api_base=url(cluster),
                                   api_key=cluster.key, max_tokens=4, temperature=0)
    assert text.choices[0].text
    answer = litellm.responses(model=f"openai/{NAME}", input=QUESTION, api_base=url(cluster), api_key=cluster.key,
                               max_output_tokens=16, temperature=0)
    assert answer.output[0].content[0].text and answer.usage.output_tokens <= 16
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**{**asked, "api_key": "wrong"})
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**{**asked, "temperature": 9})


def test_litellm_tools(cluster):
    import litellm

    tool = {"type": "function", "function": {"name": "get_weather", "parameters": City.model_json_schema()}}
    whole = litellm.completion(
        model=f"openai/{NAME}", api_base=url(cluster), api_key=cluster.key, tools=[tool], temperature=0, max_tokens=96,
        tool_choice={"type": "function", "function": {"name": "get_weather"}}, messages=[{"role": "user", "content": "How warm is it in Rome?"}])
    (call,) = whole.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    City.model_validate_json(call.function.arguments)


@pytest.mark.parametrize("api", ["chat completions", "responses"])
def test_openai_agents(cluster, api):
    import agents
    from openai import AsyncOpenAI

    agents.set_tracing_disabled(True)
    called = []

    @agents.function_tool
    def get_weather(city: str) -> str:
        """The weather of a city.

        Args:
            city: its name.
        """
        called.append(city)
        return "21 degrees and sunny"

    async def run():
        async with AsyncOpenAI(base_url=url(cluster), api_key=cluster.key, timeout=PATIENCE) as client:
            kind = agents.OpenAIResponsesModel if api == "responses" else agents.OpenAIChatCompletionsModel
            agent = agents.Agent(
                name="Weather", instructions="You know the weather.", tools=[get_weather], model=kind(model=NAME, openai_client=client),
                # After the first call the SDK itself goes back to what the model likes.
                model_settings=agents.ModelSettings(tool_choice="required", parallel_tool_calls=False, temperature=0, max_tokens=64))
            whole = await agents.Runner.run(agent, "How warm is it in Rome?", max_turns=3)
            streamed = agents.Runner.run_streamed(agent, "How warm is it in Rome?", max_turns=3)
            events = [event.type async for event in streamed.stream_events()]
            return whole, streamed, events

    whole, streamed, events = asyncio.run(run())
    assert len(called) >= 2 and whole.final_output and streamed.final_output == whole.final_output
    assert [type(i).__name__ for i in whole.new_items[:2]] == ["ToolCallItem", "ToolCallOutputItem"]
    assert "raw_response_event" in events and "run_item_stream_event" in events


@pytest.mark.parametrize("api", ["chat completions", "responses"])
def test_pydantic_ai(cluster, api):
    from pydantic_ai import Agent, NativeOutput, ToolOutput
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    async def run():
        kind = OpenAIResponsesModel if api == "responses" else OpenAIChatModel
        model = kind(NAME, provider=OpenAIProvider(base_url=url(cluster), api_key=cluster.key))
        settings = {"temperature": 0, "max_tokens": 64, "parallel_tool_calls": False}
        for output in (NativeOutput(City), ToolOutput(City)):
            answer = await Agent(model, output_type=output, model_settings=settings).run("How warm is it in Rome?")
            assert isinstance(answer.output, City) and answer.usage.output_tokens > 0
        async with Agent(model, model_settings=settings).run_stream(QUESTION) as streamed:
            pieces = [piece async for piece in streamed.stream_text(delta=True, debounce_by=None)]
        whole = await Agent(model, model_settings=settings).run(QUESTION)
        assert len(pieces) > 1 and "".join(pieces) == whole.output

    asyncio.run(run())


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA", "RESPONSES_TOOLS"])
def test_instructor(cluster, mode):
    import instructor
    from openai import OpenAI

    with OpenAI(base_url=url(cluster), api_key=cluster.key, timeout=PATIENCE) as client:
        made = instructor.from_openai(client, mode=instructor.Mode[mode])
        city, raw = made.create_with_completion(
            model=NAME, response_model=City, temperature=0, max_tokens=64, max_retries=0,
            messages=[{"role": "user", "content": "How warm is it in Rome? Celsius, please."}])
    assert isinstance(city, City) and raw.usage.total_tokens > 0


def test_llm(cluster, tmp_path):
    """Simon Willison's command line, told of the cluster as its documentation says."""
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([{
        "model_id": "millrace", "model_name": NAME, "api_base": url(cluster), "api_key_name": "millrace", "supports_schema": True,
        "supports_tools": True}]))
    (tmp_path / "keys.json").write_text(json.dumps({"millrace": cluster.key}))

    def llm(*arguments: str) -> str:
        asked = [sys.executable, "-m", "llm", "prompt", "-m", "millrace", "-o", "temperature", "0", *arguments]
        done = subprocess.run(asked, env={"LLM_USER_PATH": str(tmp_path), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True,
                              timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        return done.stdout

    streamed = llm("-o", "max_tokens", "16", QUESTION)
    assert streamed.strip() and streamed == llm("--no-stream", "-o", "max_tokens", "16", QUESTION)
    City.model_validate_json(llm("-o", "max_tokens", "64", "--schema", json.dumps(City.model_json_schema()), "How warm is it in Rome?"))


def test_lm_eval(cluster, tmp_path):
    """EleutherAI's harness, with the cluster's tokenizer: prompts of text and of ids are as likely."""
    asked = [("The capital of France is", [" Paris", " London", " Rome"], 0), ("The sun rises in the", [" west", " east", " fridge"], 1),
             ("Two plus two is", [" four", " nine", " a dog"], 0)]
    rows = [json.dumps({"question": q, "choices": c, "answer": a}) for q, c, a in asked]
    (tmp_path / "questions.jsonl").write_text("\n".join(rows))
    (tmp_path / "questions.yaml").write_text(json.dumps({
        "task": "questions", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "questions.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer", "target_delimiter": "", "metric_list": [{"metric": "acc"}]}))

    def likelihoods(ids: bool) -> list[list[float]]:
        out = tmp_path / f"ids-{ids}"
        arguments = (f"model={NAME},base_url={url(cluster)}/completions,tokenizer_backend=remote,auth_token={cluster.key},"
                     f"tokenized_requests={ids},max_length=2048")
        done = subprocess.run(
            [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", arguments, "--tasks", "questions",
             "--include_path", str(tmp_path), "--log_samples", "--output_path", str(out)],
            env={"OPENAI_API_KEY": cluster.key, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"},
            capture_output=True, text=True, timeout=4 * PATIENCE)
        assert done.returncode == 0, done.stderr
        (samples,) = out.rglob("samples_*.jsonl")
        found = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda sample: sample["doc_id"])
        assert [sample["acc"] for sample in found] == [1.0, 1.0, 1.0]
        return [[float(answer[0][0]) for answer in sample["resps"]] for sample in found]

    by_text, by_ids = likelihoods(False), likelihoods(True)
    assert by_text == by_ids and all(value < 0 for answers in by_ids for value in answers)
