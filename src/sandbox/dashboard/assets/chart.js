// A chart over time as SVG: axes with units, the value under the pointer, and gaps where there are no samples.
import { clock, count, h } from "/assets/page.js";

const POINTS_MAX = 4000;
const DRAWN_POINTS_MAX = 400;
const HEIGHT = 150;
const MARGIN = { left: 58, right: 12, top: 10, bottom: 22 };
const NS = "http://www.w3.org/2000/svg";
const SECOND = 1000;
const MINUTE = 60 * SECOND;
const HOUR = 60 * MINUTE;
const TIME_STEPS = [
  ...[1, 2, 5, 10, 15, 30].map((seconds) => seconds * SECOND),
  ...[1, 2, 5, 10, 15, 30].map((minutes) => minutes * MINUTE),
  ...[1, 2, 3, 6, 12, 24, 48, 168].map((hours) => hours * HOUR),
];

function svg(tag, attributes = {}, text = null) {
  const element = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== null) element.textContent = text;
  return element;
}

// Ticks from 0 to at least `peak`, at round numbers; `base` is 2 for bytes.
export function valueTicks(peak, base = 10, isWhole = false) {
  const wanted = peak / 3 || 1;
  let step = base ** Math.floor(Math.log(wanted) / Math.log(base));
  if (base === 10) step *= [1, 2, 5, 10].find((factor) => factor * step >= wanted * 0.999) ?? 10;
  else if (step < wanted) step *= base;
  if (isWhole) step = Math.max(1, Math.round(step));
  const ticks = [0];
  while (ticks.at(-1) < peak * 0.999) ticks.push(ticks.length * step);
  return ticks.length > 1 ? ticks : [0, step];
}

function timeTicks(length, width) {
  const wanted = (length * 90) / Math.max(width, 1);
  const step = TIME_STEPS.find((each) => each >= wanted) ?? TIME_STEPS.at(-1) * Math.ceil(wanted / TIME_STEPS.at(-1));
  return Array.from({ length: Math.min(20, Math.floor(length / step) + 1) }, (_, at) => at * step);
}

export function elapsed(milliseconds) {
  const seconds = Math.round(milliseconds / SECOND);
  if (seconds < 60) return `${seconds} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return seconds % 60 ? `${minutes} min ${seconds % 60} s` : `${minutes} min`;
  return minutes % 60 ? `${Math.floor(minutes / 60)} h ${minutes % 60} min` : `${Math.floor(minutes / 60)} h`;
}

export class Chart {
  points = [];
  limit = null;
  #sum = 0;

  // kind: "line", "step" (the running sum of the values) or "bars". gap: minimum time without samples shown as a gap,
  // in ms. base: 2 for bytes. labelTime: formats a time on the axis, for the given step; the default is the time since
  // the start.
  constructor({ name, format, kind = "line", gap = Infinity, base = 10, isWhole = false, labelTime = null }) {
    Object.assign(this, { name, format, kind, gap, base, isWhole, labelTime });
    this.value = h("span", { class: "chart-value" }, "–");
    this.drawing = svg("svg", { role: "img", height: HEIGHT, "aria-label": name });
    this.foot = h("p", { class: "chart-foot" });
    this.element = h("div", { class: "chart" }, h("h3", {}, name, this.value), this.drawing, this.foot);
    this.drawing.addEventListener("pointermove", (event) => this.#showNearest(event));
    this.drawing.addEventListener("pointerleave", () => this.#showLatest());
    new ResizeObserver(() => {
      if (this.scale && this.drawing.clientWidth !== this.scale.width) this.draw(this.scale.begin, this.scale.end);
    }).observe(this.element);
  }

  // at: milliseconds or a timestamp. Beyond the limit, the smaller of two neighboring points is dropped.
  add(at, value) {
    if (value == null || !Number.isFinite(value)) return;
    this.#sum += value;
    this.points.push([typeof at === "number" ? at : Date.parse(at), this.kind === "step" ? this.#sum : value]);
    if (this.points.length > POINTS_MAX) this.points = peaks(this.points, 2);
  }

  // begin, end: the range of time in milliseconds, the same for all charts of a page.
  draw(begin, end) {
    if (!this.points.length) return;
    const width = this.drawing.clientWidth || 400;
    const peak = this.points.reduce((most, [, value]) => Math.max(most, value), 0);
    const hasLimit = this.limit !== null && this.limit <= peak * 2;
    const ticks = valueTicks(hasLimit ? Math.max(peak, this.limit) : peak, this.base, this.isWhole);
    this.scale = { begin, end, length: Math.max(end - begin, 1), width, top: ticks.at(-1) };
    this.drawing.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.drawing.setAttribute("aria-label", `${this.name}: ${this.#summary(peak)}`);
    this.drawing.replaceChildren(...this.#gaps(), ...this.#axes(ticks), ...this.#marks());
    if (hasLimit) this.drawing.append(this.#horizontalLine("limit", this.limit));
    this.foot.textContent = this.#summary(peak);
    this.#showLatest();
  }

  #summary(peak) {
    if (this.kind === "step") return `total ${this.format(peak)}`;
    const limit = this.limit === null ? "" : ` of ${this.format(this.limit)}`;
    const number = this.points.length;
    const noun = this.kind === "bars" ? "request" : "sample";
    return `peak ${this.format(peak)}${limit}; ${count(number)} ${noun}${number === 1 ? "" : "s"}`;
  }

  #axes(levels) {
    const { begin, length, width } = this.scale;
    const values = levels.flatMap((level) => [
      this.#horizontalLine("grid", level),
      svg("text", { x: MARGIN.left - 6, y: this.#y(level) + 4, "text-anchor": "end" }, this.format(level)),
    ]);
    const ticks = timeTicks(length, width - MARGIN.left - MARGIN.right);
    const times = ticks.map((tick) => {
      const x = this.#x(begin + tick);
      const anchor = x > width - 40 ? "end" : tick ? "middle" : "start";
      const text = this.labelTime ? this.labelTime(begin + tick, ticks[1] ?? 0) : elapsed(tick);
      return svg("text", { x, y: HEIGHT - 6, "text-anchor": anchor }, text);
    });
    return [...values, ...times];
  }

  #horizontalLine(name, value) {
    const y = this.#y(value);
    return svg("line", { class: name, x1: MARGIN.left, x2: this.scale.width - MARGIN.right, y1: y, y2: y });
  }

  // Times without samples, including those before the first sample and after the last one.
  #gaps() {
    if (!Number.isFinite(this.gap)) return [];
    const { begin, end } = this.scale;
    const times = [begin, ...this.points.map(([at]) => at), end];
    const gaps = [];
    for (let at = 1; at < times.length; at++)
      if (times[at] - times[at - 1] > this.gap) gaps.push([times[at - 1], times[at]]);
    return gaps.slice(0, DRAWN_POINTS_MAX).map(([from, to]) => {
      const gap = svg("rect", {
        class: "no-data",
        x: this.#x(from),
        y: MARGIN.top,
        width: Math.max(0, this.#x(to) - this.#x(from)),
        height: HEIGHT - MARGIN.top - MARGIN.bottom,
      });
      gap.append(svg("title", {}, `No samples for ${elapsed(to - from)}`));
      return gap;
    });
  }

  #marks() {
    const points = peaks(this.points, Math.ceil(this.points.length / DRAWN_POINTS_MAX));
    if (this.kind === "bars") return [this.#bars(points)];
    const ground = this.#y(0);
    const elements = [];
    for (const part of this.#parts(points)) {
      const steps = part.map(([at, value]) => [this.#x(at), this.#y(value)]);
      if (this.kind === "step") steps.unshift([this.#x(this.scale.begin), ground]);
      let line = `M${steps[0].join(",")}`;
      for (const [x, y] of steps.slice(1)) line += this.kind === "step" ? `H${x}V${y}` : `L${x},${y}`;
      if (this.kind === "step") line += `H${this.#x(this.scale.end)}`;
      const right = this.kind === "step" ? this.#x(this.scale.end) : steps.at(-1)[0];
      const hasDots = this.kind === "line" && (part.length === 1 || points.length <= 40);
      if (steps.length > 1)
        elements.push(
          svg("path", { class: "area", d: `${line}L${right},${ground}H${steps[0][0]}Z` }),
          svg("path", { class: "stroke", d: line }),
        );
      if (hasDots) elements.push(...steps.map(([x, y]) => svg("circle", { class: "dot", cx: x, cy: y, r: 2 })));
    }
    return elements;
  }

  #bars(points) {
    const ground = this.#y(0);
    return svg("path", {
      class: "bars",
      d: points.map(([at, value]) => `M${this.#x(at)},${ground}V${this.#y(value)}`).join(""),
    });
  }

  // The runs of points between gaps.
  #parts(points) {
    const parts = [];
    for (const point of points) {
      const last = parts.at(-1)?.at(-1);
      if (last && (point[0] - last[0] <= this.gap || this.kind === "step")) parts.at(-1).push(point);
      else parts.push([point]);
    }
    return parts;
  }

  #x(at) {
    const { begin, length, width } = this.scale;
    return +(MARGIN.left + ((at - begin) / length) * (width - MARGIN.left - MARGIN.right)).toFixed(1);
  }

  #y(value) {
    return +(HEIGHT - MARGIN.bottom - (value / this.scale.top) * (HEIGHT - MARGIN.top - MARGIN.bottom)).toFixed(1);
  }

  #showNearest(event) {
    if (!this.scale) return;
    const { begin, length, width } = this.scale;
    const box = this.drawing.getBoundingClientRect();
    const inside = event.clientX - box.left - MARGIN.left;
    const at = begin + (inside / (width - MARGIN.left - MARGIN.right)) * length;
    const near = this.points.reduce((best, point) => (Math.abs(point[0] - at) < Math.abs(best[0] - at) ? point : best));
    this.#removeCrosshair();
    const x = this.#x(near[0]);
    this.drawing.append(
      svg("line", { class: "crosshair", x1: x, x2: x, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom }),
      svg("circle", { class: "crosshair", cx: x, cy: this.#y(near[1]), r: 3.5 }),
    );
    const since = this.labelTime ? "" : `, ${elapsed(near[0] - begin)}`;
    this.value.textContent = `${this.format(near[1])} at ${clock(near[0])}${since}`;
  }

  #removeCrosshair() {
    for (const element of this.drawing.querySelectorAll(".crosshair")) element.remove();
  }

  #showLatest() {
    this.#removeCrosshair();
    this.value.textContent = this.points.length ? this.format(this.points.at(-1)[1]) : "–";
  }
}

// The highest of each `count` neighboring points, and the last point.
function peaks(points, count) {
  if (count <= 1) return points;
  const result = [];
  for (let at = 0; at < points.length; at += count)
    result.push(points.slice(at, at + count).reduce((best, point) => (point[1] >= best[1] ? point : best)));
  if (result.at(-1) !== points.at(-1)) result.push(points.at(-1));
  return result;
}
