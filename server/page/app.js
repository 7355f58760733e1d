// The page: what is asked for, of whom, and when it ends.

import { ApiError, get, stream } from "./api.js";
import { Choice, number } from "./choice.js";
import { Lane } from "./lane.js";
import { firstDifference } from "./tally.js";

const $ = (id) => document.getElementById(id);
const NAMES = ["Left", "Right"];

let choices = []; // of the two lanes; the second is asked only to compare
let lanes = [];
let served = false; // there are models to ask
let running = null; // the AbortController of what runs

// ---- what the server has

async function load() {
  clearMarks();
  try {
    const key = $("key").value;
    const [models, offer] = await Promise.all([get("v1/models", key), get("v1/policies", key)]);
    const model = $("model").value;
    $("model").replaceChildren(...models.data.map(({ id }) => new Option(id, id, false, id === model)));
    const before = choices;
    choices = NAMES.map(() => new Choice($("choice"), offer));
    choices[1].policy = offer.policies.find(({ name }) => name === "static") ? "static" : offer.default.policy;
    before.forEach((choice, index) => choices[index].keep(choice));
    showChoices();
    $("fault").hidden = true;
    served = true;
    allow();
    const ready = await get("ready", key);
    $("server").textContent = `${ready.target}, draft ${ready.draft ?? "none"}, on ${ready.device}`;
  } catch (error) {
    served = false;
    allow();
    unserved(error);
  }
}

/** No models: for want of a key, because they still load, or for a reason that is shown. */
function unserved(error) {
  if (!(error instanceof ApiError)) throw error;
  $("server").textContent = "not connected";
  if (error.status === 401) {
    const given = $("key").value !== "";
    $("locked").hidden = false;
    if (given) showFault(error);
    else say("The server wants an API key.");
    $("key").focus();
  } else if (error.status === 503 || error.status === 0) {
    say(`Waiting for the server: ${error.message}.`);
    setTimeout(load, 1000 * (Number(error.retryAfter) || 2));
  } else {
    showFault(error);
  }
}

function showChoices() {
  const both = $("compare").checked;
  $("turns-line").hidden = !both;
  choices.forEach((choice, index) => {
    choice.title = both ? `${NAMES[index]}: who drafts, who stops` : "Who drafts, who stops";
  });
  $("choices").replaceChildren(...choices.slice(0, both ? 2 : 1).map((choice) => choice.root));
}

// ---- one run

/** Path and body of the request, but for its speculation. Throws a RangeError. */
function asked() {
  const chat = document.querySelector('input[name="mode"]:checked').value === "chat";
  const body = { model: $("model").value, stream_options: { include_speculation: true } };
  if (chat) body.messages = [{ role: "user", content: $("prompt").value }];
  else body.prompt = $("prompt").value;
  for (const name of ["temperature", "seed", "max_tokens"]) body[name] = number($(name), name);
  return [chat ? "v1/chat/completions" : "v1/completions", body];
}

async function run() {
  if (running || $("run").disabled) return;
  clearMarks();
  const used = choices.slice(0, $("compare").checked ? 2 : 1);
  let requests;
  try {
    const [path, body] = asked();
    requests = used.map((choice) => [path, { ...body, speculation: choice.value() }]);
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    mark(error.input, "fault");
    showFault(error);
    return;
  }
  lanes = used.map((_, index) => new Lane($("lane"), used.length > 1 ? NAMES[index] : "Answer"));
  $("lanes").replaceChildren(...lanes.map((lane) => lane.root));
  $("lanes").classList.toggle("two", lanes.length > 1);
  $("verdict").textContent = "";
  running = new AbortController();
  working(true);
  say("Generating…");
  if ($("results").getBoundingClientRect().top > innerHeight / 2) $("results").scrollIntoView();
  const { signal } = running;
  const follow = (lane, index) => lane.follow(stream(...requests[index], $("key").value, signal));
  if ($("turns").checked) for (const [index, lane] of lanes.entries()) await follow(lane, index);
  else await Promise.all(lanes.map(follow));
  running = null;
  working(false);
  say(lanes.map((lane) => lane.summary()).join(" "));
  lanes.forEach((lane) => lane.error && blame(lane));
  if (lanes.length > 1) judge(...lanes, requests[0][1]);
}

/** What may be pressed now. */
function allow() {
  $("run").disabled = !served || running !== null;
  $("stop").disabled = running === null;
}

function working(on) {
  allow();
  if (on && document.activeElement === $("run")) $("stop").focus();
  if (!on && [$("stop"), document.body].includes(document.activeElement)) $("run").focus();
}

/** Whether both texts are the same, which they must be where nothing is left to chance; and who was faster. */
function judge(left, right, body) {
  const verdict = $("verdict");
  if (left.state !== "done" || right.state !== "done") return;
  const [a, b] = [left.tally, right.tally];
  const place = firstDifference(a.ids, b.ids);
  const bound = body.temperature === 0 || body.seed !== undefined;
  let words = `✓ Same text: all ${a.tokens} tokens are equal.`;
  if (place >= 0) {
    words = `✗ The texts differ from token ${place + 1} on.`;
    words += bound ? " In float32 they would be the same." : " Without a seed each draws its own.";
  }
  if (a.speed && b.speed) {
    const [fast, slow] = a.speed >= b.speed ? [left, right] : [right, left];
    const times = (fast.tally.speed / slow.tally.speed).toFixed(2);
    const how = $("turns").checked ? "one after the other" : "running at the same time";
    words += ` ${fast.title} was ${times} times as fast as ${slow.title.toLowerCase()}, ${how}.`;
  }
  verdict.textContent = words;
  verdict.className = place < 0 ? "same" : "different";
}

// ---- what is said, and what is marked

function say(words) {
  $("status").textContent = words;
}

function showFault(error) {
  $("fault").textContent = `Error: ${error.message}${error.status ? ` (${error.status})` : ""}.`;
  $("fault").hidden = false;
}

/** Marks the field that the server's error names. */
function blame(lane) {
  let param = (lane.error.param ?? "").replace(/\[.*/, "");
  if (param === "speculation.options") param += `.${/\$\.(\w+)/.exec(lane.error.message)?.[1]}`;
  if (!param) return;
  const form = [...$("ask").querySelectorAll("[data-param]")];
  const own = choices[lanes.indexOf(lane)].root;
  const fields = form.filter((field) => field.dataset.param.split(" ").includes(param));
  const field = fields.find((each) => own.contains(each)) ?? fields[0];
  if (field) mark(field, lane.part("fault").id);
}

function mark(field, by) {
  field.closest("details")?.setAttribute("open", "");
  field.ariaInvalid = "true";
  field.setAttribute("aria-errormessage", by);
}

function clearMarks() {
  for (const field of $("ask").querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-errormessage");
  }
  $("fault").hidden = true;
}

// ---- wiring

function theme(name) {
  if (name) document.documentElement.dataset.theme = name;
  else delete document.documentElement.dataset.theme;
}

try {
  $("theme").value = localStorage.getItem("disco-theme") ?? "";
} catch {
  // no storage in this browser: the choice lasts as long as the page
}
theme($("theme").value);
$("theme").addEventListener("change", () => {
  theme($("theme").value);
  try {
    localStorage.setItem("disco-theme", $("theme").value);
  } catch {
    // as above
  }
});
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
$("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run();
});
for (const mode of document.querySelectorAll('input[name="mode"]')) {
  mode.addEventListener("change", () => {
    $("prompt-label").textContent = mode.value === "chat" ? "Message" : "Text to continue";
  });
}
$("compare").addEventListener("change", showChoices);
$("key").addEventListener("change", load);
allow();
load();
