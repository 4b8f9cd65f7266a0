// Renders Markdown as elements, not as HTML text: anything else, including HTML tags, is shown literally.
import MarkdownIt from "/assets/markdown-it.min.js";
import { count, h } from "/assets/page.js";
import { languageOf } from "/assets/syntax.js";
import { splitText, TEXT_LENGTH_MAX, visible } from "/assets/untrusted_text.js";

const LENGTH_MAX = 200_000;
const ELEMENTS_MAX = 3000;
const HEADING_OFFSET = 2;
const DEPTH_MAX = 120; // the parser nests blocks 100 levels deep, and emphasis without a limit

const parser = new MarkdownIt({ html: false, linkify: true });
parser.linkify.set({ fuzzyLink: false, fuzzyEmail: false });
parser.validateLink = () => true; // linkElement decides
parser.normalizeLinkText = (url) => url; // show escapes in URLs as they were written
// The original rule, except that long text is neither parsed nor formatted.
parser.core.ruler.at("inline", ({ tokens, md, env }) => {
  for (const { type, content, children } of tokens)
    if (type === "inline" && content.length <= TEXT_LENGTH_MAX) md.inline.parse(content, md, env, children);
});

const TAGS = new Set("h1 h2 h3 h4 h5 h6 p blockquote ul ol li table thead tbody tr th td strong em s hr".split(" "));

const ANCHOR = /<a id="([\w-]+)"><\/a>/;

// localAddress: returns the address of a link within the dashboard, or null. headingOffset: the difference between the levels of the
// page's headings and those of the text. hasAnchors: whether <a id="NAME"></a> is an anchor.
export function markdown(text, options = {}) {
  const root = h("div", { class: "said", dir: "auto" });
  const source = visible(text.slice(0, LENGTH_MAX).replace(/\r\n?/g, "\n"));
  new Renderer(root, source, options).renderBlocks(parser.parse(source, {}));
  if (text.length > LENGTH_MAX)
    root.append(h("p", { class: "muted" }, `… and ${count(text.length - LENGTH_MAX)} more characters`));
  return root;
}

class Renderer {
  // The number of elements that may still be created; later text is shown unformatted. The layout is slow, not the parser.
  #elementsLeft;
  // The level of the previous heading. The page's own headings have the levels 1 and 2; no level is skipped.
  #headingLevel;
  #headingOffset;
  #localAddress;
  #hasAnchors;

  constructor(
    root,
    source,
    { elementsMax = ELEMENTS_MAX, headingOffset = HEADING_OFFSET, localAddress = () => null, hasAnchors = false },
  ) {
    this.parents = [root];
    this.source = source;
    this.#elementsLeft = elementsMax;
    this.#hasAnchors = hasAnchors;
    this.#headingOffset = headingOffset;
    this.#headingLevel = Math.max(1, headingOffset);
    this.#localAddress = localAddress;
  }

  renderBlocks(tokens) {
    for (const token of tokens) {
      if (this.#elementsLeft <= 0 && token.map) {
        this.#append(...splitText(this.source.split("\n").slice(token.map[0]).join("\n")));
        return;
      }
      if (token.type === "inline" && token.content.length > TEXT_LENGTH_MAX) this.#append(...splitText(token.content));
      else if (token.type === "inline") this.#renderInline(token.children);
      else if (token.type === "fence" || token.type === "code_block") this.#append(this.#codeBlock(token));
      else this.#renderToken(token);
    }
  }

  #renderInline(tokens) {
    const depth = this.parents.length;
    for (const token of tokens) {
      if (token.type === "code_inline" && this.#elementsLeft > 0) this.#append(this.#create("code", {}, token.content));
      else if (token.type === "softbreak") this.#append("\n");
      else if (token.type === "hardbreak") this.#append(this.#elementsLeft > 0 ? this.#create("br") : "\n");
      else if (token.type === "image") this.#append(this.#linkElement(token.attrGet("src"), token.content));
      else if (token.nesting !== 0) this.#renderToken(token);
      else this.#appendText(visible(token === tokens[0] ? this.#withCheckbox(token.content) : token.content)); // entities are already decoded
    }
    this.parents.length = depth;
  }

  #renderToken(token) {
    if (token.nesting < 0) {
      this.parents.pop();
      return;
    }
    const element = this.#elementsLeft > 0 && this.parents.length < DEPTH_MAX ? this.#element(token) : null;
    if (element) this.#append(element);
    if (token.nesting > 0) this.parents.push(element ?? this.parents.at(-1));
  }

  #element(token) {
    if (token.hidden) return null; // paragraphs in a tight list
    if (token.type === "link_open") return this.#linkElement(token.attrGet("href"), "");
    if (!TAGS.has(token.tag)) return null;
    if (token.type === "heading_open") {
      this.#headingLevel = Math.min(6, this.#headingLevel + 1, Number(token.tag[1]) + this.#headingOffset);
      return this.#create(`h${this.#headingLevel}`);
    }
    if (token.tag === "ol") return this.#create("ol", { start: token.attrGet("start") });
    if (token.tag === "table") return this.#create("table", { tabindex: "0" });
    if (token.tag === "th") return this.#create("th", { scope: "col" });
    return this.#create(token.tag === "s" ? "del" : token.tag);
  }

  // Only web and mail links are links.
  #linkElement(url, text) {
    const address = this.#localAddress(url);
    if (address !== null) return this.#create("a", { href: address }, text || null);
    const isSafe = /^(https?:\/\/|mailto:)/i.test(url);
    const attributes = { href: url, rel: "noreferrer noopener nofollow", target: "_blank", title: url };
    return isSafe ? this.#create("a", attributes, text || null) : this.#create("span", { title: url }, text || null);
  }

  // info: the language, such as "sh".
  #codeBlock({ content, info }) {
    const code = h("code", { "data-language": languageOf(`.${info}`) }, ...splitText(content.replace(/\n$/, "")));
    return this.#create("pre", { tabindex: "0", dir: "ltr" }, code);
  }

  #withCheckbox(text) {
    const isItem = this.parents.at(-1).tagName === "LI" || this.parents.at(-1).parentElement?.tagName === "LI";
    const box = isItem && /^\[([ xX])\]\s/.exec(text);
    return box ? `${box[1] === " " ? "☐" : "☑"} ${text.slice(box[0].length)}` : text;
  }

  #appendText(text) {
    const parts = this.#hasAnchors ? text.split(ANCHOR) : [text];
    this.#append(...parts.map((part, at) => (at % 2 ? this.#create("a", { id: part }) : part)));
  }

  #create(...parts) {
    this.#elementsLeft--;
    return h(...parts);
  }

  #append(...parts) {
    this.parents.at(-1).append(...parts);
  }
}
