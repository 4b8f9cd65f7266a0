// Renders Markdown as elements, not as HTML text: anything else, including HTML tags, is shown literally.
import { h } from "/assets/page.js";
import { visible } from "/assets/plain.js";

const LENGTH_MAX = 200_000;
const DEPTH_MAX = 8;
const ELEMENTS_MAX = 3000;
const COLUMNS_MAX = 100;

// How many more elements the current text may have; what follows is shown unformatted. Layout takes the time, not parsing.
let elementsLeft = 0;

function make(...parts) {
  elementsLeft--;
  return h(...parts);
}

export function markdown(text) {
  const root = h("div", { class: "said", dir: "auto" });
  const escaped = visible(text.slice(0, LENGTH_MAX).replace(/\r\n?/g, "\n"));
  elementsLeft = ELEMENTS_MAX;
  blocks(root, escaped.split("\n"), 0);
  if (text.length > LENGTH_MAX) root.append(h("p", { class: "muted" }, `… and ${text.length - LENGTH_MAX} more characters`));
  return root;
}

// Two adjacent repetitions must not match the same character: a line of 200,000 spaces must not freeze the page.
const FENCE = /^( {0,3})(`{3,}(?!`)|~{3,}(?!~))[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})(?!\S)(.*)$/;
const HEADING_END = /(?:^|\s)#+$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+|$)(.*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const TABLE_RULE = /^(?:\|\s*)?:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?$/;

function blocks(parent, lines, depth) {
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    if (elementsLeft <= 0) {
      parent.append(lines.slice(at).join("\n"));
      return;
    }
    if (!line.trim()) at++;
    else if (FENCE.test(line)) at = fence(parent, lines, at);
    else if (HEADING.test(line)) at = heading(parent, lines, at);
    else if (RULE.test(line)) parent.append(make("hr")), at++;
    else if (depth < DEPTH_MAX && QUOTE.test(line)) at = quote(parent, lines, at, depth);
    else if (depth < DEPTH_MAX && ITEM.test(line)) at = list(parent, lines, at, depth);
    else if (line.includes("|") && TABLE_RULE.test((lines[at + 1] ?? "").trim())) at = table(parent, lines, at);
    else at = paragraph(parent, lines, at);
  }
}

function fence(parent, lines, at) {
  const [, indent, mark] = FENCE.exec(lines[at]);
  const body = [];
  while (++at < lines.length) {
    const line = lines[at];
    const closing = line.trim();
    if (closing.length >= mark.length && closing === mark[0].repeat(closing.length)) break;
    body.push(line.startsWith(indent) ? line.slice(indent.length) : line);
  }
  parent.append(make("pre", { tabindex: "0", dir: "ltr" }, make("code", {}, body.join("\n"))));
  return at + 1;
}

function heading(parent, lines, at) {
  const [, marks, text] = HEADING.exec(lines[at]);
  const element = make(`h${Math.min(6, marks.length + 2)}`);
  inline(element, text.trim().replace(HEADING_END, "").trim(), 0);
  parent.append(element);
  return at + 1;
}

function quote(parent, lines, at, depth) {
  const body = [];
  for (let match; at < lines.length && (match = QUOTE.exec(lines[at])); at++) body.push(match[1]);
  const element = make("blockquote");
  blocks(element, body, depth + 1);
  parent.append(element);
  return at;
}

function list(parent, lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  const isOrdered = /\d/.test(first[2]);
  const indent = first[1].length;
  const element = make(isOrdered ? "ol" : "ul", isOrdered && parseInt(first[2], 10) !== 1 ? { start: String(parseInt(first[2], 10)) } : {});
  while (at < lines.length) {
    const match = ITEM.exec(lines[at]);
    if (!match || match[1].length !== indent || /\d/.test(match[2]) !== isOrdered) break;
    const inside = indent + match[2].length + 1;
    const body = [match[4]];
    for (at++; at < lines.length; at++) {
      const line = lines[at];
      const lineIndent = line.length - line.trimStart().length;
      if (!line.trim()) {
        const next = lines[at + 1] ?? "";
        if (!next.trim() || next.length - next.trimStart().length < inside) break;
        body.push("");
      } else if (lineIndent >= Math.min(inside, indent + 2)) body.push(line.slice(Math.min(lineIndent, inside)));
      else if (ITEM.test(line) || lineIndent < indent || FENCE.test(line) || HEADING.test(line)) break;
      else body.push(line);
    }
    element.append(item(body, depth));
    if (elementsLeft <= 0) break;
    while (at < lines.length && !lines[at].trim() && ITEM.exec(lines[at + 1] ?? "")?.[1].length === indent) at++;
  }
  parent.append(element);
  return at;
}

function item(body, depth) {
  const element = make("li");
  const task = /^\[([ xX])\]\s+(.*)$/.exec(body[0]);
  if (task) {
    element.append(task[1] === " " ? "☐ " : "☑ ");
    body[0] = task[2];
  }
  const isTight = !body.includes("");
  let lead = body.length;
  if (isTight) lead = body.findIndex((line, at) => at > 0 && (ITEM.test(line) || FENCE.test(line) || QUOTE.test(line)));
  if (!isTight) lead = 0;
  if (lead < 0) lead = body.length;
  inline(element, body.slice(0, lead).join("\n"), 0);
  blocks(element, body.slice(lead), depth + 1);
  return element;
}

function cells(line) {
  const all = line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/);
  const kept = all.length > COLUMNS_MAX ? [...all.slice(0, COLUMNS_MAX - 1), all.slice(COLUMNS_MAX - 1).join("|")] : all;
  return kept.map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function table(parent, lines, at) {
  const row = (kind, line) => {
    const rowElement = make("tr");
    for (const cell of cells(line)) {
      const element = make(kind, kind === "th" ? { scope: "col" } : {});
      inline(element, cell, 0);
      rowElement.append(element);
    }
    return rowElement;
  };
  const body = make("tbody");
  const made = make("table", { tabindex: "0" }, make("thead", {}, row("th", lines[at])), body);
  for (at += 2; at < lines.length && lines[at].includes("|") && elementsLeft > 0; at++) body.append(row("td", lines[at]));
  parent.append(made);
  return at;
}

function paragraph(parent, lines, at) {
  const body = [lines[at++]];
  while (at < lines.length) {
    const line = lines[at];
    if (!line.trim() || FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line)) break;
    body.push(line);
    at++;
  }
  const element = make("p");
  inline(element, body.map((line) => line.trim()).join("\n"), 0);
  parent.append(element);
  return at;
}

// Every repetition is bounded, to bound the time for any text.
const INLINE = new RegExp(
  [
    /(?<!`)(?<ticks>`{1,10})(?!`)[\s\S]{1,1000}?(?<!`)\k<ticks>(?!`)/,
    /\\[!-/:-@[-`{-~]/,
    /!?\[(?<name>(?:[^[\]\\]|\\.){0,500})\]\(<?(?<url>[^\s()<>]{1,2000}(?:\([^\s()]{0,200}\)[^\s()]{0,200})?)>?(?:\s+"[^"]{0,200}")?\)/,
    /(?<bare>https?:\/\/[^\s<>"'`]{1,2000}[^\s<>"'`.,:;!?)\]*_])/,
    /(?<two>\*\*|__)(?=\S)(?<strong>[\s\S]{0,1000}?\S)\k<two>/,
    /~~(?=\S)(?<struck>[\s\S]{0,1000}?\S)~~/,
    /(?<![\w*])(?<one>[*_])(?=\S)(?<soft>(?:(?!\k<one>)[\s\S]){0,1000}?\S)\k<one>(?![\w*])/,
  ].map((part) => part.source).join("|"),
  "g",
);

function inline(parent, text, depth) {
  if (depth > DEPTH_MAX || text.length > 20_000 || elementsLeft <= 0) {
    parent.append(text);
    return;
  }
  let end = 0;
  const pattern = new RegExp(INLINE);
  for (let match; elementsLeft > 0 && (match = pattern.exec(text)); end = pattern.lastIndex) {
    if (match.index > end) appendWords(parent, text.slice(end, match.index));
    appendMatch(parent, match, depth);
  }
  if (end < text.length) appendWords(parent, text.slice(end));
}

function appendMatch(parent, match, depth) {
  const [all] = match;
  const { ticks, name, url, bare, strong, struck, soft } = match.groups;
  if (ticks) {
    const code = all.slice(ticks.length, -ticks.length);
    parent.append(make("code", {}, /^ .*\S.* $/s.test(code) ? code.slice(1, -1) : code));
  } else if (all[0] === "\\") parent.append(all[1]);
  else if (url !== undefined) link(parent, name, url, depth);
  else if (bare) parent.append(make("a", { href: bare, rel: "noreferrer noopener nofollow", target: "_blank" }, bare));
  else {
    const element = make(strong ? "strong" : struck ? "del" : "em");
    inline(element, strong ?? struck ?? soft, depth + 1);
    parent.append(element);
  }
}

// Allow only web and mail links, no other schemes.
function link(parent, name, url, depth) {
  const isSafe = /^(https?:\/\/|mailto:)/i.test(url);
  const element = isSafe ? make("a", { href: url, rel: "noreferrer noopener nofollow", target: "_blank", title: url }) : make("span", { title: url });
  inline(element, name || url, depth + 1);
  parent.append(element);
}

function appendWords(parent, text) {
  const lines = text.split(/(?<! ) {2,}\n/);
  lines.forEach((line, at) => {
    if (at) parent.append(make("br"));
    parent.append(line);
  });
}
