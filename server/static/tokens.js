// Tokens with what the model thought of them: colour by probability, alternatives on demand.

import { $, element, percent } from "./dom.js";

export const NUM_ALTERNATIVES = 5;

const LEVELS = [0.05, 0.25, 0.5, 0.9]; // the bounds between the five colours

// The entries of an event's `logprobs`, in the completions' shape or the chat's: for each token its
// text, probability and the likeliest ones.
export function entriesOf(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map((entry) => ({
      token: entry.token,
      probability: Math.exp(entry.logprob),
      top: entry.top_logprobs.map((top) => [top.token, Math.exp(top.logprob)]),
    }));
  }
  return logprobs.tokens.map((token, index) => ({
    token,
    probability: Math.exp(logprobs.token_logprobs[index]),
    top: Object.entries(logprobs.top_logprobs[index] ?? {}).map(([text, value]) => [
      text, Math.exp(value),
    ]),
  }));
}

// A piece of text as one element. A piece of several tokens has the probability of all together.
export function tokenElement(text, entries) {
  const node = element("span", "token", text);
  const probability = entries.reduce((product, entry) => product * entry.probability, 1);
  node.dataset.level = LEVELS.filter((bound) => probability >= bound).length;
  node.tabIndex = -1;
  node.setAttribute("role", "button");
  node.setAttribute("aria-label", `${visible(text)}, ${percent(probability)}`);
  node.addEventListener("mouseenter", () => show(entries));
  node.addEventListener("focus", () => show(entries));
  node.addEventListener("click", () => node.focus());
  return node;
}

// Arrows go from token to token; one of a pane's tokens is in the order of the Tab key.
export function onTokenKey(event) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step || !event.target.classList.contains("token")) return;
  const tokens = [...event.currentTarget.querySelectorAll(".token")];
  const next = tokens[tokens.indexOf(event.target) + step];
  if (!next) return;
  event.preventDefault();
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

export function hideAlternatives() {
  $("alternatives").hidden = true;
}

function show(entries) {
  $("alternatives").replaceChildren(...entries.map(table));
  $("alternatives").hidden = false;
}

function table({ token, probability, top }) {
  const isListed = top.some(([text]) => text === token);
  const rows = isListed ? top : [[token, probability], ...top];
  const list = element("ol", "options");
  for (const [text, share] of rows.toSorted((one, other) => other[1] - one[1])) {
    const meter = element("meter");
    meter.value = share;
    meter.setAttribute("aria-hidden", "true");
    const name = element("code", "", visible(text));
    const row = element("li", text === token ? "chosen" : "", name, meter, percent(share));
    if (text === token) row.setAttribute("aria-current", "true");
    list.append(row);
  }
  return list;
}

// Blanks and line breaks as signs.
function visible(text) {
  return text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "(nothing)";
}
