// Charts of the sandbox's resource usage and of the requests to the model.
import { Chart } from "/assets/chart.js";
import { isModelDenial } from "/assets/denied_connections.js";
import { $, count, h, money, size } from "/assets/page.js";

// Three times the runner's sampling interval.
const GAP_MILLISECONDS = 16_000;

const percent = (value) => `${value.toFixed(value > 0 && value < 1 ? 1 : 0)} %`;

export class Metrics {
  #isStale = true;
  #begin = null;
  #latest = null; // the last event before the agent's end
  #isOver = false;
  #note = h("p", { class: "empty-note muted" }, "No metrics yet. The sandbox is sampled while the agent runs.");

  constructor() {
    const samples = { gap: GAP_MILLISECONDS };
    const perRequest = { kind: "bars", format: count, isWhole: true };
    this.charts = {
      cpu: new Chart({ name: "CPU, % of one CPU", format: percent, ...samples }),
      memory: new Chart({ name: "Memory", format: size, base: 2, ...samples }),
      disk: new Chart({ name: "Disk", format: size, base: 2, ...samples }),
      cost: new Chart({ name: "Cost", format: money, kind: "step" }),
      tokensIn: new Chart({ name: "Input tokens per request", ...perRequest }),
      tokensOut: new Chart({ name: "Output tokens per request", ...perRequest }),
      refused: new Chart({ name: "Refused connections", format: count, kind: "step", isWhole: true }),
    };
    this.list = h("div", { class: "charts" });
    const cpus = Number($("panel-metrics").dataset.cpus);
    if (cpus) this.charts.cpu.limit = 100 * cpus;
    $("panel-metrics").append(this.#note, this.list);
  }

  handle(event) {
    const { cpu, memory, disk, cost, tokensIn, tokensOut, refused } = this.charts;
    if (!this.#isOver) this.#latest = event.timestamp ?? this.#latest;
    if (event.type === "state_change" && event.new_state === "running") this.#begin ??= Date.parse(event.timestamp);
    else if (event.type === "state_change" && event.new_state === "completing") this.#isOver = true;
    else if (event.type === "metrics") {
      const { metrics } = event;
      cpu.add(event.timestamp, metrics.cpu_percent);
      memory.add(event.timestamp, metrics.memory_used_bytes);
      disk.add(event.timestamp, metrics.disk_used_bytes);
      memory.limit = metrics.memory_total_bytes ?? memory.limit;
      disk.limit = metrics.disk_total_bytes ?? disk.limit;
    } else if (event.type === "usage") {
      cost.add(event.timestamp, event.cost_usd);
      tokensIn.add(event.timestamp, event.input_tokens + event.cache_read_tokens + event.cache_write_tokens);
      tokensOut.add(event.timestamp, event.output_tokens);
    } else if (event.type === "egress_denied" && !isModelDenial(event)) refused.add(event.timestamp, 1);
    else if (event.type === "end") this.#note.textContent = "No metrics were recorded.";
    else return;
    this.#isStale = true;
  }

  show() {
    if (!this.#isStale) return;
    this.#isStale = false;
    const charts = Object.values(this.charts).filter((chart) => chart.points.length);
    this.#note.hidden = charts.length > 0;
    if (!charts.length) return;
    for (const chart of charts) if (!chart.element.isConnected) this.#insert(chart);
    const first = Math.min(...charts.map((chart) => chart.points[0][0]));
    const last = Math.max(...charts.map((chart) => chart.points.at(-1)[0]));
    const latest = Date.parse(this.#latest);
    const begin = Math.min(this.#begin ?? first, first);
    const end = Math.max(last, Number.isFinite(latest) ? latest : last);
    for (const chart of charts) chart.draw(begin, end);
  }

  // Charts keep their order, regardless of when their first values arrive.
  #insert(chart) {
    const order = Object.values(this.charts);
    const next = order.slice(order.indexOf(chart) + 1).find((each) => each.element.isConnected);
    this.list.insertBefore(chart.element, next?.element ?? null);
  }
}
