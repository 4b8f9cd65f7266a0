// Charts of the sandbox's resource usage and the model's cost, drawn as SVG.
import { $, clock, count, h, money, size } from "/assets/page.js";

const POINTS_MAX = 4000;
const DRAWN_MAX = 400;
const WIDTH = 400;
const HEIGHT = 100;

const NS = "http://www.w3.org/2000/svg";

function svg(tag, attributes = {}) {
  const element = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

// One line over time. Above the limit, every second point is removed, except the last one.
class Chart {
  points = [];

  constructor(name, format, isSum) {
    this.name = name;
    this.format = format;
    this.isSum = isSum;
    this.value = h("span", {}, "–");
    this.top = h("span", {}, "");
    this.from = h("span");
    this.to = h("span");
    this.drawing = svg("svg", {
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
      preserveAspectRatio: "none",
      "aria-hidden": "true",
    });
    this.element = h(
      "div",
      { class: "chart" },
      h("h3", {}, name, this.value),
      this.drawing,
      h("div", { class: "chart-foot" }, this.from, this.top, this.to),
    );
    this.drawing.addEventListener("pointermove", (event) => this.#showNearest(event));
    this.drawing.addEventListener("pointerleave", () => this.#showLatest());
  }

  add(at, value) {
    if (value == null || !Number.isFinite(value)) return;
    this.points.push([Date.parse(at), this.isSum ? value + (this.points.at(-1)?.[1] ?? 0) : value]);
    if (this.points.length > POINTS_MAX) {
      const last = this.points.length - 1;
      this.points = this.points.filter((_, index) => index % 2 === 0 || index === last);
    }
  }

  // begin, end: time range in milliseconds, the same for all charts.
  draw(begin, end) {
    if (!this.points.length) return;
    const stride = Math.max(1, Math.ceil(this.points.length / DRAWN_MAX));
    const sampled = this.points.filter((_, index) => index % stride === 0 || index === this.points.length - 1);
    let peak = 0;
    for (const [, value] of this.points) peak = Math.max(peak, value);
    this.scale = { begin, length: Math.max(end - begin, 1), peak: peak || 1 };
    const steps = sampled.map(([at, value]) => [this.#x(at), this.#y(value)]);
    if (this.isSum) steps.unshift([0, 98]);
    let line = `M${steps[0].join(",")}`;
    for (const [x, y] of steps.slice(1)) line += this.isSum ? `H${x}V${y}` : `L${x},${y}`;
    if (this.isSum || steps.length === 1) line += `H${WIDTH}`;
    const right = this.isSum || steps.length === 1 ? WIDTH : steps.at(-1)[0];
    this.drawing.replaceChildren(
      ...[5, 50, 98].map((y) => svg("line", { class: "grid", x1: 0, x2: WIDTH, y1: y, y2: y })),
      svg("path", { class: "area", d: `${line}L${right},98H${steps[0][0]}Z` }),
      svg("path", { class: "stroke", d: line }),
    );
    this.from.textContent = clock(begin);
    this.to.textContent = clock(end);
    this.top.textContent = `peak ${this.format(peak)}`;
    this.#showLatest();
  }

  #x(at) {
    return +(((at - this.scale.begin) / this.scale.length) * WIDTH).toFixed(1);
  }

  #y(value) {
    return +(98 - (value / this.scale.peak) * 93).toFixed(1);
  }

  #showNearest(event) {
    if (!this.scale) return;
    const box = this.drawing.getBoundingClientRect();
    const at = this.scale.begin + ((event.clientX - box.left) / box.width) * this.scale.length;
    const near = this.points.reduce((best, point) => (Math.abs(point[0] - at) < Math.abs(best[0] - at) ? point : best));
    this.drawing.querySelector(".hair")?.remove();
    this.drawing.append(svg("line", { class: "hair", x1: this.#x(near[0]), x2: this.#x(near[0]), y1: 0, y2: HEIGHT }));
    this.value.textContent = `${this.format(near[1])} at ${clock(near[0])}`;
  }

  #showLatest() {
    this.drawing.querySelector(".hair")?.remove();
    this.value.textContent = this.points.length ? this.format(this.points.at(-1)[1]) : "–";
  }
}

export class Metrics {
  #isStale = true;

  constructor() {
    this.charts = {
      cpu: new Chart("CPU", (value) => `${value.toFixed(0)} %`),
      memory: new Chart("Memory", size),
      cost: new Chart("Cost", money, true),
      tokensIn: new Chart("Tokens in", count, true),
      tokensOut: new Chart("Tokens out", count, true),
      refused: new Chart("Refused connections", count, true),
    };
    $("panel-metrics").append(
      h("div", { class: "charts" }, ...Object.values(this.charts).map((chart) => chart.element)),
    );
  }

  handle(frame) {
    const { cpu, memory, cost, tokensIn, tokensOut, refused } = this.charts;
    if (frame.type === "metrics") {
      cpu.add(frame.timestamp, frame.metrics.cpu_percent);
      memory.add(frame.timestamp, frame.metrics.memory_used_bytes);
    } else if (frame.type === "usage") {
      cost.add(frame.timestamp, frame.cost_usd);
      tokensIn.add(frame.timestamp, frame.input_tokens + frame.cache_read_tokens + frame.cache_write_tokens);
      tokensOut.add(frame.timestamp, frame.output_tokens);
    } else if (frame.type === "egress_denied") refused.add(frame.timestamp, 1);
    else return;
    this.#isStale = true;
  }

  show() {
    if (!this.#isStale) return;
    this.#isStale = false;
    const charts = Object.values(this.charts).filter((chart) => chart.points.length);
    const begin = Math.min(...charts.map((chart) => chart.points[0][0]));
    const end = Math.max(...charts.map((chart) => chart.points.at(-1)[0]));
    for (const chart of charts) chart.draw(begin, end);
  }
}
