// @ai-sdk/openai-compatible (npm) under the `ai` package.
import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, jsonSchema, Output, streamText, tool } from "ai";
import { z } from "zod";
import {
  assertAtWork, assertIdle, BASE_URL, check, CITIES, CITY_SCHEMA, finish, isCity, KEY, LONG, LONG_TOKENS,
  MODEL, QUESTION, raised, SPECULATION,
} from "./served.mjs";

const provider = (apiKey = KEY) =>
  createOpenAICompatible({
    name: "disco", baseURL: BASE_URL, apiKey, includeUsage: true, supportsStructuredOutputs: true,
  });
const model = provider()(MODEL);
const usual = { model, prompt: QUESTION, temperature: 0, maxOutputTokens: 24, maxRetries: 0 };
const greedy = (fields = {}) => generateText({ ...usual, ...fields });
const extra = (fields) => ({ providerOptions: { disco: fields } });
const getWeather = tool({ description: "The weather of a city now", inputSchema: jsonSchema(CITY_SCHEMA) });
const Weather = z.object({ city: z.enum(CITIES), sunny: z.boolean() });

await check("plain", "text, and seeds", async () => {
  assert.ok((await greedy()).text);
  const texts = [];
  for (const seed of [7, 7, 8]) texts.push((await greedy({ temperature: 1, seed })).text);
  assert.equal(texts[0], texts[1]);
  assert.notEqual(texts[0], texts[2]);
});

await check("streaming", "the stream equals the answer", async () => {
  const whole = await greedy();
  const stream = streamText(usual);
  let text = "";
  for await (const delta of stream.textStream) text += delta;
  assert.equal(text, whole.text);
  assert.equal(await stream.finishReason, whole.finishReason);
  assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);
});

await check("usage", "counts add up", async () => {
  const { usage } = await greedy({ maxOutputTokens: 9 });
  assert.equal(usage.outputTokens, 9);
  assert.equal(usage.totalTokens, usage.inputTokens + 9);
});

await check("extra fields", "speculation changes no text", async () => {
  const spoken = await greedy(extra({ speculation: SPECULATION }));
  const alone = await greedy(extra({ speculation: { drafter: "none" } }));
  assert.equal(spoken.text, alone.text);
  assert.equal(spoken.response.body.speculation.policy, "static");
});

const forced = {
  tools: { getWeather }, maxOutputTokens: 200, ...extra({ parallel_tool_calls: false }),
};

await check("tools", "required and named calls, and the way back", async () => {
  let answer;
  for (const toolChoice of ["required", { type: "tool", toolName: "getWeather" }]) {
    answer = await greedy({ ...forced, toolChoice });
    assert.equal(answer.finishReason, "tool-calls");
    assert.equal(answer.toolCalls.length, 1);
    assert.ok(isCity(answer.toolCalls[0].input));
  }
  const { toolCallId, toolName } = answer.toolCalls[0];
  const output = { type: "json", value: { degrees: 21 } };
  const messages = [
    { role: "user", content: QUESTION },
    ...answer.response.messages,
    { role: "tool", content: [{ type: "tool-result", toolCallId, toolName, output }] },
  ];
  const back = await generateText({ ...usual, prompt: undefined, messages, tools: { getWeather } });
  assert.ok(back.text);
});

await check("tools", "streamed calls equal the answer's", async () => {
  const [whole] = (await greedy({ ...forced, toolChoice: "required" })).toolCalls;
  const [call] = await streamText({ ...usual, ...forced, toolChoice: "required" }).toolCalls;
  assert.deepEqual(call.input, whole.input);
});

await check("structured", "an object by its schema, streamed too", async () => {
  const form = { output: Output.object({ schema: Weather }), maxOutputTokens: 200 };
  const whole = (await greedy(form)).output;
  Weather.parse(whole);
  assert.deepEqual(await streamText({ ...usual, ...form }).output, whole);
});

await check("errors", "each has its status and the server's words", async () => {
  const stranger = provider("wrong")(MODEL);
  assert.equal((await raised(APICallError, () => greedy({ model: stranger }))).statusCode, 401);
  assert.equal((await raised(APICallError, () => greedy({ model: provider()("gpt-9") }))).statusCode, 404);
  const error = await raised(APICallError, () => greedy({ topP: 3 }));
  assert.equal(error.statusCode, 400);
  assert.equal(JSON.parse(error.responseBody).error.param, "top_p");
});

await check("cancellation", "an aborted stream stops the work", async () => {
  const controller = new AbortController();
  const stream = streamText({
    ...usual, prompt: LONG, maxOutputTokens: LONG_TOKENS, abortSignal: controller.signal,
    ...extra({ ignore_eos: true }),
  });
  await stream.textStream[Symbol.asyncIterator]().next();
  await assertAtWork();
  controller.abort();
  await assertIdle();
});

finish("@ai-sdk/openai-compatible", "@ai-sdk/openai-compatible", "ai");
