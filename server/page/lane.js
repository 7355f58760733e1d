// One answer on the page: its text by origin, its numbers, and the strip of its iterations.

import { Tally, inWords } from "./tally.js";

const STRIP = 96; // pixels that the longest draft of the strip may take
const REFRESH = 100; // milliseconds between new numbers
const REST = 4; // times as long as the last drawing took, before the next: the longer the text, the rarer
const REORDERS = /[\u202a-\u202e\u2066-\u2069]/; // what would turn the tokens after it around, too

let made = 0;

export class Lane {
  constructor(template, title) {
    this.id = `lane-${++made}`;
    this.root = template.content.cloneNode(true).firstElementChild;
    this.part = (role) => this.root.querySelector(`[data-role="${role}"]`);
    this.title = title;
    this.part("title").textContent = title;
    this.part("text").setAttribute("aria-label", `Text: ${title}`);
    this.part("scroll").setAttribute("aria-label", `Table of iterations: ${title}`);
    this.part("fault").id = `${this.id}-fault`;
    this.part("strip").addEventListener("keydown", (event) => this.#move(event));
    this.part("strip").addEventListener("click", (event) => this.#select(event.target.closest(".column")));
    this.part("more").addEventListener("toggle", () => this.#listRows());
    this.columns = []; // of the iterations, in the strip
    this.groups = []; // of the same, in the text
    this.longest = 0;
    this.undrawn = []; // passes that came since the last drawing
    this.waits = false; // for its next frame
    this.tally = new Tally(performance.now());
    this.state = "waiting"; // then running; then done, stopped or failed
    this.#showNumbers();
  }

  /** Shows an answer's chunks as they come. Faults are shown, and left in `state`. */
  async follow(chunks) {
    this.tally = new Tally(performance.now());
    this.state = "running";
    this.part("text").setAttribute("aria-busy", "true");
    const clock = setInterval(() => this.#showNumbers(), REFRESH);
    try {
      for await (const { chunk, at } of chunks) this.#take(chunk, at);
      this.state = "done";
    } catch (error) {
      this.state = error.name === "AbortError" ? "stopped" : "failed";
      if (this.state === "failed") this.fail(error);
    } finally {
      clearInterval(clock);
      this.#draw();
      this.part("text").removeAttribute("aria-busy");
      this.#showNumbers();
      this.#listRows();
    }
  }

  /** Says what went wrong, in the server's own words, and marks the field at fault. */
  fail(error) {
    this.state = "failed";
    const fault = this.part("fault");
    const where = error.param ? ` Field: ${error.param}.` : "";
    const codes = [error.status, error.code].filter(Boolean).join(", ");
    const what = codes ? ` (${codes})` : "";
    fault.textContent = `Error: ${error.message.replace(/\.$/, "")}${what}.${where}`;
    fault.hidden = false;
    this.error = error;
  }

  #take(chunk, at) {
    this.undrawn.push(...this.tally.take(chunk, at));
    if (this.waits) return;
    this.waits = true;
    requestAnimationFrame(() => this.#frame());
  }

  /** Draws, and rests in proportion to what the drawing took, so that the page never falls behind. */
  #frame() {
    const begun = performance.now();
    this.#draw();
    setTimeout(() => {
      setTimeout(() => {
        this.waits = this.undrawn.length > 0;
        if (this.waits) requestAnimationFrame(() => this.#frame());
      }, REST * (performance.now() - begun));
    });
  }

  /** Draws what came since the last time: reads the layout first, and once. */
  #draw() {
    const text = this.part("text");
    const strip = this.part("strip");
    const textAtEnd = text.scrollHeight - text.scrollTop - text.clientHeight < 8;
    const stripAtEnd = strip.scrollWidth - strip.scrollLeft - strip.clientWidth < 24;
    const passes = this.undrawn.splice(0);
    text.append(...passes.map((pass) => this.#tokens(pass)));
    strip.append(...passes.filter((pass) => pass.iteration).map((pass) => this.#column(pass)));
    if (textAtEnd) text.scrollTop = text.scrollHeight;
    if (stripAtEnd) strip.scrollLeft = strip.scrollWidth;
    const { told } = this.tally;
    if (told) this.part("who").textContent = who(told);
  }

  #tokens(pass) {
    const group = document.createElement("span");
    group.className = "pass";
    for (const { text, origin } of pass.tokens) {
      const token = document.createElement("span");
      token.className = `t ${origin}`;
      if (/^\n+$/.test(text)) token.classList.add("break");
      if (REORDERS.test(text)) token.classList.add("apart");
      token.textContent = text;
      group.append(token);
    }
    if (pass.iteration) this.groups.push(group);
    return group;
  }

  // ---- numbers

  #showNumbers() {
    const { tally } = this;
    const rows = [
      ["Acceptance", percent(tally.acceptance), "of drafted"],
      ["Average SL", fixed(tally.averageSl, 2), "per iteration"],
      ["Tokens/s", fixed(tally.speed, 1), "after the first"],
      ["Per target pass", fixed(tally.perPass, 2), "tokens emitted"],
      ["Tokens", String(tally.tokens), tally.finish ? `ended by ${tally.finish}` : this.state],
      ["First token", tally.firstSeconds === null ? "–" : `${fixed(tally.firstSeconds * 1000, 0)} ms`, "seen from here"],
    ];
    this.part("numbers").replaceChildren(
      ...rows.map(([name, value, note]) => {
        const tile = document.createElement("div");
        for (const [kind, words] of [["dt", name], ["dd", value], ["dd", note]]) {
          tile.appendChild(document.createElement(kind)).textContent = words;
        }
        tile.dataset.name = name;
        return tile;
      }),
    );
  }

  /** The end in a sentence, for the status line. */
  summary() {
    const { tally } = this;
    if (this.state === "failed") return `${this.title}: failed.`;
    const ended = this.state === "stopped" ? "stopped after" : "done,";
    const rate = tally.drafted ? `, acceptance ${percent(tally.acceptance)}` : "";
    const speed = tally.speed ? `, ${fixed(tally.speed, 1)} tokens per second` : "";
    return `${this.title}: ${ended} ${tally.tokens} tokens${rate}${speed}.`;
  }

  // ---- the strip

  #column(pass) {
    const strip = this.part("strip");
    if (!this.columns.length) {
      const label = `Iterations: ${this.title}`;
      Object.assign(strip, { role: "listbox", tabIndex: 0, ariaLabel: label, ariaOrientation: "horizontal" });
    }
    const column = document.createElement("span");
    column.className = "column";
    column.role = "option";
    column.id = `${this.id}-${this.columns.length + 1}`;
    column.ariaSelected = "false";
    column.ariaLabel = inWords(pass, this.columns.length + 1);
    for (let i = 0; i < pass.lookahead; i++) {
      column.append(cell(i < pass.accepted ? "stood" : "fell"));
    }
    const own = pass.tokens.find((token) => token.origin !== "draft");
    if (own) column.append(cell(`own ${own.origin}`));
    this.columns.push({ column, pass });
    if (pass.lookahead > this.longest) {
      this.longest = pass.lookahead;
      strip.style.setProperty("--cell", `${Math.max(2, Math.min(9, STRIP / this.longest - 2))}px`);
    }
    return column;
  }

  #move(event) {
    const last = this.columns.length - 1;
    const at = this.columns.findIndex(({ column }) => column === this.selected);
    const to = { ArrowRight: at + 1, ArrowLeft: at < 0 ? last : at - 1, Home: 0, End: last }[event.key];
    if (to === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    this.#select(this.columns[Math.max(0, Math.min(last, to))]?.column);
  }

  #select(column) {
    const index = this.columns.findIndex((each) => each.column === column);
    if (index < 0) return;
    const before = this.columns.findIndex((each) => each.column === this.selected);
    if (before >= 0) {
      this.selected.ariaSelected = "false";
      this.groups[before].classList.remove("on");
    }
    this.selected = column;
    column.ariaSelected = "true";
    this.groups[index].classList.add("on");
    this.part("strip").setAttribute("aria-activedescendant", column.id);
    column.scrollIntoView({ block: "nearest", inline: "nearest" });
    const { pass } = this.columns[index];
    const times = ` Draft ${ms(pass.draft_seconds)}, verify ${ms(pass.verify_seconds)}.`;
    this.part("detail").textContent = `${inWords(pass, index + 1)}.${times}`;
  }

  #listRows() {
    if (!this.part("more").open) return;
    this.part("rows").replaceChildren(
      ...this.columns.map(({ pass }, index) => {
        const row = document.createElement("tr");
        const stood = pass.tokens.filter((token) => token.origin === "draft").map((token) => token.text);
        const own = pass.tokens.find((token) => token.origin !== "draft");
        const cells = [index + 1, pass.drafted, pass.accepted, pass.stop_reason ?? "–", shown(stood.join("")), own ? `${shown(own.text)} (${own.origin})` : "–"];
        cells.forEach((words, i) => {
          const each = row.appendChild(document.createElement(i ? "td" : "th"));
          if (!i) each.scope = "row";
          each.textContent = words;
        });
        return row;
      }),
    );
  }
}

function who({ drafter, policy }) {
  if (drafter === "none") return "no draft";
  return policy === "none" ? `drafter ${drafter}` : `${policy}, drafter ${drafter}`;
}

function cell(kind) {
  const square = document.createElement("i");
  square.className = kind;
  return square;
}

function fixed(value, digits) {
  return value === null || !Number.isFinite(value) ? "–" : value.toFixed(digits);
}

function percent(value) {
  return value === null ? "–" : `${fixed(value * 100, 1)} %`;
}

function ms(seconds) {
  return `${fixed(seconds * 1000, 1)} ms`;
}

function shown(text) {
  return text.replaceAll("\n", "⏎");
}
