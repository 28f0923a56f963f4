// The playground. Whatever a model or a server says is put in as text, never as markup.

import { ApiError, getJson, stream } from "./api.js";

const $ = (id) => document.getElementById(id);

const SETTINGS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, value: 0.8 },
  { name: "top_p", label: "Top p", min: 0.05, max: 1, step: 0.05, value: 0.95 },
  { name: "top_k", label: "Top k", min: 0, max: 200, step: 1, value: 0, hint: "0: off" },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01, value: 0 },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.5, max: 2, step: 0.05, value: 1 },
  { name: "max_tokens", label: "Max tokens", min: 1, max: 1024, step: 1, value: 200 },
];

const state = {
  isChat: false,
  model: null,
  messages: [],
  document: "",
  running: null, // the AbortController of the request under way
};

// ---- small helpers

function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function compact(number) {
  const units = [[1e9, "B"], [1e6, "M"], [1e3, "K"]];
  const unit = units.find(([size]) => number >= size);
  return unit ? `${(number / unit[0]).toFixed(number < 10 * unit[0] ? 1 : 0)}${unit[1]}` : `${number}`;
}

function seconds(ms) {
  return ms < 1000 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(2)} s`;
}

// ---- settings

function buildSettings() {
  for (const setting of SETTINGS) {
    const label = element("label", "field");
    const title = element("span", "", setting.label);
    if (setting.hint) title.append(element("small", "", ` ${setting.hint}`));
    const range = input("range", setting);
    const number = input("number", setting);
    number.id = `setting-${setting.name}`;
    label.htmlFor = number.id;
    range.setAttribute("aria-label", setting.label);
    range.addEventListener("input", () => (number.value = range.value));
    number.addEventListener("input", () => (range.value = number.value));
    label.append(title, number, range);
    $("settings").append(label);
  }
  $("settings").append(textField("seed", "Seed", "drawn anew each time"));
  $("settings").append(textField("stop", "Stop at", "a text that ends the answer"));
}

function input(type, { min, max, step, value }) {
  const node = element("input");
  Object.assign(node, { type, min, max, step, value });
  return node;
}

function textField(name, title, placeholder) {
  const label = element("label", "field");
  const node = element("input");
  Object.assign(node, { type: "text", id: `setting-${name}`, placeholder, autocomplete: "off" });
  label.htmlFor = node.id;
  label.append(element("span", "", title), node);
  return label;
}

function readSettings() {
  const values = {};
  for (const { name, value } of SETTINGS) {
    const number = $(`setting-${name}`).valueAsNumber;
    values[name] = Number.isFinite(number) ? number : value;
  }
  const seed = $("setting-seed").value.trim();
  if (seed) {
    if (!/^\d{1,15}$/.test(seed)) {
      throw new ApiError(0, "The seed must be a whole number of at most 15 digits.");
    }
    values.seed = Number(seed);
  }
  if ($("setting-stop").value) values.stop = [$("setting-stop").value];
  return values;
}

// ---- the model's facts

async function loadModel() {
  try {
    const list = await getJson("/v1/models", $("key").value);
    showModel(list.data[0]);
    setStatus("ready", "ok");
  } catch (error) {
    const needsKey = error instanceof ApiError && error.status === 401;
    setStatus(needsKey ? "needs an API key" : "not reachable", "bad");
    $("model").textContent = needsKey ? "locked" : "no server";
    if (needsKey) $("key").focus();
  }
}

function showModel(model) {
  state.model = model;
  $("model").textContent = model.id;
  document.title = `${model.id} · llmserve`;
  const facts = [
    ["parameters", compact(model.num_parameters)],
    ["executed", model.executed_form],
    ["cache", model.cache_dtype],
    ["context", `${model.max_model_len} tokens`],
  ];
  $("facts").replaceChildren(
    ...facts.map(([name, value]) => {
      const fact = element("div");
      fact.append(element("dt", "", name), element("dd", "", value));
      return fact;
    }),
  );
  for (const type of ["number", "range"]) {
    const node = document.querySelector(`label[for=setting-max_tokens] input[type=${type}]`);
    node.max = model.max_model_len - 1;
    node.value = Math.min(200, Math.floor(model.max_model_len / 2));
  }
  $("tab-chat").disabled = !model.has_chat_template;
  $("note").textContent = model.has_chat_template ? "" : "no chat: the model has no chat template";
}

function setStatus(text, kind) {
  $("status").textContent = text;
  $("status").dataset.kind = kind;
}

// ---- running a request

async function run() {
  const text = $("prompt").value;
  if (state.running || (!text && (state.isChat || !state.document))) return;
  const target = state.isChat ? beginTurn(text) : beginText(text);
  const controller = new AbortController();
  setRunning(controller);
  const figures = new Figures();
  try {
    const options = { key: $("key").value, signal: controller.signal };
    const body = { model: state.model?.id, ...readSettings(), ...target.body };
    for await (const event of stream(target.path, body, options)) {
      figures.note(event);
      for (const choice of event.choices) target.append(choice.text ?? choice.delta.content ?? "");
      scrollDown();
    }
  } catch (error) {
    if (error.name === "AbortError") figures.stopped();
    else showError(error);
  } finally {
    target.end();
    setRunning(null);
  }
}

function beginText(text) {
  const isNew = text !== "";
  if (isNew) {
    state.document = text;
    $("output").replaceChildren(element("span", "given", text));
  }
  const answer = element("span", "made");
  $("output").append(answer);
  $("prompt").value = "";
  $("prompt").placeholder = "Run again to go on, or begin another text.";
  return {
    path: "/v1/completions",
    body: { prompt: state.document },
    append: (piece) => {
      answer.append(piece);
      state.document += piece;
    },
    end: () => {},
  };
}

function beginTurn(text) {
  state.messages.push({ role: "user", content: text });
  const body = { messages: [...state.messages] };
  const question = turn("user", text);
  const reply = turn("assistant", "");
  $("output").append(question, reply);
  $("prompt").value = "";
  $("output").querySelectorAll(".error").forEach((node) => node.remove());
  const said = reply.querySelector("p");
  let content = "";
  return {
    path: "/v1/chat/completions",
    body,
    append: (piece) => {
      content += piece;
      said.append(piece);
    },
    end: () => {
      if (content) {
        state.messages.push({ role: "assistant", content });
        return;
      }
      // Nothing was answered: as if it had not been asked.
      state.messages.pop();
      question.remove();
      reply.remove();
      $("prompt").value = text;
    },
  };
}

function turn(role, text) {
  const node = element("div", `turn ${role}`);
  node.append(element("span", "role", role === "user" ? "You" : "Model"), element("p", "", text));
  return node;
}

function showError(error) {
  const message = error instanceof ApiError ? error.message : "The server cannot be reached.";
  $("output").append(element("p", "error", message));
  $("figures").textContent = "";
  scrollDown();
  if (error.status === 401) $("key").focus();
}

function setRunning(controller) {
  state.running = controller;
  $("stop").hidden = controller === null;
  $("run").hidden = controller !== null;
  $("output").setAttribute("aria-busy", String(controller !== null));
  if (controller === null) $("prompt").focus();
}

function scrollDown() {
  const output = $("output");
  output.scrollTop = output.scrollHeight;
}

// Time to the first token, then tokens a second over those that followed it.
class Figures {
  constructor() {
    this.start = performance.now();
    this.first = null;
    this.tokens = 0;
    this.reason = "";
    $("figures").textContent = "waiting";
  }

  note(event) {
    const now = performance.now();
    if (event.usage) this.tokens = event.usage.completion_tokens;
    for (const choice of event.choices) {
      this.first ??= now;
      this.last = now;
      this.tokens += 1;
      this.reason = choice.finish_reason ?? "";
    }
    this.show();
  }

  stopped() {
    this.reason = "stopped";
    this.show();
  }

  show() {
    if (this.first === null) {
      $("figures").textContent = this.reason;
      return;
    }
    const parts = [`first token ${seconds(this.first - this.start)}`, `${this.tokens} tokens`];
    const span = this.last - this.first;
    if (this.tokens > 1 && span > 0) {
      parts.push(`${(((this.tokens - 1) * 1000) / span).toFixed(0)} tokens/s`);
    }
    if (this.reason) parts.push(this.reason);
    $("figures").textContent = parts.join("  ·  ");
  }
}

// ---- tabs, keys, theme

function chooseTab(isChat) {
  if (state.running || state.isChat === isChat || (isChat && $("tab-chat").disabled)) return;
  state.isChat = isChat;
  for (const [id, isChosen] of [["tab-complete", !isChat], ["tab-chat", isChat]]) {
    $(id).setAttribute("aria-selected", String(isChosen));
    $(id).tabIndex = isChosen ? 0 : -1;
  }
  $("panel").setAttribute("aria-labelledby", isChat ? "tab-chat" : "tab-complete");
  clear();
}

function clear() {
  state.messages = [];
  state.document = "";
  $("output").replaceChildren();
  $("figures").textContent = "";
  $("prompt").placeholder = state.isChat
    ? "Say something to the model."
    : "Begin a text; the model goes on.";
  $("prompt").focus();
}

function switchTheme() {
  const root = document.documentElement;
  const isDark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
}

function onKey(event) {
  if (event.key === "Escape" && state.running) state.running.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    run();
  }
}

function onTabKey(event) {
  if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
  chooseTab(event.key === "ArrowRight");
  $(state.isChat ? "tab-chat" : "tab-complete").focus();
}

buildSettings();
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
$("stop").addEventListener("click", () => state.running?.abort());
$("clear").addEventListener("click", () => state.running || clear());
$("tab-complete").addEventListener("click", () => chooseTab(false));
$("tab-chat").addEventListener("click", () => chooseTab(true));
for (const id of ["tab-complete", "tab-chat"]) $(id).addEventListener("keydown", onTabKey);
$("theme").addEventListener("click", switchTheme);
$("key").addEventListener("change", loadModel);
$("access").addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("keydown", onKey);
$("prompt").focus();
await loadModel();
