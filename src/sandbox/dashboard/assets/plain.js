// Text as it came, with nothing hidden in it: control characters and marks that do not show are named, by the rule of the
// command line; colours of terminals are kept, everything else of them is shown.

const SGR = /\x1b\[([0-9;:]*)m/g;
// The properties and blank glyphs of sandbox/model/printable.py, but tabs, line feeds and the variation selectors of emoji.
const INVISIBLE = String.raw`[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}\p{Default_Ignorable_Code_Point}\p{Noncharacter_Code_Point}\u2800\u{13441}\u{13442}\u{16FE4}\u{1D159}]`;
const EMOJI = String.raw`(?:(?<=\p{Extended_Pictographic})[\uFE0E\uFE0F]|(?<=[0-9#*])[\uFE0E\uFE0F](?=\u20E3))`;
const ONE = String.raw`(?![\t\n]|${EMOJI})${INVISIBLE}`;
const UNSEEN = new RegExp(ONE, "gu");
const UNSEEN_RUNS = new RegExp(`(?:${ONE})+`, "gu");
// What a name may not have either: spaces but the plain one, private and unassigned characters, and a combining mark with
// nothing to combine with.
const UNSEEN_IN_NAMES = new RegExp(String.raw`(?:${INVISIBLE}|\p{C}|(?! )\p{Zs}|(?<=^|[ /])\p{M})\p{M}*`, "gu");
const PIECES_MAX = 1000;

function spoken(character) {
  const code = character.codePointAt(0);
  if (code < 0x20) return String.fromCodePoint(0x2400 + code);
  if (code === 0x7f) return "␡";
  return `‹U+${code.toString(16).toUpperCase().padStart(4, "0")}›`;
}

// Text without what cannot be seen, for places that take no elements.
export const visible = (text) => text.replace(UNSEEN, spoken);

// A name or a path without what cannot be seen.
export const visibleName = (name) => name.replace(UNSEEN_IN_NAMES, (run) => Array.from(run, spoken).join(""));

// left: how many pieces may still be elements of their own; what is behind them is one text.
function putSeen(parent, text, left) {
  const lines = text.replace(/\r(?=\n|$)/g, "");
  let end = 0;
  UNSEEN_RUNS.lastIndex = 0;
  for (let found; left.pieces > 0 && (found = UNSEEN_RUNS.exec(lines)); end = UNSEEN_RUNS.lastIndex) {
    if (found.index > end) parent.append(lines.slice(end, found.index));
    const mark = element("span", parent, left);
    mark.className = "ctl";
    mark.textContent = visible(found[0]);
  }
  if (end < lines.length) parent.append(visible(lines.slice(end)));
}

function element(tag, parent, left) {
  left.pieces--;
  return parent.appendChild(document.createElement(tag));
}

// The nearest of the sixteen that have a readable shade on either ground.
function basic(code) {
  if (code < 8) return code;
  if (code < 16) return code - 8;
  if (code >= 232) return 8;
  code -= 16;
  return nearest(Math.floor(code / 36) / 5, (Math.floor(code / 6) % 6) / 5, (code % 6) / 5);
}

function nearest(red, green, blue) {
  const most = Math.max(red, green, blue);
  if (most - Math.min(red, green, blue) < 0.2) return 8;
  return (red > most * 0.6 ? 1 : 0) + (green > most * 0.6 ? 2 : 0) + (blue > most * 0.6 ? 4 : 0);
}

function apply(codes, style) {
  const list = codes.split(/[;:]/).map(Number);
  for (let i = 0; i < list.length; i++) {
    const code = list[i];
    if (code === 0) Object.assign(style, { colour: null, bold: false, italic: false, under: false, reverse: false });
    else if (code === 1) style.bold = true;
    else if (code === 3) style.italic = true;
    else if (code === 4) style.under = true;
    else if (code === 7) style.reverse = true;
    else if (code === 22) style.bold = false;
    else if (code === 23) style.italic = false;
    else if (code === 24) style.under = false;
    else if (code === 27) style.reverse = false;
    else if (code === 39) style.colour = null;
    else if (code >= 30 && code <= 37) style.colour = code - 30;
    else if (code >= 90 && code <= 97) style.colour = code - 90;
    else if (code === 38 || code === 48) {
      const colour = list[i + 1] === 5 ? basic(list[i + 2]) : nearest(list[i + 2] / 255, list[i + 3] / 255, list[i + 4] / 255);
      if (code === 38) style.colour = colour;
      i += list[i + 1] === 5 ? 2 : 4;
    }
  }
}

function classes({ colour, bold, italic, under, reverse }) {
  return [colour != null && `a${colour}`, bold && "ab", italic && "ai", under && "au", reverse && "ar"].filter(Boolean).join(" ");
}

// Runs of text with one look each: [text, classes].
export function runs(text) {
  if (!text.includes("\x1b[")) return [[text, ""]];
  const found = [];
  const style = {};
  let end = 0;
  SGR.lastIndex = 0;
  for (let match; (match = SGR.exec(text)); ) {
    if (match.index > end) found.push([text.slice(end, match.index), classes(style)]);
    apply(match[1], style);
    end = match.index + match[0].length;
  }
  if (end < text.length) found.push([text.slice(end), classes(style)]);
  return found;
}

export const withoutColours = (text) => (text.includes("\x1b[") ? text.replace(SGR, "") : text);

// Put text into parent; what `wanted` (lower case) matches is marked.
export function put(parent, text, wanted = "") {
  const left = { pieces: PIECES_MAX };
  const all = runs(text);
  let at = 0;
  for (; at < all.length && left.pieces > 0; at++, left.pieces--) {
    const [part, look] = all[at];
    const place = look ? element("span", parent, left) : parent;
    if (look) place.className = look;
    if (wanted) putMarked(place, part, wanted, left);
    else putSeen(place, part, left);
  }
  const rest = all.slice(at).map(([part]) => part);
  if (rest.length) putSeen(parent, rest.join(""), left);
  return parent;
}

function putMarked(parent, text, wanted, left) {
  const lower = text.toLowerCase();
  let end = 0;
  for (let at; left.pieces > 0 && lower.length === text.length && (at = lower.indexOf(wanted, end)) >= 0; end = at + wanted.length) {
    if (at > end) putSeen(parent, text.slice(end, at), left);
    putSeen(element("mark", parent, left), text.slice(at, at + wanted.length), left);
  }
  if (end < text.length) putSeen(parent, text.slice(end), left);
}
