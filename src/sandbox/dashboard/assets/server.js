// The server page: charts of the load of the server and its host.
import { Chart } from "/assets/chart.js";
import { $, clock, count, h, request, size } from "/assets/page.js";

const percent = (value) => `${value.toFixed(0)} %`;
function labelTime(at, step) {
  return step % 60_000 ? clock(at) : clock(at).slice(0, 5);
}

let charts = null;
let note = null;
let last = 0;
let timer = 0;

function create(intervalSeconds) {
  const common = { gap: intervalSeconds * 3000, labelTime };
  const tasks = { ...common, format: count, isWhole: true };
  charts = {
    cpu_percent: new Chart({ name: "CPU of the host", format: percent, ...common }),
    memory_used_bytes: new Chart({ name: "Memory of the host", format: size, base: 2, ...common }),
    disk_used_bytes: new Chart({ name: "Disk of the data directory", format: size, base: 2, ...common }),
    running: new Chart({ name: "Running tasks", ...tasks }),
    waiting: new Chart({ name: "Waiting tasks", ...tasks }),
    cpus_reserved: new Chart({ name: "CPUs reserved by tasks", ...tasks }),
  };
  charts.cpu_percent.limit = 100;
  note = h("p", { class: "muted" }, "A sample is taken when the server starts, and then every 15 s.");
  const list = h("div", { class: "charts" }, ...Object.values(charts).map((chart) => chart.element));
  $("load").replaceChildren(list, note);
}

function add(sample) {
  if (sample.at <= last) return; // two requests can overlap
  last = sample.at;
  for (const [name, chart] of Object.entries(charts)) chart.add(sample.at, sample[name]);
  charts.memory_used_bytes.limit = sample.memory_total_bytes;
  charts.disk_used_bytes.limit = sample.disk_total_bytes;
  charts.cpus_reserved.limit = sample.cpus;
}

async function update() {
  clearTimeout(timer);
  let pauseSeconds = 15;
  try {
    const { interval_seconds, samples } = await (await request(`/server/load?after=${last}`)).json();
    pauseSeconds = interval_seconds;
    if (!charts) create(interval_seconds);
    for (const sample of samples) add(sample);
    draw();
  } catch (error) {
    if (charts) note.textContent = `The samples could not be loaded: ${error.message}`;
    else $("load").replaceChildren(h("p", { class: "muted" }, `The samples could not be loaded: ${error.message}`));
  }
  timer = setTimeout(update, pauseSeconds * 1000);
}

function draw() {
  const drawn = Object.values(charts).filter((chart) => chart.points.length);
  for (const { element, points } of Object.values(charts)) element.hidden = !points.length;
  if (!drawn.length) return;
  note.hidden = charts.running.points.length > 1;
  const begin = Math.min(...drawn.map((chart) => chart.points[0][0]));
  for (const chart of drawn) chart.draw(begin, last);
}

// A hidden page sends no requests.
document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : update()));
update();
