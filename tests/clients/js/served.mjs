// What every npm session shares: where the server is, checks that are counted, and what /metrics says.
import { readFileSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";

export const ROOT = process.env.SERVED_AT ?? "http://127.0.0.1:8000";
export const BASE_URL = `${ROOT}/v1`;
export const KEY = process.env.SERVED_KEY ?? "none";
export const MODEL = process.env.SERVED_MODEL ?? "smollm2";

export const QUESTION = "Name three rivers in Europe.";
export const USER = [{ role: "user", content: QUESTION }];
export const ASK_WEATHER = [{ role: "user", content: "What is the weather in Rome, in celsius?" }];
export const LONG = "Write a very long story about a river, with many chapters.";
export const LONG_TOKENS = 4000; // minutes on a CPU: that the server is idle soon after says that it was stopped
export const SPECULATION = { drafter: "model", policy: "static", options: { sl: 3 } };
export const CITIES = ["Paris", "Rome", "Oslo"];
export const UNITS = ["celsius", "fahrenheit"];
export const CITY_SCHEMA = {
  type: "object",
  properties: { city: { type: "string", enum: CITIES }, unit: { type: "string", enum: UNITS } },
  required: ["city", "unit"],
  additionalProperties: false,
};

export const isCity = (value) =>
  Object.keys(value).length === 2 && CITIES.includes(value.city) && UNITS.includes(value.unit);

const only = process.argv.slice(2);
const results = [];

/** Runs the check now and counts it. topic: plain, streaming, usage, tools, structured, errors, ... */
export async function check(topic, what, run) {
  const name = `${topic}: ${what}`;
  if (only.length && !only.some((part) => name.includes(part))) return;
  const start = performance.now();
  let error = null;
  try {
    await run();
  } catch (fault) {
    const place = /\/(with_\w+\.mjs:\d+)/.exec(fault?.stack ?? "")?.[1] ?? "";
    error = `${place}: ${fault?.name}: ${fault?.message}`.slice(0, 2000);
  }
  const seconds = Math.round(performance.now() - start) / 1000;
  results.push({ name, error, seconds });
  console.error(`${error ? "FAILED" : "ok    "} ${name} (${seconds} s)${error ? `\n       ${error}` : ""}`);
}

/** Prints the outcome as one line of JSON; exits with 1 if a check failed or none ran. */
export function finish(client, ...packages) {
  const versions = {};
  for (const name of packages) {
    versions[name] = JSON.parse(readFileSync(`node_modules/${name}/package.json`, "utf8")).version;
  }
  console.log(JSON.stringify({ client, versions, checks: results }));
  process.exit(results.length && results.every((result) => !result.error) ? 0 : 1);
}

/** The sum of a metric over its labels. */
async function metric(name) {
  const text = await (await fetch(`${ROOT}/metrics`)).text();
  const found = text.split("\n").filter((line) => line.split(/[{ ]/)[0] === name);
  if (!found.length) throw new Error(`/metrics has no ${name}`);
  return found.reduce((sum, line) => sum + Number(line.slice(line.lastIndexOf(" ") + 1)), 0);
}

async function waitUntil(holds, what, seconds = 15) {
  const end = performance.now() + seconds * 1000;
  while (!(await holds())) {
    if (performance.now() > end) throw new Error(`after ${seconds} s still not: ${what}`);
    await sleep(50);
  }
}

const busy = async () =>
  (await metric("disco_requests_in_flight")) + (await metric("disco_requests_running"));
export const assertAtWork = () => waitUntil(async () => (await busy()) > 0, "a request in flight");
export const assertIdle = () => waitUntil(async () => (await busy()) === 0, "nothing in flight");

/** The error of that kind that the call rejects with. */
export async function raised(kind, call) {
  let answer;
  try {
    answer = await call();
  } catch (error) {
    if (error instanceof kind) return error;
    throw error;
  }
  throw new Error(`no ${kind.name}; the answer was ${JSON.stringify(answer).slice(0, 200)}`);
}
