// openai (npm): chat, completions, responses.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import {
  ASK_WEATHER, assertAtWork, assertIdle, BASE_URL, check, CITIES, CITY_SCHEMA, finish, isCity, KEY, LONG,
  LONG_TOKENS, MODEL, QUESTION, raised, SPECULATION, USER,
} from "./served.mjs";

const client = new OpenAI({ baseURL: BASE_URL, apiKey: KEY, maxRetries: 0, timeout: 120_000 });
const greedy = (fields = {}, options = {}) =>
  client.chat.completions.create(
    { model: MODEL, messages: USER, temperature: 0, max_tokens: 24, ...fields }, options);
const respond = (fields = {}, options = {}) =>
  client.responses.create(
    { model: MODEL, input: QUESTION, temperature: 0, max_output_tokens: 24, store: false, ...fields }, options);
const contentOf = (answer) => answer.choices[0].message.content;

async function collect(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}

await check("plain", "chat, completions and models answer", async () => {
  const answer = await greedy();
  assert.ok(contentOf(answer) && ["stop", "length"].includes(answer.choices[0].finish_reason));
  const old = await client.completions.create({ model: MODEL, prompt: "The capital of France is", temperature: 0 });
  assert.match(old.choices[0].text, /Paris/);
  assert.ok((await collect(client.models.list())).some((model) => model.id === MODEL));
});

await check("plain", "seeds repeat and differ", async () => {
  const texts = [];
  for (const seed of [7, 7, 8]) texts.push(contentOf(await greedy({ temperature: 1, seed })));
  assert.equal(texts[0], texts[1]);
  assert.notEqual(texts[0], texts[2]);
});

await check("streaming", "the stream equals the answer, usage comes last", async () => {
  const whole = await greedy();
  const chunks = await collect(await greedy({ stream: true, stream_options: { include_usage: true } }));
  const text = chunks.flatMap((chunk) => chunk.choices.map((choice) => choice.delta.content ?? "")).join("");
  assert.equal(text, contentOf(whole));
  assert.ok(chunks.slice(0, -1).every((chunk) => chunk.usage === null));
  assert.deepEqual(chunks.at(-1).choices, []);
  assert.equal(chunks.at(-1).usage.completion_tokens, whole.usage.completion_tokens);
});

await check("streaming", "the helper's snapshot equals the answer", async () => {
  const whole = contentOf(await greedy({ stop: ["."] }));
  const stream = client.chat.completions.stream(
    { model: MODEL, messages: USER, temperature: 0, max_tokens: 24, stop: ["."] });
  let text = "";
  stream.on("content", (delta) => { text += delta; });
  assert.equal(contentOf(await stream.finalChatCompletion()), whole);
  assert.equal(text, whole);
});

await check("usage", "counts add up", async () => {
  const { usage } = await greedy({ max_tokens: 9, n: 2 });
  assert.equal(usage.completion_tokens, 18);
  assert.equal(usage.total_tokens, usage.prompt_tokens + 18);
});

await check("extra fields", "speculation changes no text", async () => {
  const spoken = await greedy({ speculation: SPECULATION });
  const alone = await greedy({ speculation: { drafter: "none" } });
  assert.equal(contentOf(spoken), contentOf(alone));
  assert.equal(spoken.speculation.policy, "static");
  assert.equal(alone.speculation.drafted, 0);
});

const weather = {
  type: "function",
  function: { name: "get_weather", description: "The weather of a city now", parameters: CITY_SCHEMA },
};
const named = { type: "function", function: { name: "get_weather" } };
const forced = { messages: ASK_WEATHER, tools: [weather], parallel_tool_calls: false, max_tokens: 200 };

await check("tools", "required and named calls, and the way back", async () => {
  let message;
  for (const tool_choice of ["required", named]) {
    const choice = (await greedy({ ...forced, tool_choice })).choices[0];
    message = choice.message;
    assert.equal(choice.finish_reason, "tool_calls");
    assert.equal(message.tool_calls.length, 1);
    assert.equal(message.tool_calls[0].function.name, "get_weather");
    assert.ok(isCity(JSON.parse(message.tool_calls[0].function.arguments)));
  }
  const result = { role: "tool", tool_call_id: message.tool_calls[0].id, content: '{"degrees": 21}' };
  assert.ok(contentOf(await greedy({ messages: [...ASK_WEATHER, message, result], tools: [weather] })));
});

await check("tools", "streamed calls equal the answer's", async () => {
  const whole = (await greedy({ ...forced, tool_choice: named })).choices[0].message.tool_calls[0];
  const stream = client.chat.completions.stream(
    { model: MODEL, temperature: 0, ...forced, tool_choice: named });
  const [call] = (await stream.finalChatCompletion()).choices[0].message.tool_calls;
  assert.equal(call.function.name, whole.function.name);
  assert.equal(call.function.arguments, whole.function.arguments);
});

await check("structured", "parse gives the zod object", async () => {
  const Weather = z.object({ city: z.enum(CITIES), sunny: z.boolean() });
  const answer = await client.chat.completions.parse({
    model: MODEL, messages: USER, temperature: 0, max_tokens: 200,
    response_format: zodResponseFormat(Weather, "weather"),
  });
  Weather.parse(answer.choices[0].message.parsed);
});

await check("structured", "choice and regex", async () => {
  const answer = async (structured_outputs) => contentOf(await greedy({ structured_outputs }));
  assert.ok(["red", "green"].includes(await answer({ choice: ["red", "green"] })));
  assert.match(await answer({ regex: "\\d{4}-\\d{2}" }), /^\d{4}-\d{2}$/);
});

await check("errors", "each has its class, code and param", async () => {
  const wrong = new OpenAI({ baseURL: BASE_URL, apiKey: "wrong", maxRetries: 0 });
  assert.equal((await raised(OpenAI.AuthenticationError, () => collect(wrong.models.list()))).status, 401);
  const missing = await raised(OpenAI.NotFoundError, () => greedy({ model: "gpt-9" }));
  assert.equal(missing.code, "model_not_found");
  for (const [name, value] of [["temperature", 3], ["max_tokens", -1], ["no_such_field", 1]]) {
    const error = await raised(OpenAI.BadRequestError, () => greedy({ [name]: value }));
    assert.equal(error.param, name);
  }
});

await check("cancellation", "an aborted stream stops the work", async () => {
  const long = { messages: [{ role: "user", content: LONG }], max_tokens: LONG_TOKENS, ignore_eos: true };
  const stream = await greedy({ ...long, stream: true });
  await stream[Symbol.asyncIterator]().next();
  await assertAtWork();
  stream.controller.abort();
  await assertIdle();
});

await check("cancellation", "an aborted plain request stops the work", async () => {
  const long = { messages: [{ role: "user", content: LONG }], max_tokens: LONG_TOKENS, ignore_eos: true };
  const controller = new AbortController();
  const answer = raised(OpenAI.APIUserAbortError, () => greedy(long, { signal: controller.signal }));
  answer.catch(() => {}); // awaited below; until then a rejection is no crash
  await assertAtWork();
  controller.abort();
  await answer;
  await assertIdle();
});

await check("responses", "text and events equal the chat's answer", async () => {
  const whole = await respond();
  assert.equal(whole.output_text, contentOf(await greedy()));
  const events = await collect(await respond({ stream: true }));
  const deltas = events.filter((event) => event.type === "response.output_text.delta");
  assert.equal(deltas.map((event) => event.delta).join(""), whole.output_text);
  assert.equal(events[0].type, "response.created");
  assert.equal(events.at(-1).type, `response.${whole.status}`);
  assert.equal(events.at(-1).response.usage.output_tokens, whole.usage.output_tokens);
  assert.deepEqual(events.map((event) => event.sequence_number), events.map((_, index) => index));
});

await check("responses", "a call and the way back", async () => {
  const tools = [{ type: "function", name: "get_weather", parameters: CITY_SCHEMA, strict: true }];
  const answer = await respond({
    input: ASK_WEATHER, tools, tool_choice: "required", parallel_tool_calls: false, max_output_tokens: 200,
  });
  const [call] = answer.output.filter((item) => item.type === "function_call");
  assert.ok(isCity(JSON.parse(call.arguments)));
  const result = { type: "function_call_output", call_id: call.call_id, output: '{"degrees": 21}' };
  assert.ok((await respond({ input: [...ASK_WEATHER, call, result], tools })).output_text);
});

await check("responses", "errors name the field", async () => {
  const error = await raised(OpenAI.BadRequestError, () => respond({ temperature: 3 }));
  assert.equal(error.param, "temperature");
});

await check("responses", "an aborted stream stops the work", async () => {
  const stream = await respond({ input: LONG, max_output_tokens: LONG_TOKENS, stream: true, ignore_eos: true });
  for await (const event of stream) if (event.type === "response.output_text.delta") break;
  stream.controller.abort();
  await assertIdle();
});

finish("openai (npm)", "openai");
