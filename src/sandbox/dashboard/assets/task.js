// The page of one task: distributes its events to the views, and handles the actions.
import { $, banner, count, h, money, navigateWithToast, refresh, request, toast } from "/assets/page.js";
import "/assets/artifacts.js";
import { Changes } from "/assets/changes.js";
import { Conversation } from "/assets/conversation.js";
import { DeniedConnections } from "/assets/denied_connections.js";
import { follow } from "/assets/event_stream.js";
import { Metrics } from "/assets/metrics.js";
import { Outcome } from "/assets/outcome.js";
import { Output } from "/assets/output.js";
import { forgetReview } from "/assets/review_store.js";
import { registerShortcuts } from "/assets/shortcuts.js";

const { task, api, events: eventsUrl, after, format, patch, chainPatch, chain } = $("task-data").dataset;
const REFRESH_MILLISECONDS = 1000;
const BATCH_MILLISECONDS = 8;
const PENDING_CHARACTERS_MAX = 16_000_000;
const DRAW_MILLISECONDS = 100;
const DELETION_CHECK_MILLISECONDS = 60_000;

const conversation = new Conversation();
const output = new Output(format === "terminal");
const metrics = new Metrics();
const deniedConnections = new DeniedConnections();
const changes = new Changes(`${api}/artifacts`, patch, chainPatch, chain);
const outcome = new Outcome(`${api}/artifacts`);
const views = [conversation, output, metrics, deniedConnections, outcome];

// The selected view is in the URL's fragment.
const tabs = [...document.querySelectorAll('[role="tab"]')];
let selected = "conversation";

function select(name, { focus = false, keep = true } = {}) {
  const tab = $(`tab-${name}`);
  if (!tab) return;
  for (const each of tabs) {
    const isSelected = each === tab;
    each.setAttribute("aria-selected", String(isSelected));
    each.tabIndex = isSelected ? 0 : -1;
    $(each.getAttribute("aria-controls")).hidden = !isSelected;
  }
  selected = name;
  if (focus) tab.focus();
  if (keep) history.replaceState(null, "", name === "conversation" ? location.pathname + location.search : `#${name}`);
  revealTab();
  $("outcome").classList.toggle("brief", name === "changes");
  if (name === "changes") changes.show(hasEnded());
  showMainActions();
  draw();
}

// Scroll the list of tabs to the selected one. The end of a scrolled list fades out.
function revealTab() {
  const list = $("tabs");
  const { offsetLeft, offsetWidth } = $(`tab-${selected}`);
  const end = offsetLeft + offsetWidth + 24 - list.clientWidth;
  list.scrollLeft = Math.min(offsetLeft, Math.max(list.scrollLeft, end));
}

// A count in a tab changes the width.
const tabWidths = new ResizeObserver(revealTab);
for (const tab of tabs) tabWidths.observe(tab);

const isHeadInView = () => $("head").getBoundingClientRect().bottom > $("title-bar").offsetHeight;

// If the head is out of view, scroll the selected view to the top of the window.
const showBegin = () => isHeadInView() || $("views").scrollIntoView();

for (const tab of tabs)
  tab.addEventListener("click", () => {
    select(tab.dataset.view);
    showBegin();
  });
$("tabs").addEventListener("keydown", (event) => {
  const at = tabs.indexOf(document.activeElement);
  const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tabs.length - 1 }[event.key];
  if (at < 0 || next === undefined) return;
  event.preventDefault();
  select(tabs[(next + tabs.length) % tabs.length].dataset.view, { focus: true });
});
window.addEventListener("hashchange", () => {
  select(location.hash.slice(1) || "conversation", { keep: false });
  if (location.hash) $("views").scrollIntoView();
});

// Make the link work even if the URL already has this fragment.
document.addEventListener("click", (event) => {
  if (!event.target.closest('a[href="#changes"]')) return;
  event.preventDefault();
  select("changes");
  $("views").scrollIntoView();
});

const finalState = () => document.querySelector("#head [data-over]")?.dataset.over;
const hasEnded = () => finalState() !== undefined;

// Process events in batches, and draw at most ten times a second, so that the page stays responsive at a thousand events a
// second.
let pending = [];
let pendingCharacters = 0;
let firstBatch = 0;
let nextEvent = 0;
let isProcessing = false;
let isDrawing = false;
let drawnAt = 0;

function enqueue(events, characters) {
  pending.push(events);
  pendingCharacters += characters;
  // Pause the stream until these events are processed.
  if (pendingCharacters > PENDING_CHARACTERS_MAX) stream.hold(true);
  if (!isProcessing) processBatch();
}

// An error in one view does not affect the others or later events.
function deliver(view, event) {
  try {
    view.handle(event);
  } catch (error) {
    console.error(error);
  }
}

function processBatch() {
  const deadline = performance.now() + BATCH_MILLISECONDS;
  while (firstBatch < pending.length && performance.now() < deadline) {
    const events = pending[firstBatch];
    for (const stop = Math.min(nextEvent + 50, events.length); nextEvent < stop; nextEvent++) {
      for (const view of views) deliver(view, events[nextEvent]);
      updateHead(events[nextEvent]);
    }
    if (nextEvent >= events.length) {
      pending[firstBatch++] = null;
      nextEvent = 0;
    }
  }
  if (firstBatch > 1000 || firstBatch === pending.length) {
    pending = pending.slice(firstBatch);
    firstBatch = 0;
  }
  isProcessing = pending.length > 0;
  if (!isProcessing) {
    pendingCharacters = 0;
    stream.hold(false);
  }
  if (isProcessing) setTimeout(processBatch, 0);
  draw();
}

function draw(pause = DRAW_MILLISECONDS) {
  if (isDrawing) return;
  isDrawing = true;
  setTimeout(() => requestAnimationFrame(redraw), Math.max(0, drawnAt + pause - performance.now()));
}

function redraw() {
  isDrawing = false;
  drawnAt = performance.now();
  let hasMore = false;
  if (selected === "conversation") {
    conversation.show(isFollowing);
    hasMore = conversation.hasMore;
    updateJump();
  } else if (selected === "output") output.show();
  else if (selected === "metrics") metrics.show();
  deniedConnections.show();
  outcome.show(finalState());
  $("tally-output").textContent = output.count ? count(output.count) : "";
  if (hasMore) draw(0);
}

// The bar with the name, the state and the main actions, which is shown while these are out of view.
const titleObserver = new IntersectionObserver(
  ([{ isIntersecting }]) => {
    $("title-bar").hidden = isIntersecting;
    // Do not set the class on an ancestor of the lines, because the browser would then check the styles of all lines.
    document.querySelector(".tabs").classList.toggle("below-title-bar", !isIntersecting);
    updateJump();
  },
  { rootMargin: "-44px 0px 0px" },
);

function showHead() {
  outcome.redraw(finalState());
  deniedConnections.redraw();
  $("head-details").open = areDetailsOpen;
  $("title-bar-name").textContent = document.querySelector("#head h1").textContent;
  $("title-bar-state").replaceChildren(document.querySelector("#head .pill").cloneNode(true));
  changes.ask.showLabel();
  showMainActions();
  titleObserver.disconnect();
  titleObserver.observe(document.querySelector("#head .page-head"));
}

function showMainActions() {
  const find = (names) => names.map($).filter(Boolean);
  const isReview = selected === "changes";
  const buttons = find(isReview ? ["copy-apply", "continue", "cancel"] : ["review", "cancel"]).map(createMirrorButton);
  const others = isReview
    ? find(["copy-apply", "copy-branch", "download-patch", "chain-patch"]).map(createMirrorButton)
    : [];
  others.find(({ dataset }) => dataset.mirror === "copy-apply")?.classList.add("on-phone"); // shown where the bar has no space for the button
  const menu = h(
    "details",
    { class: "menu" },
    h("summary", { class: "button" }, "More"),
    h("div", { class: "menu-items" }, ...others),
  );
  $("title-bar-actions").replaceChildren(...buttons, ...(others.length ? [menu] : []));
}
changes.ask.onChange = showMainActions;

// Remember whether the details are open: a reloaded head has closed details.
let areDetailsOpen = false;
$("head").addEventListener("click", (event) => {
  const details = event.target.closest("summary")?.parentElement;
  if (details?.id === "head-details") areDetailsOpen = !details.open; // the browser toggles it after this event
});

function createMirrorButton(button) {
  return h(
    "button",
    {
      type: "button",
      class: ["primary", "danger"].find((name) => button.classList.contains(name)),
      "data-mirror": button.id,
      title: button.title || null,
      onclick: () => $(button.id)?.click(),
    },
    button.textContent.trim(),
  );
}

$("title-bar-name").addEventListener("click", (event) => {
  event.preventDefault();
  window.scrollTo(0, 0);
  $("main").focus({ preventScroll: true });
});

// After following a link to a view, keep the view at the top of the window while the parts above it are loading, until the
// user scrolls or types.
let isPinned = location.hash !== "";
for (const kind of ["wheel", "touchmove", "pointerdown", "keydown"])
  window.addEventListener(kind, () => (isPinned = false), { passive: true });
new ResizeObserver(() => isPinned && $("views").scrollIntoView()).observe($("outcome"));

const isEndSeen = () => window.innerHeight + window.scrollY >= document.documentElement.scrollHeight - 120;

// At the top of the page of an ended task, the outcome is more important than the end of the conversation.
function updateJump() {
  $("talk-jump").hidden = isEndSeen() || (hasEnded() && isHeadInView());
}

// The page of a task that has not ended opens at the end of the conversation, and follows it until the user scrolls up.
let isFollowing = !hasEnded();
let scrolledTo = 0;
const scrollToEnd = () => window.scrollTo(0, document.documentElement.scrollHeight);
window.addEventListener(
  "scroll",
  () => {
    if (selected !== "conversation") return;
    if (isEndSeen() && !hasEnded()) isFollowing = true;
    else if (window.scrollY < scrolledTo) isFollowing = false;
    scrolledTo = window.scrollY;
    updateJump();
  },
  { passive: true },
);
new ResizeObserver(() => isFollowing && selected === "conversation" && scrollToEnd()).observe($("talk"));
$("talk-jump").addEventListener("click", () => {
  isFollowing = true;
  scrollToEnd();
});

// Update counters immediately. Reload the head, which the server renders, when the state changes; data-refresh also reloads
// it periodically, for changes without an event.
let refreshTimer = 0;
const openedAt = Date.now();

function updateHead(event) {
  if (event.type === "progress") {
    const { cost_usd, input_tokens, output_tokens, turns, tool_calls } = event.progress;
    const texts = {
      cost: money(cost_usd),
      tokens: `${count(input_tokens)} in, ${count(output_tokens)} out`,
      turns: count(turns),
      tools: count(tool_calls),
    };
    for (const [name, text] of Object.entries(texts)) {
      const element = $(`fact-${name}`);
      if (element && element.textContent !== text) element.textContent = text;
    }
  } else if (
    (event.type === "state_change" && Date.parse(event.timestamp) > openedAt - 5000) ||
    (event.type === "end" && !hasEnded())
  ) {
    clearTimeout(refreshTimer);
    refreshTimer = setTimeout(
      () => {
        refresh("head");
        refresh("artifact-list");
        if (event.type === "end") changes.show(true);
      },
      event.type === "end" ? 100 : Math.min(REFRESH_MILLISECONDS, 200),
    );
  }
}

const LIVE = { live: ["Live", "live on"], lost: ["Connection lost, reconnecting", "live off"], over: ["", "live"] };

const stream = follow(eventsUrl, Number(after), enqueue, (state) => {
  const [text, style] = LIVE[state];
  $("live").textContent = text;
  $("live").className = style;
  // EventSource does not report the reason for an error, but the response for the head does.
  if (state === "lost") refresh("head");
});

document.addEventListener("htmx:responseError", (event) => {
  if (event.detail.target.id === "head" && event.detail.xhr.status === 404) showDeleted();
});

// The task was deleted, for example in another window. The page keeps what it has loaded, but offers no actions.
let isDeleted = false;

function showDeleted() {
  isDeleted = true;
  stream.end();
  delete $("head").dataset.refresh;
  document.body.classList.add("is-deleted");
  const link = h("a", { class: "button primary", id: "to-list", href: "/" }, "All tasks");
  document.querySelector("#head .actions").replaceChildren(link);
  for (const pill of document.querySelectorAll("#head .pill, #title-bar .pill")) {
    pill.className = "pill ended";
    pill.lastChild.data = "deleted";
  }
  $("refused-note").hidden = true;
  $("memory-note").hidden = true;
  $("talk-empty").textContent = "The conversation was deleted with the task.";
  $("artifact-list").replaceChildren(
    h("p", { class: "empty-note muted" }, "The artifacts were deleted with the task."),
  );
  showMainActions();
  banner("This task was deleted. This page shows only what it had already loaded.");
}

// No event reports the deletion of a task that has ended.
function checkDeletion() {
  if (!document.hidden && hasEnded() && !isDeleted) refresh("head");
}
setInterval(checkDeletion, DELETION_CHECK_MILLISECONDS);
document.addEventListener("visibilitychange", checkDeletion);
document.addEventListener("htmx:afterSwap", (event) => {
  if (event.detail.target?.id !== "head") return;
  const isOver = hasEnded() && "refresh" in $("head").dataset;
  if (isOver) delete $("head").dataset.refresh;
  showHead();
  // If the page was following the conversation, show the outcome.
  if (isOver && isFollowing && selected === "conversation") {
    isFollowing = false;
    window.scrollTo(0, 0);
  }
  if (selected === "changes") changes.show(hasEnded());
});

// Actions. "Back" is not a submit button: Enter in the reason field would activate the first one.
$("ask-back").addEventListener("click", () => $("ask").close());

function confirm(title, text, confirmLabel, withReason) {
  const dialog = $("ask");
  $("ask-title").textContent = title;
  $("ask-text").textContent = text;
  $("ask-yes").textContent = confirmLabel;
  $("ask-reason").value = "";
  $("ask-reason").hidden = dialog.querySelector("label").hidden = !withReason;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener(
      "close",
      () => resolve(dialog.returnValue === "yes" ? { reason: $("ask-reason").value } : null),
      { once: true },
    );
  });
}

const ACTIONS = {
  async continue() {
    changes.ask.open();
  },
  async cancel(button) {
    const isForced = button.textContent.trim() !== "Cancel";
    const text = isForced
      ? "Stops everything in the sandbox immediately, without the 30 s grace period."
      : "Asks the agent to stop, and stops it after 30\u00a0s. The results so far are kept.";
    const confirmed = await confirm(
      isForced ? "Stop now?" : "Cancel this task?",
      text,
      isForced ? "Stop now" : "Cancel task",
      !isForced,
    );
    if (!confirmed) return;
    const body = JSON.stringify(isForced ? { force: true } : { reason: confirmed.reason });
    const response = await request(api, { method: "DELETE", headers: { "content-type": "application/json" }, body });
    toast((await response.json()).message);
    // A cancel request has no event; the server reads it from the journal shortly afterwards.
    for (const milliseconds of [0, 700, 2000]) setTimeout(() => hasEnded() || refresh("head"), milliseconds);
  },
  async release() {
    if (!(await confirm("Release the sandbox?", "Its files are removed; the artifacts are kept.", "Release", false)))
      return;
    const response = await request(`${api}/vm`, { method: "DELETE" });
    toast((await response.json()).message);
    refresh("head");
  },
  async delete(button) {
    const kept = "hasChildren" in button.dataset ? " The tasks that continue this one are kept." : "";
    const text = `This removes ${button.dataset.removes}. You cannot undo this.${kept}`;
    if (!(await confirm("Delete this task?", text, "Delete task", false))) return;
    const response = await request(`${api}/data`, { method: "DELETE" });
    forgetReview(patch);
    navigateWithToast("/", (await response.json()).message);
  },
};

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-action]");
  const act = button && ACTIONS[button.dataset.action];
  if (act)
    act(button).catch((error) => {
      toast(error.message);
      if (error.code === "task_not_found") showDeleted();
    });
});

// A shortcut does not apply if its action is not available for this task or this user.
const press = (id) => () => {
  const button = $(id);
  button?.click();
  return button !== null;
};

registerShortcuts("Task", [
  ...tabs.map((tab, at) => ({
    keys: String(at + 1),
    label: tab.firstChild.textContent.trim(),
    run: () => tab.click(),
  })),
  { keys: "r", label: "Review the changes", run: press("review") },
  { keys: "q", label: "Ask for a change", run: press("continue") },
  { keys: "a", label: "Copy the apply command", run: press("copy-apply") },
  {
    keys: "e",
    label: "End of the conversation",
    run() {
      select("conversation");
      isFollowing = true;
      scrollToEnd();
    },
  },
  { keys: "t", label: "Top of the page", run: () => window.scrollTo(0, 0) },
]);
registerShortcuts("Changes", changes.shortcuts);
registerShortcuts("Output", [
  {
    keys: "/",
    label: "Search the output",
    run() {
      select("output");
      $("find").focus();
    },
  },
  { keys: "w", label: "Wrap long lines", run: () => selected === "output" && output.toggleWrap() },
]);

document.title = document.title || task;
showHead();
select(location.hash.slice(1) || "conversation", { keep: false });
if (selected !== "conversation") $("views").scrollIntoView();
