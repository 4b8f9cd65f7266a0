// Markdown as elements. It makes no HTML text, so what is not Markdown here is shown as it stands, tags included.
import { h } from "/assets/page.js";
import { visible } from "/assets/plain.js";

const LENGTH_MAX = 200_000;
const DEPTH_MAX = 8;

export function markdown(text) {
  const said = h("div", { class: "said", dir: "auto" });
  const shown = visible(text.slice(0, LENGTH_MAX).replace(/\r\n?/g, "\n"));
  blocks(said, shown.split("\n"), 0);
  if (text.length > LENGTH_MAX) said.append(h("p", { class: "muted" }, `… and ${text.length - LENGTH_MAX} characters more`));
  return said;
}

// In none of these can two repetitions share a character: an agent's line of 200,000 spaces must not freeze the page.
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
    if (!line.trim()) at++;
    else if (FENCE.test(line)) at = fence(parent, lines, at);
    else if (HEADING.test(line)) at = heading(parent, lines, at);
    else if (RULE.test(line)) parent.append(h("hr")), at++;
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
  parent.append(h("pre", { tabindex: "0", dir: "ltr" }, h("code", {}, body.join("\n"))));
  return at + 1;
}

function heading(parent, lines, at) {
  const [, marks, text] = HEADING.exec(lines[at]);
  const place = h(`h${Math.min(6, marks.length + 2)}`);
  inline(place, text.trim().replace(HEADING_END, "").trim(), 0);
  parent.append(place);
  return at + 1;
}

function quote(parent, lines, at, depth) {
  const body = [];
  for (let match; at < lines.length && (match = QUOTE.exec(lines[at])); at++) body.push(match[1]);
  const place = h("blockquote");
  blocks(place, body, depth + 1);
  parent.append(place);
  return at;
}

function list(parent, lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  const isOrdered = /\d/.test(first[2]);
  const indent = first[1].length;
  const place = h(isOrdered ? "ol" : "ul", isOrdered && parseInt(first[2], 10) !== 1 ? { start: String(parseInt(first[2], 10)) } : {});
  while (at < lines.length) {
    const match = ITEM.exec(lines[at]);
    if (!match || match[1].length !== indent || /\d/.test(match[2]) !== isOrdered) break;
    const inside = indent + match[2].length + 1;
    const body = [match[4]];
    for (at++; at < lines.length; at++) {
      const line = lines[at];
      const begins = line.length - line.trimStart().length;
      if (!line.trim()) {
        const next = lines[at + 1] ?? "";
        if (!next.trim() || next.length - next.trimStart().length < inside) break;
        body.push("");
      } else if (begins >= Math.min(inside, indent + 2)) body.push(line.slice(Math.min(begins, inside)));
      else if (ITEM.test(line) || begins < indent || FENCE.test(line) || HEADING.test(line)) break;
      else body.push(line);
    }
    place.append(item(body, depth));
    while (at < lines.length && !lines[at].trim() && ITEM.exec(lines[at + 1] ?? "")?.[1].length === indent) at++;
  }
  parent.append(place);
  return at;
}

function item(body, depth) {
  const place = h("li");
  const task = /^\[([ xX])\]\s+(.*)$/.exec(body[0]);
  if (task) {
    place.append(task[1] === " " ? "☐ " : "☑ ");
    body[0] = task[2];
  }
  const isTight = !body.includes("");
  let lead = body.length;
  if (isTight) lead = body.findIndex((line, at) => at > 0 && (ITEM.test(line) || FENCE.test(line) || QUOTE.test(line)));
  if (!isTight) lead = 0;
  if (lead < 0) lead = body.length;
  inline(place, body.slice(0, lead).join("\n"), 0);
  blocks(place, body.slice(lead), depth + 1);
  return place;
}

function cells(line) {
  return line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function table(parent, lines, at) {
  const row = (kind, line) => {
    const place = h("tr");
    for (const cell of cells(line)) {
      const made = h(kind, kind === "th" ? { scope: "col" } : {});
      inline(made, cell, 0);
      place.append(made);
    }
    return place;
  };
  const body = h("tbody");
  const made = h("table", { tabindex: "0" }, h("thead", {}, row("th", lines[at])), body);
  for (at += 2; at < lines.length && lines[at].includes("|"); at++) body.append(row("td", lines[at]));
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
  const place = h("p");
  inline(place, body.map((line) => line.trim()).join("\n"), 0);
  parent.append(place);
  return at;
}

// Each part is bounded, so that no text makes it slow.
const INLINE = new RegExp(
  [
    /(?<!`)(?<ticks>`{1,10})(?!`)[\s\S]{1,1000}?(?<!`)\k<ticks>(?!`)/,
    /\\[!-/:-@[-`{-~]/,
    /!?\[(?<name>(?:[^[\]\\]|\\.){0,500})\]\(<?(?<address>[^\s()<>]{1,2000}(?:\([^\s()]{0,200}\)[^\s()]{0,200})?)>?(?:\s+"[^"]{0,200}")?\)/,
    /(?<bare>https?:\/\/[^\s<>"'`]{1,2000}[^\s<>"'`.,:;!?)\]*_])/,
    /(?<two>\*\*|__)(?=\S)(?<strong>[\s\S]{0,1000}?\S)\k<two>/,
    /~~(?=\S)(?<struck>[\s\S]{0,1000}?\S)~~/,
    /(?<![\w*])(?<one>[*_])(?=\S)(?<soft>(?:(?!\k<one>)[\s\S]){0,1000}?\S)\k<one>(?![\w*])/,
  ].map((part) => part.source).join("|"),
  "g",
);

function inline(parent, text, depth) {
  if (depth > DEPTH_MAX || text.length > 20_000) {
    parent.append(text);
    return;
  }
  let end = 0;
  const pattern = new RegExp(INLINE);
  for (let match; (match = pattern.exec(text)); end = pattern.lastIndex) {
    if (match.index > end) words(parent, text.slice(end, match.index));
    put(parent, match, depth);
  }
  if (end < text.length) words(parent, text.slice(end));
}

function put(parent, match, depth) {
  const [all] = match;
  const { ticks, name, address, bare, strong, struck, soft } = match.groups;
  if (ticks) {
    const code = all.slice(ticks.length, -ticks.length);
    parent.append(h("code", {}, /^ .*\S.* $/s.test(code) ? code.slice(1, -1) : code));
  } else if (all[0] === "\\") parent.append(all[1]);
  else if (address !== undefined) link(parent, name, address, depth);
  else if (bare) parent.append(h("a", { href: bare, rel: "noreferrer noopener nofollow", target: "_blank" }, bare));
  else {
    const place = h(strong ? "strong" : struck ? "del" : "em");
    inline(place, strong ?? struck ?? soft, depth + 1);
    parent.append(place);
  }
}

// Only to the web and to mail; whatever else an address may do, it does not do from here.
function link(parent, name, address, depth) {
  const isSafe = /^(https?:\/\/|mailto:)/i.test(address);
  const place = isSafe ? h("a", { href: address, rel: "noreferrer noopener nofollow", target: "_blank", title: address }) : h("span", { title: address });
  inline(place, name || address, depth + 1);
  parent.append(place);
}

function words(parent, text) {
  const lines = text.split(/(?<! ) {2,}\n/);
  lines.forEach((line, at) => {
    if (at) parent.append(h("br"));
    parent.append(line);
  });
}
