// The AI SDK of Vercel, by its three ways to such a server. Run by test_vercel.py.

import { generateText, streamText, generateObject, streamObject, embedMany, tool, stepCountIs, APICallError } from "ai";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { z } from "zod";
import test from "node:test";
import assert from "node:assert/strict";

const { MILLRACE_URL: baseURL, MILLRACE_KEY: apiKey, MILLRACE_MODEL: name } = process.env;
const openai = createOpenAI({ baseURL, apiKey });
const compatible = createOpenAICompatible({ name: "millrace", baseURL, apiKey, includeUsage: true, supportsStructuredOutputs: true });
const models = { "openai, responses": openai.responses(name), "openai, chat": openai.chat(name), "openai-compatible": compatible(name) };
const ask = { temperature: 0, maxRetries: 0, prompt: "What is the capital of France?" };
const City = z.object({ city: z.string().max(12), unit: z.enum(["C", "F"]) });

for (const [api, model] of Object.entries(models)) {
  test(`${api}: text, whole and streamed`, async () => {
    const whole = await generateText({ ...ask, model, maxOutputTokens: 24 });
    assert.ok(whole.text && whole.usage.outputTokens <= 24);
    const streamed = streamText({ ...ask, model, maxOutputTokens: 24 });
    const pieces = [];
    for await (const piece of streamed.textStream) pieces.push(piece);
    assert.ok(pieces.length > 1);
    assert.equal(pieces.join(""), whole.text);
    assert.deepEqual((await streamed.usage).totalTokens, whole.usage.totalTokens);
    assert.equal(await streamed.finishReason, whole.finishReason);
  });

  test(`${api}: objects, whole and streamed`, async () => {
    const whole = await generateObject({ ...ask, model, schema: City, maxOutputTokens: 64 });
    City.parse(whole.object);
    const streamed = streamObject({ ...ask, model, schema: City, maxOutputTokens: 64 });
    for await (const _ of streamed.partialObjectStream);
    assert.deepEqual(await streamed.object, whole.object);
  });

  test(`${api}: a tool is called and its result goes back`, async () => {
    const asked = [];
    const weather = tool({
      description: "The weather of a city.", inputSchema: City,
      execute: async (city) => { asked.push(City.parse(city)); return "21 degrees"; } });
    const all = { ...ask, model, tools: { weather }, maxOutputTokens: 64, stopWhen: stepCountIs(2),
      prompt: "How warm is it in Rome?",
      prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber ? "none" : { type: "tool", toolName: "weather" } }) };
    const whole = await generateText(all);
    assert.equal(whole.steps.length, 2);
    assert.equal(whole.steps[0].toolResults[0].output, "21 degrees");
    assert.ok(whole.text);
    const streamed = streamText(all);
    await streamed.consumeStream();
    assert.equal(await streamed.text, whole.text);
    assert.deepEqual(asked[1], asked[0]);
  });

  test(`${api}: an error says what is wrong`, async () => {
    await assert.rejects(generateText({ ...ask, model, temperature: 9 }), (e) => APICallError.isInstance(e) && e.statusCode === 400 && /temperature/.test(e.responseBody));
  });
}

for (const [api, model] of Object.entries({ openai: openai.embedding(name), "openai-compatible": compatible.embeddingModel(name) })) {
  test(`${api}: embeddings`, async () => {
    const { embeddings, usage } = await embedMany({ model, values: ["one", "two"] });
    assert.equal(embeddings.length, 2);
    assert.ok(usage.tokens > 0 && embeddings[0].length === embeddings[1].length);
  });
}

test("openai-compatible: completions", async () => {
  const { text } = await generateText({ ...ask, model: compatible.completionModel(name), maxOutputTokens: 8 });
  assert.ok(text);
});
