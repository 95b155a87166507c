// Scaling of the loss curve. No page in here: tested with node.

/** Round numbers that cover `low..high`, about `count` of them. */
export function ticks(low, high, count) {
  if (!(high > low)) return [low];
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const found = [];
  // In whole steps: adding fractions would drift.
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) found.push(Number((i * step).toPrecision(12)));
  return found;
}

/** A linear map from `[from, to]` to `[start, end]`. */
export function scale(from, to, start, end) {
  const span = to - from || 1;
  return (value) => start + ((value - from) / span) * (end - start);
}

/** The mean of each value and its neighbours, `radius` on either side. */
export function smooth(values, radius) {
  return values.map((_, at) => {
    const near = values.slice(Math.max(0, at - radius), at + radius + 1);
    return near.reduce((sum, value) => sum + value, 0) / near.length;
  });
}

/** Points sorted by step, each step once (the newest), none without a finite loss. */
export function cleaned(points) {
  const bySteps = new Map();
  for (const { step, loss } of points) {
    if (Number.isFinite(step) && Number.isFinite(loss)) bySteps.set(step, loss);
  }
  return [...bySteps].sort(([a], [b]) => a - b).map(([step, loss]) => ({ step, loss }));
}

/** An SVG path through pairs of coordinates. */
export const path = (pairs) => pairs.map(([x, y], at) => `${at === 0 ? "M" : "L"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

/** Seconds as people say them. */
export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}
