// Syntax colors by highlight.js, which runs in a worker.

const CHARACTERS_MAX = 300_000;
const LINE_CHARACTERS_MAX = 20_000;
const REPLY_MILLISECONDS_MAX = 4000;
const SLOW_TEXTS_MAX = 3; // after this many slow texts, further texts are shown without colors

export const STYLES = ["", "s-c", "s-s", "s-k", "s-n", "s-f", "s-v"];

const LANGUAGES = {
  bash: "sh bash zsh ksh bashrc zshrc profile",
  c: "c h",
  cpp: "cc cpp cxx hh hpp hxx ino",
  csharp: "cs",
  css: "css",
  go: "go",
  graphql: "graphql gql",
  ini: "ini cfg conf toml properties editorconfig gitconfig",
  java: "java",
  javascript: "js mjs cjs jsx",
  json: "json jsonc ipynb webmanifest",
  kotlin: "kt kts",
  less: "less",
  lua: "lua",
  makefile: "mk makefile gnumakefile",
  markdown: "md markdown mdx",
  objectivec: "m mm",
  perl: "pl pm",
  php: "php",
  python: "py pyi pyw",
  r: "r",
  ruby: "rb gemfile rakefile gemspec",
  rust: "rs",
  scss: "scss",
  sql: "sql",
  swift: "swift",
  typescript: "ts tsx mts cts",
  vbnet: "vb",
  wasm: "wat",
  xml: "xml html htm xhtml svg vue svelte xsl plist csproj",
  yaml: "yml yaml",
};
const BY_ENDING = new Map(
  Object.entries(LANGUAGES).flatMap(([language, endings]) =>
    [language, ...endings.split(" ")].map((ending) => [ending, language]),
  ),
);

// The language of a file, by the end of its name; undefined if unknown.
export function languageOf(path) {
  const name = path.slice(path.lastIndexOf("/") + 1).toLowerCase();
  return BY_ENDING.get(name.slice(name.lastIndexOf(".") + 1));
}

let worker = null;
let slowCount = 0;
let lastId = 0;
let running = Promise.resolve();

// Return the spans of each text as [start, end, index of STYLES, …]; an empty list if the texts are not highlighted.
export function highlight(language, texts) {
  const characters = texts.reduce((sum, text) => sum + text.length, 0);
  if (!language || characters > CHARACTERS_MAX || texts.some(hasLongLine)) return Promise.resolve([]);
  running = running.then(() => ask(language, texts)).catch(() => []);
  return running;
}

function hasLongLine(text) {
  for (let begin = 0; begin < text.length; ) {
    const end = text.indexOf("\n", begin);
    if ((end < 0 ? text.length : end) - begin > LINE_CHARACTERS_MAX) return true;
    if (end < 0) return false;
    begin = end + 1;
  }
  return false;
}

// One text at a time, so that the time limit applies to each.
function ask(language, texts) {
  if (slowCount >= SLOW_TEXTS_MAX) return [];
  worker ??= new Worker("/assets/highlight_worker.js", { type: "module" });
  const id = ++lastId;
  const current = worker;
  return new Promise((resolve) => {
    const end = (spans, isSlow) => {
      clearTimeout(timer);
      current.onmessage = current.onerror = null;
      if (isSlow) {
        slowCount++;
        current.terminate();
        worker = null;
      }
      resolve(spans);
    };
    const timer = setTimeout(() => end([], true), REPLY_MILLISECONDS_MAX);
    current.onmessage = ({ data }) => data.id === id && end(data.spans, false);
    current.onerror = () => end([], true);
    current.postMessage({ id, language, texts });
  });
}
