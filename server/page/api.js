// The server's public API: JSON answers, and streams of server-sent events. Addresses are relative to the page.

/** An answer with OpenAI's error body, or none at all. `param` names the field at fault, if one is. */
export class ApiError extends Error {
  constructor(status, { message, code = null, param = null }, retryAfter = null) {
    super(message);
    Object.assign(this, { status, code, param, retryAfter });
  }
}

async function ask(path, key, init = {}) {
  if (/[^\x20-\x7e]/.test(key)) throw new ApiError(401, { message: "no API key has such characters" });
  const headers = { ...init.headers };
  if (key) headers.authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...init, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { message: "the server cannot be reached" });
  }
  if (response.ok) return response;
  let fault = { message: `the server answered ${response.status} ${response.statusText}` };
  try {
    fault = (await response.json()).error ?? fault;
  } catch {
    // not JSON: something between us and the server has answered
  }
  throw new ApiError(response.status, fault, response.headers.get("retry-after"));
}

/** The JSON of a GET. Throws ApiError. */
export async function get(path, key) {
  return (await ask(path, key)).json();
}

/** The chunks of a streamed answer to `body`, each with the time it came. Throws ApiError, also for an error within. */
export async function* stream(path, body, key, signal) {
  const response = await ask(path, key, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  for await (const { data, at } of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = parsed(data);
    if (chunk?.error) throw new ApiError(0, chunk.error); // the status, 200, says nothing of it
    if (!Array.isArray(chunk?.choices)) throw new ApiError(0, { message: "the server sent what this page cannot read" });
    yield { chunk, at };
  }
  throw new ApiError(0, { message: "the stream broke off before its end" });
}

/** Undefined for what is no JSON. */
function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    return undefined;
  }
}

/** The data of each event, and when it came. Comments, which keep a connection open, have none. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const at = performance.now();
      const parts = (left + value.replaceAll("\r\n", "\n")).split("\n\n");
      left = parts.pop();
      for (const part of parts) {
        const lines = part.split("\n").filter((line) => line.startsWith("data:"));
        if (lines.length) yield { data: lines.map((line) => line.slice(5).trimStart()).join("\n"), at };
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { message: "the connection broke off" });
  } finally {
    reader.cancel().catch(() => {}); // whoever stops reading ends the generation too
  }
}
