// Elements and figures. Whatever a model or a server says is put in as text, never as markup.

export const $ = (id) => document.getElementById(id);

export function element(tag, className, ...content) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...content.filter((part) => part !== undefined));
  return node;
}

// 134515008 as 135M.
export function compact(number) {
  const units = [[1e9, "B"], [1e6, "M"], [1e3, "K"]];
  const unit = units.find(([size]) => number >= size);
  if (!unit) return number.toFixed(Number.isInteger(number) || number >= 100 ? 0 : 1);
  return `${(number / unit[0]).toFixed(number < 10 * unit[0] ? 1 : 0)}${unit[1]}`;
}

export function bytes(number) {
  const units = [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]];
  const unit = units.find(([size]) => number >= size);
  return unit ? `${(number / unit[0]).toFixed(1)} ${unit[1]}` : `${number} bytes`;
}

export function duration(ms) {
  if (ms < 10) return `${ms.toFixed(1)} ms`;
  return ms < 1000 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(2)} s`;
}

export function percent(share) {
  return `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;
}
