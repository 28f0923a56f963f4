// The dashboard: `/metrics` every second while it is looked at, kept for one minute.

import { ApiError, getText } from "./api.js";
import { showBlocks } from "./blocks.js";
import { drawLines } from "./chart.js";
import { $, compact, duration, element, percent } from "./dom.js";
import { bucketsBetween, highest, parse, quantile, total, totalsBy } from "./metrics.js";

const PERIOD_MS = 1000;
const NUM_KEPT = 61;
const RATE_SPAN_MS = 3000;
const QUANTILE_SPAN_MS = 60_000;
const SHARES = [0.5, 0.95, 0.99];

const history = []; // { at: ms, sample, figures }
let timer = null;

const rate = (name) => ({ before, after, span_s }) =>
  (total(after, name) - total(before, name)) / span_s;

function ratio(part, whole) {
  return ({ before, after }) => {
    const all = total(after, whole) - total(before, whole);
    return all > 0 ? (total(after, part) - total(before, part)) / all : NaN;
  };
}

// What is shown as a line: its newest value is the large number.
const LINES = [
  { title: "Generated", unit: "tokens/s", of: rate("generation_tokens_total"), show: compact },
  { title: "Taken in", unit: "prompt tokens/s", of: rate("prompt_tokens_total"), show: compact },
  {
    title: "Batch", unit: "tokens generated per step", show: compact,
    of: ratio("generation_tokens_total", "engine_steps_total"),
  },
  { title: "Running", unit: "sequences", show: compact,
    of: ({ after }) => total(after, "num_requests_running") },
  { title: "Waiting", unit: "sequences in the queue", show: compact,
    of: ({ after }) => total(after, "num_requests_waiting") },
  { title: "KV cache", unit: "of its blocks in use", show: percent,
    of: ({ after }) => highest(after, "kv_cache_usage_perc") },
  {
    title: "Prefix cache", unit: "of prompt tokens found", show: percent,
    of: ratio("prefix_cache_hits_total", "prefix_cache_queries_total"),
  },
];

const LATENCIES = [
  { title: "Time to first token", name: "time_to_first_token_seconds" },
  { title: "Between tokens", name: "inter_token_latency_seconds" },
  { title: "Queue", name: "request_queue_time_seconds" },
];

const SUMS = [
  ["generated tokens", "generation_tokens_total"],
  ["prompt tokens", "prompt_tokens_total"],
  ["engine steps", "engine_steps_total"],
  ["preemptions", "num_preemptions_total"],
  ["KV blocks", "kv_cache_blocks"],
];

function build() {
  const cards = [...LINES, ...LATENCIES].map((line) => {
    line.number = element("strong", "", "–");
    line.unitNode = element("span", "unit", line.unit ?? "");
    line.svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    line.svg.setAttribute("role", "img");
    line.peak = element("span", "peak");
    line.span = element("small");
    const title = element("h3", "", line.title, " ", line.span);
    const head = element("p", "number", line.number, " ", line.unitNode);
    return element("article", "card", title, head, line.svg, line.peak);
  });
  $("cards").replaceChildren(...cards);
}

// The newest sample at least `span_ms` old, else the oldest one.
function sampleBefore(now, span_ms) {
  return history.findLast(({ at }) => now - at >= span_ms) ?? history[0];
}

function take(now, sample) {
  const last = history.at(-1);
  const counted = "generation_tokens_total";
  if (last && total(sample, counted) < total(last.sample, counted)) history.length = 0; // restarted
  const earlier = sampleBefore(now, RATE_SPAN_MS);
  const span = earlier && {
    before: earlier.sample, after: sample, span_s: (now - earlier.at) / 1000,
  };
  const long = sampleBefore(now, QUANTILE_SPAN_MS);
  const figures = {
    lines: LINES.map(({ of }) => (span ? of(span) : NaN)),
    latencies: LATENCIES.map(({ name }) => latencies(name, long?.sample, sample)),
  };
  history.push({ at: now, sample, figures });
  if (history.length > NUM_KEPT) history.shift();
}

// Percentiles of the last minute, or where it saw nothing of the whole time.
function latencies(name, before, after) {
  const recent = bucketsBetween(before, after, name);
  const isRecent = before && (recent.at(-1)?.[1] ?? 0) > 0;
  const buckets = isRecent ? recent : bucketsBetween(null, after, name);
  return { isRecent, values: SHARES.map((share) => quantile(buckets, share)) };
}

function draw() {
  const { figures, sample } = history.at(-1);
  LINES.forEach((line, index) => {
    const values = history.map((entry) => entry.figures.lines[index]);
    const value = figures.lines[index];
    line.number.textContent = Number.isFinite(value) ? line.show(value) : "–";
    line.svg.setAttribute("aria-label", `${line.title}: ${line.number.textContent} ${line.unit}`);
    line.peak.textContent = `most ${line.show(drawLines(line.svg, [values], NUM_KEPT))}`;
  });
  LATENCIES.forEach((line, index) => drawLatency(line, index, figures.latencies[index]));
  drawTotals(sample);
}

function drawLatency(line, index, { isRecent, values }) {
  const [middle, ...high] = values.map((s) => (Number.isFinite(s) ? duration(s * 1000) : "–"));
  line.number.textContent = middle;
  line.unitNode.textContent = `p50 · p95 ${high[0]} · p99 ${high[1]}`;
  line.span.textContent = isRecent ? "last minute" : "since the start";
  line.svg.setAttribute("aria-label", `${line.title}: ${middle} ${line.unitNode.textContent}`);
  const series = SHARES.map((_share, place) =>
    history.map((entry) => entry.figures.latencies[index].values[place]),
  );
  line.peak.textContent = `most ${duration(drawLines(line.svg, series, NUM_KEPT) * 1000)}`;
}

function drawTotals(sample) {
  const ended = Object.entries(totalsBy(sample, "request_success_total", "finished_reason"));
  const statuses = Object.entries(totalsBy(sample, "http_requests_total", "status"));
  const rows = [
    ...SUMS.map(([title, name]) => [title, total(sample, name)]),
    ...ended.filter(([, count]) => count).map(([reason, count]) => [`ended: ${reason}`, count]),
    ...statuses.map(([status, count]) => [`HTTP ${status}`, count]),
  ];
  $("totals").replaceChildren(
    ...rows.map(([title, count]) =>
      element("div", "", element("dt", "", title), element("dd", "", count.toLocaleString("en"))),
    ),
  );
}

async function poll() {
  try {
    const text = await getText("/metrics", $("key").value);
    take(performance.now(), parse(text));
    draw();
    await showBlocks($("key").value);
    $("dashboard-problem").textContent = "";
  } catch (error) {
    $("dashboard-problem").textContent = problem(error);
  }
  if (timer !== null) timer = setTimeout(poll, PERIOD_MS);
}

function problem(error) {
  if (!(error instanceof ApiError)) return "The server cannot be reached; trying again.";
  const needsKey = error.status === 401 || error.status === 403;
  return needsKey ? "The counters need a metrics or admin key: give it above." : error.message;
}

// Look, or stop looking.
export function showDashboard(isShown) {
  if (isShown === (timer !== null)) return;
  if (!isShown) {
    clearTimeout(timer);
    timer = null;
    return;
  }
  if (!LINES[0].svg) build();
  timer = 0;
  poll();
}
