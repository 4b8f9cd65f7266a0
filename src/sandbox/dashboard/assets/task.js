// The page of one task: its story, told to the views of it, and what can be done about it.
import { $, ask, banner, count, money, refresh, size, toast } from "/assets/page.js";
import "/assets/artifacts.js";
import { Changes } from "/assets/changes.js";
import { Conversation } from "/assets/conversation.js";
import { Figures } from "/assets/figures.js";
import { Output } from "/assets/output.js";
import { Refusals } from "/assets/refusals.js";
import { follow } from "/assets/story.js";

const { task, api, story, after, format, patch } = $("story").dataset;
const FRESH_MILLISECONDS = 1000;
const TRANSCRIPT_BYTES_MAX = 4 * 1024 * 1024;
const TAKE_MILLISECONDS = 8;
const WAITING_CHARACTERS_MAX = 16_000_000;
const DRAW_MILLISECONDS = 100;

const conversation = new Conversation(format);
const output = new Output(format === "terminal");
const figures = new Figures();
const refusals = new Refusals();
const changes = new Changes(`${api}/artifacts`, patch);
const takers = [conversation, output, figures, refusals];

// Views that can be chosen, in the address behind the #.
const tabs = [...document.querySelectorAll('[role="tab"]')];
let chosen = "conversation";

function choose(name, { focus = false, keep = true } = {}) {
  const tab = $(`tab-${name}`);
  if (!tab) return;
  for (const each of tabs) {
    const isIt = each === tab;
    each.setAttribute("aria-selected", String(isIt));
    each.tabIndex = isIt ? 0 : -1;
    $(each.getAttribute("aria-controls")).hidden = !isIt;
  }
  chosen = name;
  if (focus) tab.focus();
  if (keep) history.replaceState(null, "", name === "conversation" ? location.pathname + location.search : `#${name}`);
  tab.scrollIntoView({ block: "nearest", inline: "nearest" });
  if (name === "changes") changes.show(isOver());
  draw();
}

for (const tab of tabs) tab.addEventListener("click", () => choose(tab.dataset.view));
$("tabs").addEventListener("keydown", (event) => {
  const at = tabs.indexOf(document.activeElement);
  const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tabs.length - 1 }[event.key];
  if (at < 0 || next === undefined) return;
  event.preventDefault();
  choose(tabs[(next + tabs.length) % tabs.length].dataset.view, { focus: true });
});
window.addEventListener("hashchange", () => choose(location.hash.slice(1) || "conversation", { keep: false }));

const isOver = () => document.querySelector("#head [data-over]") !== null;

// What came is taken in slices, and drawn ten times a second at most, so that a thousand events a second leave the page
// its time.
let waiting = [];
let waitingCharacters = 0;
let first = 0;
let next = 0;
let isTaking = false;
let isDrawing = false;
let drawnAt = 0;

function take(frames, characters) {
  waiting.push(frames);
  waitingCharacters += characters;
  // No more is asked for until this much is taken.
  if (waitingCharacters > WAITING_CHARACTERS_MAX) following.hold(true);
  if (!isTaking) takeSome();
}

// One view that fails at an event neither keeps the others from it nor itself from the next one.
function give(taker, frame) {
  try {
    taker.take(frame);
  } catch (error) {
    console.error(error);
  }
}

function takeSome() {
  const until = performance.now() + TAKE_MILLISECONDS;
  while (first < waiting.length && performance.now() < until) {
    const frames = waiting[first];
    for (const stop = Math.min(next + 50, frames.length); next < stop; next++) {
      for (const taker of takers) give(taker, frames[next]);
      notice(frames[next]);
    }
    if (next >= frames.length) {
      waiting[first++] = null;
      next = 0;
    }
  }
  if (first > 1000 || first === waiting.length) {
    waiting = waiting.slice(first);
    first = 0;
  }
  isTaking = waiting.length > 0;
  if (!isTaking) {
    waitingCharacters = 0;
    following.hold(false);
  }
  if (isTaking) setTimeout(takeSome, 0);
  draw();
}

function draw() {
  if (isDrawing) return;
  isDrawing = true;
  setTimeout(() => requestAnimationFrame(redraw), Math.max(0, drawnAt + DRAW_MILLISECONDS - performance.now()));
}

function redraw() {
  isDrawing = false;
  drawnAt = performance.now();
  let hasMore = false;
  if (chosen === "conversation") {
    const isAtEnd = isEndSeen();
    const hasNew = conversation.show(isAtEnd);
    hasMore = conversation.hasMore;
    if (hasNew && isAtEnd && isFollowing) window.scrollTo(0, document.documentElement.scrollHeight);
    $("talk-jump").hidden = isAtEnd || isOver();
  } else if (chosen === "output") output.show();
  else if (chosen === "figures") figures.show();
  refusals.show();
  $("tally-output").textContent = output.count ? count(output.count) : "";
  if (hasMore) draw();
}

const isEndSeen = () => window.innerHeight + window.scrollY >= document.documentElement.scrollHeight - 120;

// Only who has gone to the end themselves is taken along.
let isFollowing = false;
window.addEventListener("scroll", () => {
  isFollowing = window.scrollY > 0 && isEndSeen();
  if (isFollowing) $("talk-jump").hidden = true;
}, { passive: true });
$("talk-jump").addEventListener("click", () => window.scrollTo(0, document.documentElement.scrollHeight));

// Figures at once; the head, which the server makes, when the state has changed, and now and then for what is no event.
let fresh = 0;
let begun = Date.now();

function notice(frame) {
  if (frame.type === "progress") {
    const { cost_usd, input_tokens, output_tokens, turns, tool_calls } = frame.progress;
    const texts = { cost: money(cost_usd), tokens: `${count(input_tokens)} / ${count(output_tokens)}`, turns, tools: tool_calls };
    for (const [name, text] of Object.entries(texts)) {
      const place = $(`fact-${name}`);
      if (place && place.textContent !== String(text)) place.textContent = text;
    }
  } else if ((frame.type === "state_change" && Date.parse(frame.timestamp) > begun - 5000) || (frame.type === "end" && !isOver())) {
    clearTimeout(fresh);
    fresh = setTimeout(() => {
      refresh("head");
      refresh("artifact-list");
      if (frame.type === "end") changes.show(true);
    }, frame.type === "end" ? 100 : Math.min(FRESH_MILLISECONDS, 200));
  }
  if (frame.type === "end") over();
}

async function over() {
  if (conversation.isTold || format === "terminal") return;
  const found = await endOfTranscript().catch(() => null);
  if (!found) return;
  const { text, missing } = found;
  if (missing) conversation.take({ type: "gap", timestamp: null, reason: `the first ${size(missing)} of the transcript; the whole is among the artifacts.` });
  await conversation.takeTranscript(text);
  draw();
}

// Whole lines of it, and how many bytes are before what was asked for.
async function endOfTranscript() {
  const answer = await ask(`${api}/artifacts/transcript.ndjson`, { headers: { range: `bytes=-${TRANSCRIPT_BYTES_MAX}` } });
  const text = await answer.text();
  const missing = Number(/^bytes (\d+)-/.exec(answer.headers.get("content-range") ?? "")?.[1] ?? 0);
  return { text: missing ? text.slice(text.indexOf("\n") + 1) : text, missing };
}

const LIVE = { live: ["Live", "live on"], lost: ["Connection lost, trying again", "live off"], over: ["", "live"] };

const following = follow(story, Number(after), take, (state) => {
  const [text, look] = LIVE[state];
  $("live").textContent = text;
  $("live").className = look;
  // A lost connection does not say why; the head is answered with what there is to say.
  if (state === "lost") refresh("head");
});

document.addEventListener("htmx:responseError", (event) => {
  if (event.detail.target.id !== "head" || event.detail.xhr.status !== 404) return;
  following.end();
  delete $("head").dataset.refresh;
  banner("This task is kept no longer.");
});
document.addEventListener("htmx:afterSwap", (event) => {
  if (event.detail.target?.id !== "head") return;
  if (isOver()) delete $("head").dataset.refresh;
  if (chosen === "changes") changes.show(isOver());
});

// What can be done about the task. Back is no submit button: enter in the reason would take the first one of them.
$("ask-back").addEventListener("click", () => $("ask").close());

function confirm(title, text, yes, withReason) {
  const dialog = $("ask");
  $("ask-title").textContent = title;
  $("ask-text").textContent = text;
  $("ask-yes").textContent = yes;
  $("ask-reason").value = "";
  $("ask-reason").hidden = dialog.querySelector("label").hidden = !withReason;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes" ? { reason: $("ask-reason").value } : null), { once: true });
  });
}

const ACTIONS = {
  async cancel(button) {
    const isForced = button.textContent.trim() !== "Cancel";
    const text = isForced ? "Everything in the sandbox is ended without the grace of 30 s." : "The agent is asked to stop, and ended after 30 s. What it made until then is kept.";
    const wish = await confirm(isForced ? "Stop at once?" : "Cancel this task?", text, isForced ? "Stop at once" : "Cancel task", !isForced);
    if (!wish) return;
    const body = JSON.stringify(isForced ? { force: true } : { reason: wish.reason });
    const answer = await ask(api, { method: "DELETE", headers: { "content-type": "application/json" }, body });
    toast((await answer.json()).message);
    // The wish is no event; the server reads it out of the journal a little later.
    for (const milliseconds of [0, 700, 2000]) setTimeout(() => isOver() || refresh("head"), milliseconds);
  },
  async release() {
    if (!(await confirm("Release the sandbox?", "Its files are removed; the artifacts stay.", "Release", false))) return;
    const answer = await ask(`${api}/vm`, { method: "DELETE" });
    toast((await answer.json()).message);
    refresh("head");
  },
};

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-action]");
  const act = button && ACTIONS[button.dataset.action];
  if (act) act(button).catch((error) => toast(error.message));
});

document.title = document.title || task;
choose(location.hash.slice(1) || "conversation", { keep: false });
