// The loss curve as SVG.

import { cleaned, path, scale, smooth, ticks } from "./curve.js";

/** Narrow ones are drawn narrow: letters keep their size. */
const NARROWEST = 260;
const USUAL = 640;
const HEIGHT = 260;
const EDGE = { left: 52, right: 14, top: 14, bottom: 42 };

function svg(tag, attributes = {}, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

/** What the curve says, in a sentence. */
function summary(points) {
  if (points.length === 0) return "Loss curve, no step yet.";
  const [first, last] = [points[0], points.at(-1)];
  return `Loss curve: ${first.loss.toFixed(2)} at step ${first.step}, ${last.loss.toFixed(2)} at step ${last.step}.`;
}

/** Draws `{step, loss}` points into `element` (an svg), over `total` steps. */
export function drawCurve(element, given, total) {
  const points = cleaned(given);
  const width = Math.max(NARROWEST, element.clientWidth || USUAL);
  element.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  element.setAttribute("role", "img");
  element.setAttribute("aria-label", summary(points));
  const losses = points.map((point) => point.loss);
  const low = Math.min(...losses, 0);
  const high = points.length === 0 ? 1 : Math.max(...losses) * 1.05 || 1;
  const last = Math.max(total || 0, points.at(-1)?.step ?? 0, 1);
  const x = scale(0, last, EDGE.left, width - EDGE.right);
  const y = scale(low, high, HEIGHT - EDGE.bottom, EDGE.top);
  const parts = [];
  for (const tick of ticks(low, high, 4)) {
    parts.push(svg("line", { class: "gridline", x1: EDGE.left, x2: width - EDGE.right, y1: y(tick), y2: y(tick) }));
    parts.push(svg("text", { x: EDGE.left - 8, y: y(tick) + 4, "text-anchor": "end" }, String(tick)));
  }
  for (const tick of ticks(0, last, width / 100)) {
    parts.push(svg("text", { x: x(tick), y: HEIGHT - EDGE.bottom + 18, "text-anchor": "middle" }, String(tick)));
  }
  parts.push(svg("text", { x: (EDGE.left + width - EDGE.right) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, "step"));
  const middle = (EDGE.top + HEIGHT - EDGE.bottom) / 2;
  parts.push(svg("text", { x: 12, y: middle, "text-anchor": "middle", transform: `rotate(-90 12 ${middle})` }, "loss"));
  if (points.length > 0) {
    const radius = Math.floor(points.length / 24);
    const even = smooth(losses, radius);
    parts.push(svg("path", { class: "raw", d: path(points.map((point) => [x(point.step), y(point.loss)])) }));
    parts.push(svg("path", { class: "smooth", d: path(points.map((point, at) => [x(point.step), y(even[at])])) }));
    parts.push(svg("circle", { class: "dot", cx: x(points.at(-1).step), cy: y(even.at(-1)), r: 4 }));
  }
  element.replaceChildren(...parts);
}

/** An empty curve. */
export function curveElement() {
  return svg("svg", { class: "curve" });
}
