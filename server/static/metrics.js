// Prometheus' text format, as far as this server writes it, and figures over a span of time.

// Name without the prefix → { total, series: Map of the labels' text → value }.
export function parse(text) {
  const families = new Map();
  for (const line of text.split("\n")) {
    const found = line.match(/^(?:llmserve_|vllm:)(\w+)(?:\{(.*)\})? (\S+)$/);
    if (!found) continue;
    const [, name, labels = "", number] = found;
    if (!families.has(name)) families.set(name, { total: 0, series: new Map() });
    const family = families.get(name);
    family.total += Number(number);
    family.series.set(labels, Number(number));
  }
  return families;
}

export function total(sample, name) {
  return sample.get(name)?.total ?? 0;
}

// Of shares, which do not add up over models.
export function highest(sample, name) {
  return Math.max(0, ...(sample.get(name)?.series.values() ?? []));
}

// Counts by one label, as { stop: 3, length: 5 }.
export function totalsBy(sample, name, label) {
  const sums = {};
  for (const [labels, value] of sample.get(name)?.series ?? []) {
    const key = labels.match(new RegExp(`(?:^|,)${label}="([^"]*)"`))?.[1] ?? "";
    sums[key] = (sums[key] ?? 0) + value;
  }
  return sums;
}

// What a histogram counted between two samples: [upper bound, count up to it], in order.
export function bucketsBetween(before, after, name) {
  const [old, now] = [before, after].map((sample) =>
    sample ? totalsBy(sample, `${name}_bucket`, "le") : {},
  );
  return Object.entries(now)
    .map(([bound, count]) => [bound === "+Inf" ? Infinity : Number(bound), count - (old[bound] ?? 0)])
    .sort(([one], [other]) => one - other);
}

// As Prometheus' histogram_quantile: linear within a bucket; the last finite bound beyond it. NaN
// where nothing was counted.
export function quantile(buckets, share) {
  const all = buckets.at(-1)?.[1] ?? 0;
  if (all <= 0) return NaN;
  const rank = share * all;
  const index = buckets.findIndex(([, count]) => count >= rank);
  const [bound, count] = buckets[index];
  const [below, counted] = index ? buckets[index - 1] : [0, 0];
  if (bound === Infinity) return below;
  return below + ((bound - below) * (rank - counted)) / (count - counted);
}
