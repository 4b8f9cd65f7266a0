// A reader's notes on a patch: viewed files and comments. They are stored in this browser only.

const PREFIX = "sandbox.review.";
const TASKS_MAX = 100;
export const COMMENTS_MAX = 200;
export const COMMENT_CHARACTERS_MAX = 5000;

export class ReviewStore {
  viewed = new Set();
  comments = []; // { path, side, line, quote, text }
  request = ""; // the reader's general request
  #key;

  constructor(task) {
    this.task = task;
    this.#key = PREFIX + task;
    const { viewed, comments, request } = read(this.#key);
    if (Array.isArray(viewed)) for (const digest of viewed) this.viewed.add(String(digest));
    if (Array.isArray(comments)) this.comments = comments.filter(isComment).slice(0, COMMENTS_MAX);
    if (typeof request === "string") this.request = request;
  }

  isViewed(file) {
    return this.viewed.has(digestOf(file));
  }

  setViewed(file, isViewed) {
    if (isViewed) this.viewed.add(digestOf(file));
    else this.viewed.delete(digestOf(file));
    this.save();
  }

  // Without storage, the notes last until the page is closed.
  save() {
    try {
      if (!this.viewed.size && !this.comments.length && !this.request) {
        localStorage.removeItem(this.#key);
        return;
      }
      const { viewed, comments, request } = this;
      localStorage.setItem(this.#key, JSON.stringify({ at: Date.now(), viewed: [...viewed], comments, request }));
      removeOldest();
    } catch (error) {
      console.info(`not stored: ${error.message}`);
    }
  }
}

export function forgetReview(patchName) {
  try {
    localStorage.removeItem(PREFIX + patchName);
  } catch {
    // Without storage, there are no notes.
  }
}

const isComment = (one) =>
  ["path", "side", "text"].every((name) => typeof one?.[name] === "string") && Number.isInteger(one.line);

function read(key) {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? {};
  } catch {
    return {};
  }
}

function removeOldest() {
  const keys = Object.keys(localStorage).filter((key) => key.startsWith(PREFIX));
  if (keys.length <= TASKS_MAX) return;
  const ages = keys.map((key) => [Number(read(key).at) || 0, key]).sort(([first], [second]) => first - second);
  for (const [, key] of ages.slice(0, keys.length - TASKS_MAX)) localStorage.removeItem(key);
}

const digests = new WeakMap();

// A digest of a file's changes, so that a mark as viewed does not apply to other changes to the same path.
function digestOf(file) {
  if (!digests.has(file)) {
    const hash = new Hash();
    for (const part of [file.oldPath, file.path, file.kind, ...file.modes]) hash.add(part);
    for (const hunk of file.hunks) {
      hash.add(hunk.header);
      for (const line of hunk.lines) hash.add(line);
    }
    digests.set(file, hash.text());
  }
  return digests.get(file);
}

// Two 32-bit multiplicative hashes, because `crypto.subtle` does not exist on a page that was loaded over plain HTTP.
class Hash {
  #first = 0xdeadbeef;
  #second = 0x41c6ce57;

  add(text) {
    for (let at = 0; at <= text.length; at++) {
      const code = at < text.length ? text.charCodeAt(at) : 0x10000;
      this.#first = Math.imul(this.#first ^ code, 0x9e3779b1);
      this.#second = Math.imul(this.#second ^ code, 0x5f356495);
    }
  }

  text() {
    return [this.#first, this.#second].map((part) => (part >>> 0).toString(36)).join("-");
  }
}
