// A stand-in for the stream of an answer: at a pace of its own, or with what no server should send.
import { createServer } from "node:http";

/** A chunk of one iteration, whose only draft token fell; its token is the target's. */
export function chunk(text, id = 1) {
  const token = { id, text, origin: "correction" };
  const pass = { iteration: true, drafted: 1, lookahead: 1, accepted: 0, stop_reason: "max_sl", draft_seconds: 0, verify_seconds: 0, tokens: [token] };
  return JSON.stringify({ choices: [{ index: 0, delta: { content: text }, passes: [pass], finish_reason: null }] });
}

/** The page's next streams come from `answer(send)`, which sends the data of events. */
export async function standIn(page, answer) {
  const server = createServer(async (request, response) => {
    request.resume();
    response.writeHead(200, { "content-type": "text/event-stream" });
    await answer((data) => response.write(`data: ${data}\n\n`));
    response.end();
  });
  await new Promise((listening) => server.listen(0, "127.0.0.1", listening));
  const url = `http://127.0.0.1:${server.address().port}/`;
  await page.tab.route("**/v1/chat/completions", (route) => route.continue({ url }));
  return () => server.close();
}

/** Sends so many tokens at so many a second; returns the pace that came of it. */
export async function paced(send, tokens, pace) {
  let sent = 0;
  let last = 0;
  send(chunk("first ", sent++));
  const first = performance.now();
  while (sent < tokens) {
    await new Promise((later) => setTimeout(later, 5));
    for (const due = 1 + Math.floor(((performance.now() - first) / 1000) * pace); sent < Math.min(due, tokens); sent++) {
      send(chunk(sent % 40 ? "word " : "line\n", sent));
    }
    last = performance.now();
  }
  send("[DONE]");
  return tokens / ((last - first) / 1000);
}
