// The live page, used as a person would: typing, reading, comparing, stopping, by mouse and by keyboard alone.
import assert from "node:assert/strict";
import { KEY, LONG, LONG_TOKENS, MODEL, ROOT, assertAtWork, assertIdle, check, finish } from "./served.mjs";
import { LATE, Page, browser } from "./page.mjs";
import { chunk, paced, standIn } from "./paced.mjs";

const SHOTS = process.env.SCREENSHOTS;
const FIELDS = { prompt: "Write a Python function that returns the factorial of n, and explain it.", max_tokens: 96 };

/** A picture of the page, without the key and from the top of what scrolls within it. */
async function shot(page, name) {
  await page.tab.evaluate(() => {
    document.getElementById("locked").hidden = true;
    for (const part of document.querySelectorAll("#ask, .text")) part.scrollTo(0, 0);
  });
  await page.tab.screenshot({ path: `${SHOTS}/${name}.png` });
}

const sum = (parts) => parts.reduce((total, part) => total + part, 0);

/** The text of the same request without streaming and without a draft. */
async function undrafted(body) {
  const { stream, stream_options, speculation, ...rest } = body;
  const path = body.messages ? "/v1/chat/completions" : "/v1/completions";
  const response = await fetch(ROOT + path, {
    method: "POST",
    headers: { authorization: `Bearer ${KEY}`, "content-type": "application/json" },
    body: JSON.stringify({ ...rest, speculation: { drafter: "none" } }),
  });
  const [choice] = (await response.json()).choices;
  return choice.text ?? choice.message.content;
}

/** What a lane shows is what its stream says, and the stream's passes add up to its own statistics. */
function agrees(lane, chunks) {
  const choices = chunks.flatMap((chunk) => chunk.choices);
  const passes = choices.flatMap((choice) => choice.passes ?? []);
  const told = chunks.map((chunk) => chunk.speculation).filter(Boolean);
  assert.equal(told.length, 1);
  const [all] = told;
  const iterations = passes.filter((pass) => pass.iteration);
  assert.equal(iterations.length, all.iterations);
  assert.equal(sum(passes.map((pass) => pass.drafted)), all.drafted);
  assert.equal(sum(passes.map((pass) => pass.accepted)), all.accepted);
  assert.equal(lane.text, choices.map((choice) => choice.text ?? choice.delta.content ?? "").join(""));
  assert.equal(lane.origins.draft, all.accepted);
  const tokens = passes.flatMap((pass) => pass.tokens);
  assert.equal(sum(Object.values(lane.origins)), tokens.length);
  const longest = sum(passes.map((pass) => pass.lookahead));
  assert.deepEqual([lane.columns, lane.stood, lane.stood + lane.fell], [all.iterations, all.accepted, longest]);
  assert.equal(lane.numbers.Acceptance, all.drafted ? `${(100 * all.acceptance_rate).toFixed(1)} %` : "–");
  assert.equal(lane.numbers["Average SL"], all.mean_sl.toFixed(2));
  assert.equal(lane.numbers["Per target pass"], all.mean_emitted.toFixed(2));
  assert.equal(lane.numbers.Tokens, String(tokens.length));
  return all;
}

await check("key", "asks for one, says that a wrong one is wrong, then lists what is served", async () => {
  const page = await Page.open({ key: null });
  await page.tab.waitForSelector("#locked:not([hidden])");
  assert.equal(await page.tab.evaluate(() => document.activeElement.id), "key");
  assert.equal(await page.text("#status"), "The server wants an API key.");
  await page.tab.keyboard.type("wrong");
  await page.tab.keyboard.press("Enter");
  await page.tab.waitForSelector("#fault:not([hidden])");
  assert.match(await page.text("#fault"), /incorrect API key \(401\)/);
  await page.tab.fill("#key", KEY);
  await page.tab.press("#key", "Tab");
  await page.ready();
  assert.equal(await page.tab.inputValue("#model"), MODEL);
  assert.ok(await page.tab.isHidden("#fault"));
  assert.match(await page.text("#server"), /smollm2/);
  await page.close();
});

await check("stream", "a chat arrives piece by piece, each token with its origin, and all adds up", async () => {
  const page = await Page.open();
  await page.tab.fill("#prompt", FIELDS.prompt);
  await page.tab.fill("#max_tokens", "96");
  await page.tab.selectOption('[data-role="policy"]', "static");
  await page.tab.click("#run");
  const lengths = new Set();
  while (!/: done/.test(await page.text("#status"))) {
    lengths.add((await page.lanes())[0].text.length);
    await page.tab.waitForTimeout(20);
  }
  assert.ok(lengths.size > 5, `seen growing at ${lengths.size} lengths`);
  const [lane] = await page.ended();
  const told = agrees(lane, (await page.chunks())[0]);
  assert.equal(told.policy, "static");
  assert.ok(lane.origins.draft > 0 && lane.origins.correction > 0 && lane.origins.bonus > 0, JSON.stringify(lane.origins));
  assert.equal(lane.text, await undrafted(page.bodies[0]));
  await page.tab.click(".column >> nth=2");
  await shot(page, "page");
  await page.close();
});

await check("stream", "plain text is continued", async () => {
  const page = await Page.open();
  await page.tab.check('input[value="completion"]');
  const [lane] = await page.run({ prompt: "The capital of France is", max_tokens: 24 });
  assert.equal(page.bodies[0].prompt, "The capital of France is");
  agrees(lane, (await page.chunks())[0]);
  assert.equal(lane.text, await undrafted(page.bodies[0]));
  await page.close();
});

await check("stream", "a tree takes options of its own, and no policy", async () => {
  const page = await Page.open();
  await page.tab.selectOption('[data-role="drafter"]', "dyspec");
  assert.ok(await page.tab.isDisabled('[data-role="policy"]'));
  await page.tab.click("details:has([data-role=options]) summary");
  assert.equal(await page.tab.inputValue('[data-param="speculation.options.threshold"]'), "");
  await page.tab.fill('[data-param="speculation.options.budget"]', "12");
  const [lane] = await page.run({ prompt: "List some fruits.", max_tokens: 24 });
  assert.deepEqual(page.bodies[0].speculation, { drafter: "dyspec", options: { budget: 12 } });
  const told = agrees(lane, (await page.chunks())[0]);
  assert.deepEqual([told.drafter, told.policy], ["dyspec", "none"]);
  assert.ok(told.drafted > told.mean_sl * told.iterations);
  assert.equal(lane.text, await undrafted(page.bodies[0]));
  await page.close();
});

await check("stream", "without a drafter nothing is drafted", async () => {
  const page = await Page.open();
  await page.tab.selectOption('[data-role="drafter"]', "none");
  assert.ok(await page.tab.isDisabled('[data-role="policy"]'));
  const [lane] = await page.run({ prompt: "Hello", max_tokens: 12 });
  assert.deepEqual(page.bodies[0].speculation, { drafter: "none" });
  agrees(lane, (await page.chunks())[0]);
  assert.deepEqual([lane.origins.target, lane.numbers.Acceptance], [Number(lane.numbers.Tokens), "–"]);
  await page.close();
});

await check("compare", "two policies with one seed give one text, drawn at a temperature", async () => {
  const page = await Page.open({ scheme: "dark", height: 900 });
  await page.tab.check("#compare");
  const right = page.tab.locator(".choice").nth(1);
  await right.locator('[data-role="policy"]').selectOption("static");
  await right.locator("summary").click();
  await right.locator('[data-param="speculation.options.sl"]').fill("3");
  await right.locator("summary").click();
  const lanes = await page.run({ ...FIELDS, temperature: 0.7, seed: 7 });
  const chunks = await page.chunks();
  assert.deepEqual(page.bodies.map((body) => [body.seed, body.temperature]), [[7, 0.7], [7, 0.7]]);
  assert.deepEqual(page.bodies[1].speculation.options, { sl: 3 });
  assert.equal(page.bodies[0].speculation.options, undefined);
  const told = lanes.map((lane, index) => agrees(lane, chunks[index]));
  assert.notEqual(told[0].policy, told[1].policy);
  assert.equal(lanes[0].text, lanes[1].text);
  assert.match(await page.text("#verdict"), /^✓ Same text: all \d+ tokens are equal\. .* times as fast as .*, running at the same time\.$/);
  await shot(page, "compare");
  await page.close();
});

await check("compare", "one after the other; without a seed the verdict says whether the texts differ", async () => {
  const page = await Page.open();
  await page.tab.check("#compare");
  await page.tab.check("#turns");
  const lanes = await page.run({ prompt: "Once", temperature: 1.5, seed: "", max_tokens: 24 });
  assert.equal(page.bodies[0].seed, undefined);
  const same = lanes[0].text === lanes[1].text;
  const verdict = await page.text("#verdict");
  assert.match(verdict, same ? /^✓ Same text/ : /^✗ The texts differ from token \d+ on\. Without a seed each draws its own\./);
  assert.match(verdict, /one after the other\.$/);
  await page.close();
});

await check("stop", "the button ends the generation here and in the server", async () => {
  const page = await Page.open();
  await page.tab.fill("#prompt", LONG);
  await page.tab.fill("#max_tokens", String(LONG_TOKENS));
  await page.tab.click("#run");
  await page.tab.waitForFunction(() => document.querySelectorAll(".column").length > 3);
  await assertAtWork();
  await page.tab.click("#stop");
  const [lane] = await page.ended();
  assert.match(await page.text("#status"), /Answer: stopped after \d+ tokens/);
  await assertIdle();
  assert.equal((await page.lanes())[0].text, lane.text);
  assert.equal(await page.tab.evaluate(() => document.activeElement.id), "run");
  await page.close();
});

await check("error", "the server's words are shown and the field is marked", async () => {
  const page = await Page.open();
  page.expected.add(400);
  const [lane] = await page.run({ prompt: "Hello", temperature: 3 });
  assert.match(lane.fault, /temperature.*400.*Field: temperature/);
  assert.equal(await page.tab.getAttribute("#temperature", "aria-invalid"), "true");
  assert.match(await page.text("#status"), /failed/);
  assert.deepEqual(await page.barriers(), []);
  await page.tab.selectOption('[data-role="policy"]', "static");
  await page.tab.locator(".choice summary").click();
  await page.tab.fill('[data-param="speculation.options.sl"]', "99");
  const [next] = await page.run({ temperature: 0 });
  assert.match(next.fault, /options of policy 'static'.*invalid_option/);
  assert.equal(await page.tab.getAttribute('[data-param="speculation.options.sl"]', "aria-invalid"), "true");
  assert.equal(await page.tab.getAttribute("#temperature", "aria-invalid"), null);
  await page.tab.fill("#seed", "9007199254740993");
  await page.tab.click("#run");
  assert.match(await page.text("#fault"), /seed is too large/);
  await page.close();
});

await check("pace", "a long answer is as fast as its server: 4500 tokens at 300 a second", async () => {
  const page = await Page.open();
  let pace;
  const end = await standIn(page, async (send) => (pace = await paced(send, 4500, 300)));
  const [lane] = await page.run({ prompt: "Hello" });
  const shown = Number(lane.numbers["Tokens/s"]);
  console.error(`       sent at ${pace.toFixed(1)} tokens/s, shown ${shown}`);
  assert.ok(Math.abs(shown / pace - 1) < 0.05, `sent at ${pace} tokens a second, shown as ${shown}`);
  assert.deepEqual([lane.numbers.Tokens, lane.origins.correction, lane.columns], ["4500", 4500, 4500]);
  const below = await page.tab.$eval(".text", (text) => text.scrollHeight - text.scrollTop - text.clientHeight);
  assert.ok(below < 8, `the end of the text is ${below} pixels away`);
  end();
  await page.close();
});

await check("error", "within a stream: no status of success, and plain words for what is no JSON", async () => {
  const page = await Page.open();
  const error = { message: "the engine is gone", code: "engine_unavailable", param: null };
  for (const [data, words] of [
    [JSON.stringify({ error }), "Error: the engine is gone (engine_unavailable)."],
    ["<html>", "Error: the server sent what this page cannot read."],
    ["null", "Error: the server sent what this page cannot read."],
  ]) {
    const end = await standIn(page, (send) => [chunk("Once"), data].forEach(send));
    const [lane] = await page.run({ prompt: "Hello" });
    assert.deepEqual([lane.fault, lane.text], [words, "Once"]);
    end();
  }
  await page.close();
});

await check("looks", "a token that turns the writing around turns only itself around", async () => {
  const page = await Page.open();
  const end = await standIn(page, (send) => [..."ab", "\u202e", ..."cd", "[DONE]"].forEach((text) => send(text === "[DONE]" ? text : chunk(text))));
  await page.run({ prompt: "Hello" });
  const places = await page.tab.$$eval(".text .t", (tokens) => tokens.map((token) => token.getBoundingClientRect().left));
  assert.deepEqual(places, [...places].sort((a, b) => a - b));
  end();
  await page.close();
});

await check("key", "another one, while an answer comes, changes nothing of what was chosen", async () => {
  const page = await Page.open();
  let more;
  const end = await standIn(page, async (send) => {
    send(chunk("Once"));
    await new Promise((ended) => (more = ended));
    send("[DONE]");
  });
  await page.tab.selectOption('[data-role="policy"]', "static");
  await page.tab.locator(".choice summary").click();
  await page.tab.fill('[data-param="speculation.options.sl"]', "3");
  await page.tab.click("#run");
  await page.tab.waitForSelector(".column");
  const again = page.tab.waitForResponse("**/ready");
  await page.tab.fill("#key", `${KEY} `);
  await page.tab.fill("#key", KEY);
  await page.tab.$eval("#key", (field) => field.dispatchEvent(new Event("change")));
  await again;
  assert.ok(await page.tab.isDisabled("#run"));
  assert.equal(await page.tab.inputValue('[data-role="policy"]'), "static");
  assert.equal(await page.tab.inputValue('[data-param="speculation.options.sl"]'), "3");
  more();
  await page.ended();
  assert.ok(await page.tab.isEnabled("#run"));
  end();
  await page.close();
});

await check("keyboard", "all of it without a mouse", async () => {
  const page = await Page.open({ key: null });
  const { keyboard } = page.tab;
  const focused = () => page.tab.evaluate(() => document.activeElement.id || document.activeElement.dataset.role || document.activeElement.tagName);
  const tabTo = async (name) => {
    for (let i = 0; i < 40; i++) {
      if ((await focused()) === name) return;
      await keyboard.press("Tab");
    }
    assert.fail(`Tab does not reach ${name}`);
  };
  await page.tab.waitForSelector("#locked:not([hidden])");
  await keyboard.type(KEY);
  await keyboard.press("Tab");
  await page.ready();
  await tabTo("prompt");
  await keyboard.press("Control+A");
  await keyboard.type("Count from one to ten.");
  const order = [];
  for (let i = 0; i < 12; i++) {
    await keyboard.press("Tab");
    order.push(await focused());
    if (order.at(-1) === "run") break;
  }
  assert.deepEqual(order, ["model", "temperature", "seed", "max_tokens", "compare", "drafter", "policy", "max_sl", "SUMMARY", "run"]);
  await keyboard.press("Enter");
  await page.ended();
  await page.tab.waitForFunction(() => document.activeElement.id === "run");
  await tabTo("strip");
  await keyboard.press("End");
  const [lane] = await page.lanes();
  const chosen = () => page.tab.$eval('.column[aria-selected="true"]', (column) => [column.id, column.ariaLabel]);
  const [id, words] = await chosen();
  assert.ok(words.startsWith(`Iteration ${lane.columns}:`), words);
  assert.equal(await page.tab.getAttribute(".strip", "aria-activedescendant"), id);
  await keyboard.press("ArrowLeft");
  assert.ok((await chosen())[1].startsWith(`Iteration ${lane.columns - 1}:`));
  assert.ok((await page.text(".detail")).startsWith(`Iteration ${lane.columns - 1}:`));
  assert.equal(await page.tab.locator(".pass.on").count(), 1);
  await keyboard.press("Tab");
  await keyboard.press("Enter");
  await page.tab.waitForSelector(".lane tbody tr"); // a browser tells of an opened part a moment later
  assert.equal(await page.tab.locator(".lane tbody tr").count(), lane.columns);
  await keyboard.press("Shift+Tab");
  await page.tab.fill("#max_tokens", String(LONG_TOKENS));
  await keyboard.press("Control+Enter");
  await page.tab.waitForSelector(".column");
  await keyboard.press("Escape");
  await page.ended();
  assert.match(await page.text("#status"), /stopped/);
  await assertIdle();
  await page.close();
});

await check("looks", "no barrier that axe calls serious or critical, light and dark, wide and narrow", async () => {
  for (const scheme of ["light", "dark"]) {
    for (const width of [1280, 360]) {
      const page = await Page.open({ scheme, width, key: null });
      await page.tab.waitForSelector("#locked:not([hidden])");
      assert.deepEqual(await page.barriers(), [], `${scheme} ${width}, locked`);
      await page.tab.fill("#key", KEY);
      await page.tab.press("#key", "Tab");
      await page.ready();
      await page.tab.check("#compare");
      await page.run({ ...FIELDS, max_tokens: 32 });
      for (const summary of await page.tab.locator("summary").all()) await summary.click();
      await page.tab.click(".column >> nth=1");
      assert.deepEqual(await page.barriers(), [], `${scheme} ${width}, with answers`);
      const over = await page.tab.evaluate(() => document.documentElement.scrollWidth - innerWidth);
      assert.ok(over <= 0, `${scheme} ${width}: ${over} pixels too wide`);
      await page.close();
    }
  }
});

await check("looks", "narrow screens have it one below the other", async () => {
  const page = await Page.open({ width: 390, height: 1400 });
  await page.run({ ...FIELDS, max_tokens: 64 });
  assert.notEqual(await page.tab.$eval(".text", (text) => getComputedStyle(text).maxHeight), "none");
  await page.tab.evaluate(() => document.getElementById("results").scrollIntoView());
  await shot(page, "narrow");
  await page.close();
});

await check("looks", "the theme can be chosen, and stays", async () => {
  const page = await Page.open({ scheme: "light" });
  const back = () => page.tab.evaluate(() => getComputedStyle(document.documentElement).backgroundColor);
  const light = await back();
  await page.tab.selectOption("#theme", "dark");
  const dark = await back();
  assert.notEqual(dark, light);
  await page.tab.reload();
  assert.deepEqual([await back(), await page.tab.inputValue("#theme")], [dark, "dark"]);
  await page.tab.selectOption("#theme", "");
  assert.equal(await back(), light);
  await page.close();
});

await check("server", "one that is not there is waited for", async () => {
  const page = await Page.open();
  await page.tab.route("**/v1/policies", (route) => route.abort("connectionrefused"), { times: 1 });
  page.tab.removeAllListeners("console"); // the browser says that it was refused
  await page.tab.fill("#key", `${KEY} `);
  await page.tab.press("#key", "Tab");
  await page.tab.waitForFunction(() => /Waiting for the server/.test(document.getElementById("status").textContent));
  await page.ready();
  await page.close();
});

const version = browser.version();
await browser.close();
console.error(`Chromium ${version}; a check may take ${LATE / 1000} s`);
finish("the page", "playwright-core", "axe-core");
