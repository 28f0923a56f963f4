// One set of sampling settings: its fields, and what they say in a request.

import { ApiError } from "./api.js";
import { element } from "./dom.js";

const NUMBERS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, value: 0.8, hint: "0: greedy" },
  { name: "top_p", label: "Top p", min: 0.05, max: 1, step: 0.05, value: 0.95 },
  { name: "top_k", label: "Top k", min: 0, max: 200, step: 1, value: 0, hint: "0: off" },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01, value: 0 },
  { name: "max_tokens", label: "Max tokens", min: 1, max: 1024, step: 1, value: 200 },
];

const MORE_NUMBERS = [
  { name: "typical_p", label: "Typical p", min: 0.05, max: 1, step: 0.05, value: 1 },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.5, max: 2, step: 0.05, value: 1 },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1, value: 0 },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1, value: 0 },
  { name: "min_tokens", label: "Min tokens", min: 0, max: 1024, step: 1, value: 0 },
];

const TEXTS = [
  { name: "stop", label: "Stop at", hint: "a text that ends the answer", read: (text) => [text] },
  { name: "stop_token_ids", label: "Stop at token ids", hint: "2, 13", read: ids },
  { name: "banned_token_ids", label: "Never these token ids", hint: "5, 6", read: ids },
  { name: "allowed_token_ids", label: "Only these token ids", hint: "all", read: ids },
  { name: "logit_bias", label: "Logit bias", hint: "70: 2.5, 71: -100", read: biases },
];

const SWITCHES = [
  { name: "ignore_eos", label: "Go on past the model's end" },
  { name: "include_stop_str_in_output", label: "Keep the stop text" },
];

export class Settings {
  // `prefix` parts the ids of one set's fields from another's.
  constructor(container, prefix) {
    this.prefix = prefix;
    this.fields = new Map();
    this.model = element("select");
    this.modelField = this.labelled("model", "Model", this.model);
    this.modelField.hidden = true;
    const more = element("details", "more", element("summary", "", "More settings"));
    more.append(
      ...MORE_NUMBERS.map((setting) => this.number(setting)),
      ...TEXTS.map((setting) => this.text(setting)),
      ...SWITCHES.map((setting) => this.toggle(setting)),
    );
    container.append(
      this.modelField, ...NUMBERS.map((setting) => this.number(setting)), more,
    );
  }

  labelled(name, title, node, className = "field") {
    node.id = `${this.prefix}${name}`;
    const label = element("label", className, element("span", "", title), node);
    label.htmlFor = node.id;
    this.fields.set(name, node);
    return label;
  }

  number(setting) {
    const [range, number] = ["range", "number"].map((type) => input(type, setting));
    const label = this.labelled(setting.name, setting.label, number);
    if (setting.hint) label.firstChild.append(element("small", "", ` ${setting.hint}`));
    range.setAttribute("aria-label", `${setting.label}, as a slider`);
    range.addEventListener("input", () => (number.value = range.value));
    number.addEventListener("input", () => (range.value = number.value));
    label.append(range);
    return label;
  }

  text({ name, label, hint }) {
    const node = element("input");
    Object.assign(node, { type: "text", placeholder: hint, autocomplete: "off" });
    return this.labelled(name, label, node);
  }

  toggle({ name, label }) {
    const node = element("input");
    node.type = "checkbox";
    return this.labelled(name, label, node, "field switch");
  }

  // A choice of models appears where there is more than one.
  showModels(models) {
    const chosen = this.model.value;
    this.model.replaceChildren(...models.map(({ id }) => element("option", "", id)));
    if (models.some(({ id }) => id === chosen)) this.model.value = chosen;
    this.modelField.hidden = models.length < 2;
    const longest = models[0].max_model_len;
    for (const node of this.fields.get("max_tokens").parentNode.querySelectorAll("input")) {
      node.max = longest - 1;
      node.value = Math.max(1, Math.min(node.value, Math.floor(longest / 2)));
    }
  }

  // As fields of a request. Throws an ApiError for a text that cannot be read.
  read() {
    const values = this.model.value ? { model: this.model.value } : {};
    for (const { name, label } of [...NUMBERS, ...MORE_NUMBERS]) {
      const number = this.fields.get(name).valueAsNumber;
      if (!Number.isFinite(number)) throw new ApiError(0, `${label} must be a number.`);
      values[name] = number;
    }
    for (const { name, label, read } of TEXTS) {
      const text = this.fields.get(name).value;
      if (text) values[name] = read(text, label);
    }
    for (const { name } of SWITCHES) {
      if (this.fields.get(name).checked) values[name] = true;
    }
    return values;
  }
}

function input(type, { min, max, step, value }) {
  const node = element("input");
  Object.assign(node, { type, min, max, step, value });
  return node;
}

function ids(text, label) {
  const words = text.split(/[\s,]+/).filter(Boolean);
  if (!words.length || !words.every((word) => /^\d{1,9}$/.test(word))) {
    throw new ApiError(0, `${label} must be whole numbers with commas between, as 2, 13.`);
  }
  return words.map(Number);
}

function biases(text, label) {
  const pairs = text.split(",").map((pair) => pair.trim()).filter(Boolean);
  const read = pairs.map((pair) => pair.match(/^(\d{1,9})\s*:\s*(-?\d+(?:\.\d+)?)$/));
  if (!read.length || read.includes(null)) {
    throw new ApiError(0, `${label} must be pairs of a token id and a number, as 70: 2.5, 71: -100.`);
  }
  return Object.fromEntries(read.map(([, id, bias]) => [id, Number(bias)]));
}

// The seed of a run: the field's, or where it is empty one drawn here if `isDrawn`.
export function readSeed(node, isDrawn) {
  const text = node.value.trim();
  if (!text) return isDrawn ? Math.floor(Math.random() * 2 ** 32) : undefined;
  if (!/^\d{1,15}$/.test(text)) {
    throw new ApiError(0, "The seed must be a whole number of at most 15 digits.");
  }
  return Number(text);
}
