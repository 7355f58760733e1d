// The live page in a browser: opening it, waiting for it, reading it, and what it must never do.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { chromium } from "playwright-core";
import { KEY, ROOT } from "./served.mjs";

const FLAGS = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"];
const QUIET = ["--disable-component-update", "--disable-sync", "--mute-audio"];
const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
export const LATE = 240_000; // milliseconds for an answer on a machine that is busy

const root = process.getuid?.() === 0 ? ["--no-sandbox"] : []; // Chromium has no sandbox for root
export const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: [...FLAGS, ...QUIET, ...root],
});

/** Within the page: keeps a copy of each streamed answer, by the order of the requests. */
function listen() {
  const { fetch } = window;
  window.heard = [];
  window.fetch = (path, init) => {
    const answer = fetch(path, init);
    if (init?.method === "POST") window.heard.push(answer.then((response) => response.clone().text()).catch(() => ""));
    return answer;
  };
}

/** One page in a context of its own. */
export class Page {
  static async open({ width = 1280, height = 860, scheme = "light", key = KEY } = {}) {
    const context = await browser.newContext({ viewport: { width, height }, colorScheme: scheme });
    await context.addInitScript(listen);
    const own = new Page(await context.newPage());
    await own.tab.goto(`${ROOT}/`);
    if (key) {
      await own.tab.waitForSelector("#locked:not([hidden])");
      await own.tab.fill("#key", key);
      await own.tab.press("#key", "Tab");
      await own.ready();
    }
    return own;
  }

  constructor(tab) {
    this.tab = tab;
    this.faults = []; // errors of the console and of scripts, and requests to elsewhere
    this.expected = new Set([401]); // statuses that the browser may report: the first request has no key
    this.bodies = []; // of the requests that generate
    tab.setDefaultTimeout(LATE);
    tab.on("console", (message) => this.#console(message));
    tab.on("pageerror", (error) => this.faults.push(`script: ${error.message}`));
    tab.on("request", (request) => {
      if (new URL(request.url()).origin !== ROOT) this.faults.push(`asks ${request.url()}`);
      if (request.method() === "POST") this.bodies.push(request.postDataJSON());
    });
  }

  #console(message) {
    if (!["error", "warning"].includes(message.type())) return;
    const status = Number(/responded with a status of (\d+)/.exec(message.text())?.[1]);
    if (!this.expected.has(status)) this.faults.push(`console: ${message.text()}`);
  }

  async ready() {
    await this.tab.waitForFunction(() => !document.getElementById("run").disabled);
  }

  /** The lanes once all that runs has ended. */
  async ended() {
    await this.tab.waitForFunction(
      () => /: (done|stopped|failed)/.test(document.getElementById("status").textContent),
    );
    return this.lanes();
  }

  async run(fields = {}) {
    this.bodies.length = 0;
    await this.tab.evaluate(() => (heard.length = 0));
    for (const [id, value] of Object.entries(fields)) await this.tab.fill(`#${id}`, String(value));
    await this.tab.click("#run");
    return this.ended();
  }

  /** What each lane shows. */
  lanes() {
    return this.tab.$$eval(".lane", (lanes) =>
      lanes.map((lane) => {
        const texts = (selector) => [...lane.querySelectorAll(selector)].map((each) => each.textContent);
        const count = (selector) => lane.querySelectorAll(selector).length;
        const tiles = [...lane.querySelectorAll("dl div")];
        return {
          title: texts("h2 span")[0],
          text: lane.querySelector(".text").textContent,
          fault: lane.querySelector(".fault:not([hidden])")?.textContent ?? null,
          numbers: Object.fromEntries(tiles.map((tile) => [tile.dataset.name, tile.querySelector("dd").textContent])),
          origins: Object.fromEntries(["draft", "correction", "bonus", "target"].map((kind) => [kind, count(`.t.${kind}`)])),
          columns: count(".column"),
          stood: count(".stood"),
          fell: count(".fell"),
        };
      }),
    );
  }

  /** The chunks of the streams of the last run, in the order of their requests. */
  async chunks() {
    const bodies = await this.tab.evaluate(() => Promise.all(heard));
    return bodies.map((body) => {
      const data = body.split("\n").filter((line) => line.startsWith("data: {"));
      return data.map((line) => JSON.parse(line.slice(6)));
    });
  }

  text(selector) {
    return this.tab.textContent(selector);
  }

  /** What axe finds serious or critical, in a line each. */
  async barriers() {
    await this.tab.evaluate(AXE);
    const { violations } = await this.tab.evaluate(() => axe.run());
    const grave = violations.filter(({ impact }) => ["serious", "critical"].includes(impact));
    return grave.map(({ id, nodes }) => `${id}: ${nodes.map((node) => node.target.join(" ")).slice(0, 3).join(", ")}`);
  }

  /** Throws for anything that the page must never do. */
  async close() {
    await this.tab.context().close();
    if (this.faults.length) throw new Error(this.faults.join("\n"));
  }
}
