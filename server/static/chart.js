// Lines over time, as SVG.

const SVG = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT, MARGIN] = [300, 72, 4];

// `series`: lists of numbers, the newest last, NaN for a gap; all share one scale from 0.
// Returns the scale's end, the largest number.
export function drawLines(svg, series, capacity) {
  const most = Math.max(...series.flat().filter(Number.isFinite), 0);
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.replaceChildren(
    ...series.flatMap((values, index) => lines(values, most, capacity).map((points) => {
      const line = document.createElementNS(SVG, "polyline");
      line.setAttribute("points", points);
      line.setAttribute("class", `line line-${index}`);
      line.setAttribute("vector-effect", "non-scaling-stroke");
      return line;
    })),
  );
  return most;
}

// The stretches between gaps, as attributes of polylines.
function lines(values, most, capacity) {
  const stretches = [[]];
  values.forEach((value, index) => {
    if (!Number.isFinite(value)) {
      stretches.push([]);
      return;
    }
    const x = WIDTH - ((values.length - 1 - index) * WIDTH) / (capacity - 1);
    const y = HEIGHT - MARGIN - (most ? value / most : 0) * (HEIGHT - 2 * MARGIN);
    stretches.at(-1).push(`${x.toFixed(1)},${y.toFixed(1)}`);
  });
  return stretches.filter((points) => points.length > 1).map((points) => points.join(" "));
}
