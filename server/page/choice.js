// Who drafts and who stops: the part of the form for one lane, made of GET /v1/policies.

let made = 0;

/** One lane's choice of drafter, policy, options and SL. */
export class Choice {
  constructor(template, offer) {
    this.root = template.content.cloneNode(true).firstElementChild;
    this.part = (role) => this.root.querySelector(`[data-role="${role}"]`);
    this.offer = offer;
    this.fields = [];
    this.part("drafter").append(...offer.drafters.map((name) => new Option(name)));
    this.part("drafter").value = offer.default.drafter;
    this.part("max_sl").max = offer.max_sl;
    this.part("max_sl").placeholder = `the server’s: ${offer.max_sl}`;
    this.part("drafter").addEventListener("change", () => this.#listPolicies());
    this.part("policy").addEventListener("change", () => this.#listOptions());
    this.#listPolicies();
  }

  set title(text) {
    this.root.querySelector("legend").textContent = text;
  }

  get policy() {
    return this.part("policy").value;
  }

  set policy(name) {
    this.part("policy").value = name;
    this.#listOptions();
  }

  /** Takes over what was chosen before, where it is still offered. */
  keep(before) {
    const [drafter, max] = ["drafter", "max_sl"].map((role) => before.part(role).value);
    if (this.offer.drafters.includes(drafter)) this.part("drafter").value = drafter;
    this.part("max_sl").value = max;
    this.#listPolicies();
    const offered = [...this.part("policy").options].some((option) => option.value === before.policy && !option.disabled);
    if (!offered) return;
    this.policy = before.policy;
    for (const old of before.fields.filter((field) => field.changed)) {
      const field = this.fields.find((each) => each.name === old.name && each.input.type === old.input.type);
      if (field) Object.assign(field.input, { value: old.input.value, checked: old.input.checked });
    }
  }

  /** The drafter chosen, if it drafts trees: then the options are its own, and no policy stops it. */
  get trees() {
    const drafter = this.part("drafter").value;
    return this.offer.trees.find(({ name }) => name === drafter);
  }

  /** The policies that may govern the drafter chosen; the others are listed with the reason. */
  #listPolicies() {
    const drafter = this.part("drafter").value;
    const select = this.part("policy");
    const before = select.value || this.offer.default.policy;
    const off = drafter === "none" || Boolean(this.trees);
    select.replaceChildren(
      ...this.offer.policies.map(({ name, unavailable }) => {
        const option = new Option(unavailable[drafter] ? `${name} (not with ${drafter})` : name, name);
        option.disabled = Boolean(unavailable[drafter]);
        option.title = unavailable[drafter] ?? "";
        return option;
      }),
    );
    select.disabled = off;
    const free = [...select.options].filter((option) => !option.disabled).map((option) => option.value);
    select.value = free.includes(before) ? before : (free[0] ?? "");
    this.#listOptions();
  }

  #listOptions() {
    const drafter = this.part("drafter").value;
    const { trees } = this;
    const policy = this.offer.policies.find((each) => each.name === this.policy);
    const governs = trees ?? (drafter === "none" ? undefined : policy);
    const { properties = {} } = governs ? resolved(governs.options) : {};
    const { default: first } = this.offer;
    const given = (trees ? drafter === first.drafter : this.policy === first.policy) ? first.options : {};
    this.fields = Object.entries(properties).map(([name, schema]) => new Field(name, schema, given[name]));
    this.part("options").replaceChildren(...this.fields.map((field) => field.root));
    this.root.querySelector("details").hidden = this.fields.length === 0;
    const barred = this.offer.policies.filter((each) => each.unavailable[drafter]).map((each) => each.name);
    const why = barred.length ? `Not with this drafter: ${barred.join(", ")}.` : "";
    const nothing = "Nothing is drafted: each pass of the target gives one token.";
    const grown = "Drafts trees, which end by their own rule; the most draft tokens bound their depth.";
    this.part("about").textContent = trees ? grown : drafter === "none" ? nothing : why;
  }

  /** The request's field `speculation`. Throws a RangeError that names what is no number. */
  value() {
    const drafter = this.part("drafter").value;
    const chosen = { drafter };
    const most = number(this.part("max_sl"), "the most draft tokens");
    if (most !== undefined) chosen.max_sl = most;
    if (drafter === "none") return chosen;
    if (!this.trees) chosen.policy = this.policy;
    if (this.fields.some((field) => field.changed)) {
      // options in a request take the place of the server's, so all that differ from the policy's own go along
      const values = this.fields.map((field) => [field.name, field.value()]);
      chosen.options = Object.fromEntries(values.filter(([, value]) => value !== undefined));
    }
    return chosen;
  }
}

/** An option, as its JSON schema has it: a checkbox, a list or a number, which is empty for null. */
class Field {
  constructor(name, schema, given) {
    this.name = name;
    this.schema = schema = filled(schema);
    this.first = given ?? schema.default;
    this.root = document.createElement("div");
    const label = this.root.appendChild(document.createElement("label"));
    this.input = control(schema);
    this.input.dataset.param = `speculation.options.${name}`;
    const hint = document.createElement("small");
    hint.textContent = plain(schema.description);
    hint.id = `hint-${++made}`;
    this.input.setAttribute("aria-describedby", hint.id);
    if (schema.type === "boolean") {
      label.className = "check";
      this.input.checked = Boolean(this.first);
      label.append(this.input, name);
    } else {
      this.input.value = this.first ?? "";
      label.append(name, this.input);
    }
    this.root.append(hint);
  }

  get changed() {
    const same = this.schema.type === "boolean" ? this.input.checked === Boolean(this.first) : this.input.value === String(this.first ?? "");
    return !same || this.input.validity.badInput;
  }

  /** Undefined where it is the default of the policy, or of the trees. */
  value() {
    let value = this.input.value;
    if (this.schema.type === "boolean") value = this.input.checked;
    else if (this.input.type === "number") value = number(this.input, this.name);
    return value === this.schema.default ? undefined : value;
  }
}

function control(schema) {
  if (schema.enum) {
    const select = document.createElement("select");
    select.append(...schema.enum.map((value) => new Option(value)));
    return select;
  }
  const input = document.createElement("input");
  const numeric = schema.type === "integer" || schema.type === "number";
  input.type = schema.type === "boolean" ? "checkbox" : numeric ? "number" : "text";
  if (numeric) {
    input.step = schema.type === "integer" ? "1" : "any";
    for (const [key, bound] of [["min", schema.minimum], ["max", schema.maximum]]) if (bound !== undefined) input[key] = bound;
  }
  return input;
}

/** The number in a field; undefined if it is empty. Throws a RangeError for what is no number. */
export function number(input, name) {
  const value = input.valueAsNumber;
  if (input.validity.badInput) throw Object.assign(new RangeError(`${name} is not a number`), { input });
  if (Number.isNaN(value)) return undefined;
  if (Number.isInteger(value) && !Number.isSafeInteger(value)) {
    throw Object.assign(new RangeError(`${name} is too large for this page`), { input });
  }
  return value;
}

/** A schema that is a reference to one of its own definitions, as that definition. */
function resolved(schema) {
  const name = schema.$ref?.split("/").pop();
  return name ? schema.$defs[name] : schema;
}

/** A schema of something or null, as that of the something. */
function filled(schema) {
  const some = schema.anyOf?.find(({ type }) => type !== "null");
  return some ? { ...schema, ...some } : schema;
}

function plain(text = "") {
  return text.replaceAll("`", "");
}
