// The playground: a prompt to one set of settings, or to two side by side with the same seed.

import { ApiError, stream } from "./api.js";
import { $ } from "./dom.js";
import { Pane } from "./pane.js";
import { Settings, readSeed } from "./settings.js";
import { hideAlternatives, NUM_ALTERNATIVES } from "./tokens.js";

let isChat = false;
let running = null; // the AbortController of the run under way
let lastText = ""; // what was sent last
const sides = [
  { pane: new Pane($("output"), $("figures")), settings: new Settings($("settings"), "setting-") },
  {
    pane: new Pane($("output-b"), $("figures-b")),
    settings: new Settings($("settings-b"), "setting-b-"),
  },
];

function shownSides() {
  return $("compare").checked ? sides : sides.slice(0, 1);
}

export function showModels(models) {
  for (const { settings } of sides) settings.showModels(models);
  const canChat = models[0].has_chat_template;
  $("tab-chat").disabled = !canChat;
  $("note").textContent = canChat ? "" : "no chat: the model has no chat template";
}

async function run() {
  const text = $("prompt").value;
  const shown = shownSides();
  if (running) return;
  if (!text && (isChat || !shown.every(({ pane }) => pane.canGoOn))) {
    askForText();
    return;
  }
  hideAlternatives();
  let bodies;
  try {
    const seed = readSeed($("setting-seed"), shown.length > 1);
    bodies = shown.map(({ settings }) => ({ ...settings.read(), ...askedProbabilities(), seed }));
    showSeed(shown.length > 1 ? seed : undefined);
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    refuse(error);
    return;
  }
  setRunning(new AbortController());
  $("prompt").value = "";
  const answered = await Promise.all(
    shown.map(({ pane }, index) => answer(pane, text, bodies[index])),
  );
  lastText = text || lastText;
  if (!answered.some(Boolean)) $("prompt").value = text;
  else if (!isChat) $("prompt").placeholder = "Run again to go on, or begin another text.";
  setRunning(null);
  $("announce").textContent = shown.map(({ pane }) => pane.figures.textContent).join("; ");
}

function askForText() {
  const prompt = $("prompt");
  prompt.setCustomValidity(isChat ? "Write a message first." : "Write the beginning of a text first.");
  prompt.reportValidity();
  prompt.setCustomValidity("");
}

// What cannot even be asked is said where the answer would be.
function refuse(error) {
  const { pane } = sides[0];
  pane.begin(false, "");
  pane.fail(error);
  pane.end();
}

function askedProbabilities() {
  if (!$("probabilities").checked) return {};
  return isChat ? { logprobs: true, top_logprobs: NUM_ALTERNATIVES } : { logprobs: NUM_ALTERNATIVES };
}

function showSeed(seed) {
  $("seed-used").textContent = seed === undefined ? "" : `seed ${seed} on both sides`;
}

async function answer(pane, text, settings) {
  const { path, body } = pane.begin(isChat, text);
  try {
    const options = { key: $("key").value, signal: running.signal };
    for await (const event of stream(path, { ...settings, ...body }, options)) pane.take(event);
  } catch (error) {
    pane.fail(error);
    if (error.status === 401) $("key").focus();
  }
  return pane.end();
}

function setRunning(controller) {
  running = controller;
  $("stop").hidden = controller === null;
  $("run").hidden = controller !== null;
  $("compare").disabled = controller !== null;
  if (controller === null) $("prompt").focus();
}

function chooseKind(toChat) {
  if (running || isChat === toChat || (toChat && $("tab-chat").disabled)) return;
  isChat = toChat;
  for (const [id, isChosen] of [["tab-complete", !toChat], ["tab-chat", toChat]]) {
    $(id).setAttribute("aria-selected", String(isChosen));
    $(id).tabIndex = isChosen ? 0 : -1;
  }
  $("panel").setAttribute("aria-labelledby", toChat ? "tab-chat" : "tab-complete");
  clear();
}

function clear() {
  for (const { pane } of sides) pane.clear();
  hideAlternatives();
  showSeed();
  $("prompt").placeholder = isChat
    ? "Say something to the model."
    : "Begin a text; the model goes on.";
  $("prompt").focus();
}

function showCompared() {
  const isOn = $("compare").checked;
  for (const id of ["pane-b", "set-b", "name-a", "name-set-a"]) $(id).hidden = !isOn;
  $("panes").classList.toggle("two", isOn);
  clear();
  $("prompt").value ||= lastText;
}

function onKey(event) {
  if (event.key === "Escape") running ? running.abort() : hideAlternatives();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("view-playground").hidden) {
    event.preventDefault();
    run();
  }
}

function onTabKey(event) {
  if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
  chooseKind(event.key === "ArrowRight");
  $(isChat ? "tab-chat" : "tab-complete").focus();
}

export function startPlayground() {
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  $("stop").addEventListener("click", () => running?.abort());
  $("clear").addEventListener("click", () => running || clear());
  $("compare").addEventListener("change", showCompared);
  $("tab-complete").addEventListener("click", () => chooseKind(false));
  $("tab-chat").addEventListener("click", () => chooseKind(true));
  for (const id of ["tab-complete", "tab-chat"]) $(id).addEventListener("keydown", onTabKey);
  document.addEventListener("keydown", onKey);
}
