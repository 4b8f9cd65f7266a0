// Refused connections of the sandbox, grouped by host.
import { $, clock, count, h } from "/assets/page.js";
import { visible } from "/assets/untrusted_text.js";

const HOSTS_MAX = 500;
const NOTED_HOSTS_MAX = 3;
const ADDED_HOSTS_MAX = 50; // the same limit as in the form
const PORTS = new Set([80, 443]); // the ports that an allowed host covers if it has no port
const NAME = /^[a-z0-9_][a-z0-9._-]*$/i; // a program may also request a wildcard: *.com

// The model gateway refused a request, for example because the budget is spent. No connection was refused.
export const isModelDenial = ({ type, host }) => type === "egress_denied" && host === "model";

// The host as an entry of `vm.allowed_hosts`, if changing the manifest is sufficient to allow it; otherwise null.
function allowableHost({ host, port, reason }) {
  if (!NAME.test(host) || !/^vm\.(allowed_hosts|network_mode)/.test(reason)) return null;
  return PORTS.has(port) ? host : `${host}:${port}`;
}

function linkToNewRun(hosts, text) {
  const { task, mayChange } = $("task-data").dataset;
  if (!mayChange) return null;
  const params = new URLSearchParams([["from", task], ...hosts.map((host) => ["allow", host])]);
  return h("a", { class: "allow", href: `/submit?${params}` }, text);
}

// A link to the form for a new task that allows this host.
export function allowLink(host, port, reason) {
  const allowed = allowableHost({ host, port, reason });
  return allowed && linkToNewRun([allowed], "Allow it in a new run");
}

export class DeniedConnections {
  #hosts = new Map();
  #eventCount = 0;
  #modelDenialCount = 0;
  #reportedCount = 0;
  #isStale = false;

  handle(event) {
    if (event.type === "progress") this.#reportedCount = Math.max(this.#reportedCount, event.progress.egress_denied);
    else if (isModelDenial(event)) this.#modelDenialCount++;
    else if (event.type === "egress_denied") {
      this.#eventCount++;
      const key = `${event.host}:${event.port} ${event.reason}`;
      const entry = this.#hosts.get(key);
      if (entry) Object.assign(entry, { count: entry.count + 1, last: event.timestamp });
      else if (this.#hosts.size < HOSTS_MAX) this.#hosts.set(key, { ...event, count: 1, last: event.timestamp });
    } else return;
    this.#isStale = true;
  }

  get total() {
    return Math.max(this.#eventCount, this.#reportedCount - this.#modelDenialCount);
  }

  // Draw again after the head was replaced.
  redraw() {
    this.#isStale = true;
    this.show();
  }

  show() {
    if (!this.#isStale) return;
    this.#isStale = false;
    this.#showNote();
    $("refused-count").textContent = this.total ? count(this.total) : "";
    $("tally-network").textContent = this.total ? `${count(this.total)} refused` : "";
    if (!this.#hosts.size) return;
    const rows = [...this.#hosts.values()].map(({ host, port, reason, count: number, last }) =>
      h(
        "tr",
        {},
        h("td", { class: "mono" }, visible(`${host}:${port}`)),
        h("td", {}, visible(reason), allowLink(host, port, reason)),
        h("td", { class: "number" }, count(number)),
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
    const hosts = [...new Set([...this.#hosts.values()].map(allowableHost).filter(Boolean))];
    const isTooMany = hosts.length < 2 || hosts.length > ADDED_HOSTS_MAX;
    const all = isTooMany ? null : linkToNewRun(hosts, `Allow ${hosts.length} hosts in a new run`);
    const note = all ? [h("p", { class: "allow-all" }, all)] : [];
    $("refusals").replaceChildren(
      ...note,
      h("table", { class: "refused" }, h("thead", {}, head), h("tbody", {}, ...rows)),
    );
  }
  // Show the first hosts at the top of the page.
  #showNote() {
    const note = $("refused-note");
    const entries = [...this.#hosts.values()];
    const hosts = [...new Set(entries.map(({ host }) => visible(host)))];
    if (!note || !hosts.length) return;
    const more = hosts.length > NOTED_HOSTS_MAX ? `, and ${hosts.length - NOTED_HOSTS_MAX} more` : "";
    const names = hosts.slice(0, NOTED_HOSTS_MAX).join(", ") + more;
    const network = h("a", { href: "#network" }, `${hosts.length} ${hosts.length === 1 ? "host" : "hosts"} refused`);
    note.replaceChildren(network, `: ${names}`, ...this.#allowLinks(entries));
    note.hidden = false;
  }

  #allowLinks(entries) {
    const hosts = [...new Set(entries.map(allowableHost).filter(Boolean))];
    if (!hosts.length || hosts.length > ADDED_HOSTS_MAX) return [];
    const link = linkToNewRun(
      hosts,
      hosts.length === 1 ? "Allow it in a new run" : `Allow ${hosts.length} hosts in a new run`,
    );
    return link ? [" · ", link] : [];
  }
}
