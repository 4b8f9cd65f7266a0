// Display of untrusted text. Control and invisible characters are escaped by the same rules as in the CLI.
// Terminal colors are applied; all other terminal sequences are shown as text.

const SGR = /\x1b\[([0-9;:]*)m/g;
// The characters of INVISIBLE_RANGES in sandbox/model/display_text.py. ONE excludes tabs, line feeds and emoji variation selectors.
const INVISIBLE = String.raw`[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}\p{Default_Ignorable_Code_Point}\p{Noncharacter_Code_Point}\u2800\u{13441}\u{13442}\u{16FE4}\u{1D159}]`;
const EMOJI = String.raw`(?:(?<=\p{Extended_Pictographic})[\uFE0E\uFE0F]|(?<=[0-9#*])[\uFE0E\uFE0F](?=\u20E3))`;
const ONE = String.raw`(?![\t\n]|${EMOJI})${INVISIBLE}`;
const HIDDEN = new RegExp(ONE, "gu");
const HIDDEN_RUNS = new RegExp(`(?:${ONE})+`, "gu");
// Also escaped in names: all spaces except U+0020, private and unassigned characters, and combining marks without a base.
const HIDDEN_IN_NAMES = new RegExp(String.raw`(?:${INVISIBLE}|\p{C}|(?! )\p{Zs}|(?<=^|[ /])\p{M})\p{M}*`, "gu");
const PIECES_MAX = 1000;
export const TEXT_LENGTH_MAX = 5_000;
const OUTPUT_LENGTH_MAX = 20_000; // a longer line of output is split

function escapeCharacter(character) {
  const code = character.codePointAt(0);
  if (code < 0x20) return String.fromCodePoint(0x2400 + code);
  if (code === 0x7f) return "␡";
  return `‹U+${code.toString(16).toUpperCase().padStart(4, "0")}›`;
}

// Escape invisible characters in text that is inserted without markup.
export const visible = (text) => text.replace(HIDDEN, escapeCharacter);

// Escape invisible characters in a name or a path.
export const visibleName = (name) => name.replace(HIDDEN_IN_NAMES, (run) => Array.from(run, escapeCharacter).join(""));

// Split long text into blocks, at line ends if possible: layout time grows with the square of a block's length.
export function splitText(text, lengthMax = TEXT_LENGTH_MAX) {
  const parts = [];
  for (let end; text.length > lengthMax; text = text.slice(end)) {
    const lineEnd = text.lastIndexOf("\n", lengthMax - 1) + 1;
    end = lineEnd || lengthMax - /[\uD800-\uDBFF]/.test(text[lengthMax - 1]);
    parts.push(document.createElement("div"));
    parts.at(-1).textContent = text.slice(0, end);
  }
  return [...parts, text];
}

// left: the number of elements that may still be created; the remaining text becomes a single text node.
export function appendEscaped(parent, text, left) {
  const lines = text.replace(/\r(?=\n|$)/g, "");
  let end = 0;
  HIDDEN_RUNS.lastIndex = 0;
  for (let match; left.pieces > 0 && (match = HIDDEN_RUNS.exec(lines)); end = HIDDEN_RUNS.lastIndex) {
    if (match.index > end) parent.append(...splitText(lines.slice(end, match.index), OUTPUT_LENGTH_MAX));
    const mark = element("span", parent, left);
    mark.className = "ctl";
    mark.textContent = visible(match[0]);
  }
  if (end < lines.length) parent.append(...splitText(visible(lines.slice(end)), OUTPUT_LENGTH_MAX));
}

function element(tag, parent, left) {
  left.pieces--;
  return parent.appendChild(document.createElement(tag));
}

// Map to the closest color that is readable on light and dark backgrounds.
function toBasicColor(code) {
  if (code < 8) return code;
  if (code < 16) return code - 8;
  if (code >= 232) return 8;
  code -= 16;
  return nearestColor(Math.floor(code / 36) / 5, (Math.floor(code / 6) % 6) / 5, (code % 6) / 5);
}

function nearestColor(red, green, blue) {
  const highest = Math.max(red, green, blue);
  if (highest - Math.min(red, green, blue) < 0.2) return 8;
  return (red > highest * 0.6 ? 1 : 0) + (green > highest * 0.6 ? 2 : 0) + (blue > highest * 0.6 ? 4 : 0);
}

function apply(codes, style) {
  const list = codes.split(/[;:]/).map(Number);
  for (let i = 0; i < list.length; i++) {
    const code = list[i];
    if (code === 0) Object.assign(style, { color: null, bold: false, italic: false, under: false, reverse: false });
    else if (code === 1) style.bold = true;
    else if (code === 3) style.italic = true;
    else if (code === 4) style.under = true;
    else if (code === 7) style.reverse = true;
    else if (code === 22) style.bold = false;
    else if (code === 23) style.italic = false;
    else if (code === 24) style.under = false;
    else if (code === 27) style.reverse = false;
    else if (code === 39) style.color = null;
    else if (code >= 30 && code <= 37) style.color = code - 30;
    else if (code >= 90 && code <= 97) style.color = code - 90;
    else if (code === 38 || code === 48) {
      const color =
        list[i + 1] === 5
          ? toBasicColor(list[i + 2])
          : nearestColor(list[i + 2] / 255, list[i + 3] / 255, list[i + 4] / 255);
      if (code === 38) style.color = color;
      i += list[i + 1] === 5 ? 2 : 4;
    }
  }
}

function classes({ color, bold, italic, under, reverse }) {
  return [color != null && `a${color}`, bold && "ab", italic && "ai", under && "au", reverse && "ar"]
    .filter(Boolean)
    .join(" ");
}

// Split text into runs of one style each: [text, classes].
export function runs(text) {
  if (!text.includes("\x1b[")) return [[text, ""]];
  const result = [];
  const style = {};
  let end = 0;
  SGR.lastIndex = 0;
  for (let match; (match = SGR.exec(text)); ) {
    if (match.index > end) result.push([text.slice(end, match.index), classes(style)]);
    apply(match[1], style);
    end = match.index + match[0].length;
  }
  if (end < text.length) result.push([text.slice(end), classes(style)]);
  return result;
}

export const withoutColors = (text) => (text.includes("\x1b[") ? text.replace(SGR, "") : text);

// The number of elements that may be created; several texts can share one limit.
export const elementLimit = (pieces = PIECES_MAX) => ({ pieces });

// Append text to parent; mark matches of `searched` (lower case).
export function appendText(parent, text, searched = "", left = elementLimit()) {
  const all = runs(text);
  let at = 0;
  for (; at < all.length && left.pieces > 0; at++, left.pieces--) {
    const [part, classNames] = all[at];
    const container = classNames ? element("span", parent, left) : parent;
    if (classNames) container.className = classNames;
    if (searched) appendMarked(container, part, searched, left);
    else appendEscaped(container, part, left);
  }
  const rest = all.slice(at).map(([part]) => part);
  if (rest.length) appendEscaped(parent, rest.join(""), left);
  return parent;
}

function appendMarked(parent, text, searched, left) {
  const lower = text.toLowerCase();
  let end = 0;
  for (
    let at;
    left.pieces > 0 && lower.length === text.length && (at = lower.indexOf(searched, end)) >= 0;
    end = at + searched.length
  ) {
    if (at > end) appendEscaped(parent, text.slice(end, at), left);
    appendEscaped(element("mark", parent, left), text.slice(at, at + searched.length), left);
  }
  if (end < text.length) appendEscaped(parent, text.slice(end), left);
}
