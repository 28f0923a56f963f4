// The map of the KV blocks: one cell for each block, by who holds it, and the holders as a list.
//
// Cells are as large as their number allows, so that ten can be told apart as well as ten thousand.

import { getJson } from "./api.js";
import { $, element } from "./dom.js";

const [FREE, KEPT, SHARED, FIRST_OWNER] = [0, 1, 2, 3];
const [LEAST_PX, MOST_PX, AREA_HEIGHT_PX] = [3, 18, 150];
const NUM_HUES = 8;
const MOST_LISTED = 12;

let chosen = null; // the request whose blocks stand out, by id

const hueOf = (id) => [...id].reduce((sum, char) => (sum * 31 + char.charCodeAt(0)) >>> 0, 7) % NUM_HUES;

export async function showBlocks(key) {
  const { models } = await getJson("/kv-blocks", key);
  const pools = models.flatMap(({ model, block_size, replicas }) =>
    replicas.flatMap((maps, replica) =>
      maps.map((map) => {
        const names = [models.length > 1 && model, replicas.length > 1 && `replica ${replica + 1}`];
        return { map, block_size, title: titleOf(map, names) };
      }),
    ),
  );
  const figures = $("blocks");
  if (figures.children.length !== pools.length) {
    figures.replaceChildren(...pools.map(() => build()));
  }
  pools.forEach(({ map, block_size, title }, index) => draw(figures.children[index], map, title, block_size));
}

function titleOf({ window }, names) {
  const kind = window === null ? "" : `layers that look back ${window} tokens`;
  return [...names, kind].filter(Boolean).join(": ");
}

function build() {
  const canvas = element("canvas", "blocks-map");
  canvas.setAttribute("role", "img");
  const figure = element(
    "figure", "card blocks",
    element("h3"), canvas, element("p", "hint blocks-under"), element("ul", "holders"),
  );
  canvas.addEventListener("pointermove", (event) => tellCell(figure, event));
  canvas.addEventListener("pointerleave", () => (figure.querySelector("p").textContent = figure.summary));
  return figure;
}

function draw(figure, map, title, blockSize) {
  const cells = map.runs.flatMap(([what, count]) => Array(count).fill(what));
  const counts = new Map();
  for (const what of cells) counts.set(what, (counts.get(what) ?? 0) + 1);
  const unit = map.blocks_per_cell === 1 ? "" : `, ${map.blocks_per_cell} to a cell`;
  figure.map = map;
  figure.cells = cells;
  figure.querySelector("h3").textContent = title;
  figure.querySelector("h3").hidden = !title;
  figure.summary =
    `${map.num_blocks.toLocaleString("en")} blocks of ${blockSize} tokens${unit}: ` +
    `${map.owners.length} requests hold ${share(cells, (what) => what >= SHARED)}, ` +
    `${share(cells, (what) => what === KEPT)} are kept for who asks for the same, ` +
    `${share(cells, (what) => what === FREE)} are free.`;
  const canvas = figure.querySelector("canvas");
  canvas.setAttribute("aria-label", figure.summary);
  if (!canvas.matches(":hover")) figure.querySelector("p").textContent = figure.summary;
  paint(canvas, figure);
  listHolders(figure, counts);
}

function share(cells, is) {
  const part = cells.filter(is).length / cells.length;
  return `${(100 * part).toFixed(part > 0 && part < 0.1 ? 1 : 0)} %`;
}

// Width of a cell such that all of them fill the area, within bounds.
export function cellSize(numCells, width) {
  const ideal = Math.sqrt((width * AREA_HEIGHT_PX) / numCells);
  return Math.max(LEAST_PX, Math.min(MOST_PX, Math.floor(ideal)));
}

function paint(canvas, figure) {
  const width = Math.max(canvas.clientWidth, 1);
  const size = cellSize(figure.cells.length, width);
  const columns = Math.max(1, Math.floor(width / size));
  const height = Math.ceil(figure.cells.length / columns) * size;
  const scale = window.devicePixelRatio || 1;
  Object.assign(canvas, { width: width * scale, height: height * scale });
  canvas.style.height = `${height}px`;
  Object.assign(figure, { size, columns });
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  const colours = coloursOf(canvas);
  const gap = size > 5 ? 2 : 1;
  figure.cells.forEach((what, index) => {
    const x = (index % columns) * size;
    const y = Math.floor(index / columns) * size;
    const owner = figure.map.owners[what - FIRST_OWNER];
    const isFaint = chosen !== null && owner !== chosen;
    context.globalAlpha = isFaint ? 0.25 : 1;
    context.fillStyle = owner === undefined ? colours.plain[what] : colours.hues[hueOf(owner)];
    context.fillRect(x, y, size - gap, size - gap);
  });
}

function coloursOf(canvas) {
  // A property's own value holds both themes' colours; only where it is used is one of them chosen.
  const read = (name) => {
    canvas.style.color = `var(${name})`;
    return getComputedStyle(canvas).color;
  };
  return {
    plain: { [FREE]: read("--block-free"), [KEPT]: read("--block-kept"), [SHARED]: read("--block-shared") },
    hues: Array.from({ length: NUM_HUES }, (_, index) => read(`--block-${index}`)),
  };
}

// The largest holders first, each a button that makes its blocks stand out.
function listHolders(figure, counts) {
  const { owners, blocks_per_cell: unit } = figure.map;
  const rows = owners
    .map((id, index) => ({ id, count: (counts.get(FIRST_OWNER + index) ?? 0) * unit }))
    .sort((one, other) => other.count - one.count);
  if (chosen !== null && !owners.includes(chosen)) chosen = null;
  const list = figure.querySelector("ul");
  const focused = list.contains(document.activeElement) ? document.activeElement.dataset.id : null;
  const items = rows.slice(0, MOST_LISTED).map(({ id, count }) => holder(figure, id, count));
  const plain = [[SHARED, "shared"], [KEPT, "kept"], [FREE, "free"]].map(([what, name]) =>
    element("li", `legend legend-${name}`, element("i"), `${name} ${((counts.get(what) ?? 0) * unit).toLocaleString("en")}`),
  );
  const more = rows.length - items.length;
  if (more > 0) items.push(element("li", "legend", `and ${more} more requests`));
  list.replaceChildren(...items, ...plain);
  if (focused) list.querySelector(`[data-id="${CSS.escape(focused)}"]`)?.focus();
}

function holder(figure, id, count) {
  const swatch = element("i", `hue-${hueOf(id)}`);
  const button = element("button", "quiet", swatch, `${id.slice(0, 8)} ${count.toLocaleString("en")}`);
  button.type = "button";
  button.dataset.id = id;
  button.title = `Request ${id}`;
  button.setAttribute("aria-pressed", String(chosen === id));
  button.setAttribute("aria-label", `Request ${id.slice(0, 8)}, ${count} blocks: show where`);
  button.addEventListener("click", () => {
    chosen = chosen === id ? null : id;
    for (const one of $("blocks").querySelectorAll("[data-id]")) {
      one.setAttribute("aria-pressed", String(chosen === one.dataset.id));
    }
    for (const one of $("blocks").children) paint(one.querySelector("canvas"), one);
  });
  return element("li", "", button);
}

function tellCell(figure, event) {
  const column = Math.floor(event.offsetX / figure.size);
  const index = Math.floor(event.offsetY / figure.size) * figure.columns + column;
  if (column >= figure.columns || index >= figure.cells.length) return;
  const { owners, blocks_per_cell: unit, num_blocks } = figure.map;
  const what = figure.cells[index];
  const first = index * unit;
  const last = Math.min(first + unit, num_blocks) - 1;
  const names = { [FREE]: "free", [KEPT]: "kept for who asks for the same", [SHARED]: "shared" };
  figure.querySelector("p").textContent =
    `${first === last ? `Block ${first}` : `Blocks ${first} to ${last}`}: ` +
    (names[what] ?? `request ${owners[what - FIRST_OWNER]}`);
}
