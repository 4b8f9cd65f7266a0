// Refused connections of the sandbox, by host.
import { $, clock, h } from "/assets/page.js";
import { visible } from "/assets/untrusted_text.js";

const HOSTS_MAX = 500;
const PORTS = new Set([80, 443]); // the ports that an allowed host covers if it has no port
const NAME = /^[a-z0-9_][a-z0-9._-]*$/i; // a program may also request a wildcard: *.com

// The model gateway refused a request, for example because the budget is spent. No connection was refused.
export const isModelRefusal = ({ type, host }) => type === "egress_denied" && host === "model";

// A link to the form for a new task that allows this host, if changing the manifest is sufficient.
export function allowLink(host, port, reason) {
  const { task, mayChange } = $("task-data").dataset;
  if (!mayChange || !NAME.test(host) || !/^vm\.(allowed_hosts|network_mode)/.test(reason)) return null;
  const allowed = PORTS.has(port) ? host : `${host}:${port}`;
  const href = `/submit?${new URLSearchParams({ from: task, allow: allowed })}`;
  return h("a", { class: "allow", href }, "Allow it in a new run");
}

export class RefusedConnections {
  #hosts = new Map();
  #eventCount = 0;
  #modelRefusalCount = 0;
  #reportedCount = 0;
  #isStale = false;

  handle(frame) {
    if (frame.type === "progress") this.#reportedCount = Math.max(this.#reportedCount, frame.progress.egress_denied);
    else if (isModelRefusal(frame)) this.#modelRefusalCount++;
    else if (frame.type === "egress_denied") {
      this.#eventCount++;
      const key = `${frame.host}:${frame.port} ${frame.reason}`;
      const entry = this.#hosts.get(key);
      if (entry) Object.assign(entry, { count: entry.count + 1, last: frame.timestamp });
      else if (this.#hosts.size < HOSTS_MAX) this.#hosts.set(key, { ...frame, count: 1, last: frame.timestamp });
    } else return;
    this.#isStale = true;
  }

  get total() {
    return Math.max(this.#eventCount, this.#reportedCount - this.#modelRefusalCount);
  }

  show() {
    if (!this.#isStale) return;
    this.#isStale = false;
    $("refused-count").textContent = this.total || "";
    $("tally-network").textContent = this.total ? `${this.total} refused` : "";
    if (!this.#hosts.size) return;
    const rows = [...this.#hosts.values()].map(({ host, port, reason, count, last }) =>
      h(
        "tr",
        {},
        h("td", { class: "mono" }, visible(`${host}:${port}`)),
        h("td", {}, visible(reason), allowLink(host, port, reason)),
        h("td", { class: "number" }, String(count)),
        h("td", { class: "number muted" }, clock(last)),
      ),
    );
    const head = h(
      "tr",
      {},
      ...["Host", "Reason", "Count", "Last"].map((name, at) =>
        h("th", { scope: "col", class: at > 1 ? "number" : false }, name),
      ),
    );
    $("refusals").replaceChildren(h("table", { class: "refused" }, h("thead", {}, head), h("tbody", {}, ...rows)));
  }
}
