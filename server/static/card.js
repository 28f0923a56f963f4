// The model card: what is served, what it was made from, and what its form costs.

import { ApiError, getJson } from "./api.js";
import { trainingCurves } from "./curves.js";
import { $, bytes, compact, element } from "./dom.js";

const FACTS = [
  ["folder", (model) => model.root],
  ["changes", (model) => model.parent],
  ["parameters", (model) => compact(model.num_parameters)],
  ["weights", (model) => bytes(model.weight_bytes)],
  ["stored as", (model) => model.quantization ?? "not quantized"],
  ["executed as", (model) => model.executed_form],
  ["runner", (model) => model.runner],
  ["KV cache", (model) => model.cache_dtype],
  ["context", (model) => `${model.max_model_len} tokens`],
  ["vocabulary", (model) => `${model.vocab_size} tokens`],
  ["chat", (model) => (model.has_chat_template ? "yes" : "no chat template")],
  ["fingerprint", (model) => model.system_fingerprint],
];

const RECORDS = [
  ["certificate", "Certificate", "What this form costs against the model that it was made from."],
  ["lineage", "Lineage", "What it was made from."],
];

export async function showCards(models) {
  const details = await Promise.all(models.map(readDetails));
  $("models").replaceChildren(...details.map(card));
}

async function readDetails(model) {
  try {
    return await getJson(`/v1/models/${encodeURIComponent(model.id)}`, $("key").value);
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    return model; // its entry in the list has to do
  }
}

function card(model) {
  const facts = FACTS.map(([title, read]) => [title, read(model)]).filter(([, value]) => value);
  const node = element("article", "card", element("h2", "", model.id), list(facts));
  if (model.training) {
    const what = "Loss by step, in nats a token.";
    node.append(element("h3", "", "Training"), element("p", "hint", what), trainingCurves(model.training));
  }
  for (const [name, title, what] of RECORDS) {
    if (!model[name]) continue;
    node.append(element("h3", "", title), element("p", "hint", what), record(model[name]));
  }
  return node;
}

function list(rows) {
  const node = element("dl", "facts");
  for (const [title, value] of rows) {
    node.append(element("div", "", element("dt", "", title), element("dd", "", value)));
  }
  return node;
}

// JSON as it is: plain values listed, what is inside them folded below, entries alike in a table.
function record(value) {
  const node = element("div", "record");
  if (Array.isArray(value) && value.every(isRecord)) {
    node.append(table(value));
    return node;
  }
  const entries = Object.entries(value);
  const plain = entries.filter(([, inner]) => !isFolded(inner));
  if (plain.length) node.append(list(plain.map(([name, inner]) => [words(name), figure(inner)])));
  for (const [name, inner] of entries.filter(([, inner]) => isFolded(inner))) {
    const title = element("summary", "", `${words(name)} (${Object.keys(inner).length})`);
    node.append(element("details", "", title, record(inner)));
  }
  return node;
}

function isRecord(value) {
  return value !== null && typeof value === "object" && !Array.isArray(value);
}

function isFolded(value) {
  return isRecord(value) || (Array.isArray(value) && value.length > 0 && value.every(isRecord));
}

function table(rows) {
  const columns = [...new Set(rows.flatMap(Object.keys))];
  const cells = (tag, texts) => element("tr", "", ...texts.map((text) => element(tag, "", text)));
  const node = element("table", "", element("thead", "", cells("th", columns.map(words))));
  node.append(
    element("tbody", "", ...rows.map((row) => cells("td", columns.map((name) => figure(row[name]))))),
  );
  const frame = element("div", "scrolled", node);
  frame.tabIndex = 0;
  return frame;
}

function words(name) {
  return name.replaceAll("_", " ");
}

function figure(value) {
  if (Array.isArray(value)) {
    const isShort = value.length <= 8 && !value.some(Array.isArray);
    return isShort ? value.map(figure).join(", ") || "none" : `${value.length} entries`;
  }
  if (isRecord(value)) return `${Object.keys(value).length} entries`;
  const isFraction = typeof value === "number" && !Number.isInteger(value);
  return isFraction ? Number(value.toPrecision(5)).toString() : String(value ?? "none");
}
