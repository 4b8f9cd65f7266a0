// Helpers for all modules. Text is added only as text nodes, so an agent's output is never parsed as HTML.

export const $ = (id) => document.getElementById(id);

export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value == null) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

// Parts of the text in backticks become `code` elements.
export function withCode(text) {
  const parts = text.split(/`([^`\n]+)`/);
  return parts.map((part, at) => (at % 2 ? h("code", {}, part) : part));
}

export function toast(text) {
  const element = h("div", { class: "toast" }, ...withCode(text));
  $("toasts").append(element);
  setTimeout(() => element.remove(), 5000);
}

const NEXT_TOAST = "sandbox.toast";

// Leave the page, and show the text on the next one.
export function navigateWithToast(url, text) {
  try {
    sessionStorage.setItem(NEXT_TOAST, text);
  } catch (error) {
    console.info(`not stored: ${error.message}`);
  }
  location.replace(url);
}

export function showStoredToast() {
  try {
    const text = sessionStorage.getItem(NEXT_TOAST);
    sessionStorage.removeItem(NEXT_TOAST);
    if (text) toast(text);
  } catch {
    // Without storage, there is no text.
  }
}

export function banner(text) {
  const element = $("banner");
  element.textContent = text ?? "";
  element.hidden = !text;
}

export function redirectToSignIn() {
  location.assign(`/sign-in?to=${encodeURIComponent(location.pathname + location.search + location.hash)}`);
}

// Return the response, or throw an Error with the server's message. `details` lists the errors of a manifest.
export async function request(url, options = {}) {
  const response = await fetch(url, options);
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  // The browser leaves the page only after the caller has handled the error.
  if (response.status === 401) redirectToSignIn();
  throw Object.assign(new Error(body.message ?? `The server responded with ${response.status}.`), body, {
    status: response.status,
  });
}

export function refresh(id) {
  const part = $(id);
  if (part) window.htmx?.trigger(part, "refresh");
}

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

export function size(bytes) {
  let unit = 0;
  for (; bytes >= 1024 && unit < UNITS.length - 1; unit++) bytes /= 1024;
  return `${unit === 0 || bytes >= 100 ? count(bytes.toFixed(0)) : bytes.toFixed(1)} ${UNITS[unit]}`;
}

export function formatDuration(milliseconds) {
  if (milliseconds < 100) return `${Math.max(0, Math.round(milliseconds))} ms`;
  const seconds = milliseconds / 1000;
  return seconds < 10 ? `${seconds.toFixed(1)} s` : formatLongDuration(Math.round(seconds));
}

// Format whole seconds, for a running clock.
export function formatLongDuration(seconds) {
  seconds = Math.max(0, Math.floor(seconds));
  if (seconds < 60) return `${seconds} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${seconds % 60} s`;
  const hours = Math.floor(minutes / 60);
  if (hours < 24) return `${hours} h ${minutes % 60} min`;
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

// The formats are those of sandbox/model/display_text.py.
export const count = (number) => groupThousands(String(number));

const groupThousands = (digits) => digits.replace(/\B(?<!\.\d*)(?=(\d{3})+(?!\d))/g, ",");

// The numbers of added and removed lines, without zeros.
export function lineCounts(added, removed) {
  const part = (style, sign, number) => number > 0 && h("span", { class: style }, `${sign}${count(number)}`);
  return [part("plus", "+", added), part("minus", "−", removed)].filter(Boolean);
}

export function money(dollars) {
  if (dollars > 0 && dollars < 0.0001) return "<$0.0001";
  return dollars > 0 && dollars < 0.99995 ? `$${dollars.toFixed(4)}` : `$${groupThousands(dollars.toFixed(2))}`;
}

const pad = (number) => String(number).padStart(2, "0");

// The local time of day: 09:05:00.
export function clock(timestamp) {
  const at = new Date(timestamp);
  return [at.getHours(), at.getMinutes(), at.getSeconds()].map(pad).join(":");
}

// The local date and time: 2026-01-29 09:05:00.
export function dateTime(timestamp) {
  const at = new Date(timestamp);
  return `${at.getFullYear()}-${pad(at.getMonth() + 1)}-${pad(at.getDate())} ${clock(at)}`;
}
