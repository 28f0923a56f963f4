// Training curves: losses by step, with axes.

import { compact, element } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [520, 220, 44, 12, 10, 26];
const NAMES = { loss: "training", held_out_loss: "held out" };

// `curves`: { loss: [[step, nats], ...], held_out_loss: ... }, ascending by step.
export function trainingCurves(curves) {
  const entries = Object.entries(curves).filter(([name, points]) => NAMES[name] && points.length);
  const points = entries.flatMap(([, some]) => some);
  const scale = scaleOf(points);
  const svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "curves", role: "img" });
  svg.setAttribute("aria-label", summary(entries));
  svg.append(...axes(scale));
  entries.forEach(([name, some], index) => svg.append(...curve(some, scale, index, name)));
  const legend = entries.map(([name, some], index) =>
    element("li", "", element("i", `curve-${index}`), `${NAMES[name]}: ${some.at(-1)[1].toFixed(3)} at the end`),
  );
  return element("figure", "training", svg, element("ul", "curve-legend", ...legend));
}

function summary(entries) {
  const told = entries.map(([name, points]) => {
    const [first, last] = [points[0], points.at(-1)];
    return `${NAMES[name]} loss from ${first[1].toFixed(3)} at step ${Math.round(first[0])} ` +
      `to ${last[1].toFixed(3)} at step ${Math.round(last[0])}`;
  });
  return `Training: ${told.join("; ")} nats a token`;
}

function scaleOf(points) {
  const values = points.map(([, value]) => value);
  const steps = points.map(([step]) => step);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const pad = (high - low || Math.abs(high) || 1) * 0.05;
  const most = Math.max(...steps, 1);
  const [bottom, top] = [low - pad, high + pad];
  return {
    most, bottom, top,
    x: (step) => LEFT + (step / most) * (WIDTH - LEFT - RIGHT),
    y: (value) => HEIGHT - BOTTOM - ((value - bottom) / (top - bottom)) * (HEIGHT - TOP - BOTTOM),
  };
}

function axes({ most, bottom, top, x, y }) {
  const shares = [0, 0.25, 0.5, 0.75, 1];
  const rows = shares.map((share) => bottom + share * (top - bottom)).flatMap((value) => [
    shape("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }),
    label(value.toFixed(2), LEFT - 6, y(value) + 4, "end"),
  ]);
  const columns = shares.map((share) => Math.round(share * most)).map((step, index) =>
    label(compact(step), x(step), HEIGHT - 8, index === shares.length - 1 ? "end" : "middle"),
  );
  return [...rows, ...columns];
}

function curve(points, { x, y }, index, name) {
  const place = ([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`;
  const line = shape("polyline", { class: `curve curve-${index}`, points: points.map(place).join(" ") });
  if (name === "loss") return [line];
  const dots = points.map(([step, value]) =>
    shape("circle", { class: `dot curve-${index}`, cx: x(step), cy: y(value), r: 2.5 }),
  );
  return [line, ...dots];
}

function label(text, x, y, anchor) {
  const node = shape("text", { x, y, "text-anchor": anchor });
  node.textContent = text;
  return node;
}

function shape(tag, attributes) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}
