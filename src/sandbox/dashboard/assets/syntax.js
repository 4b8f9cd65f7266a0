// Syntax highlighting of single lines, for what most languages have in common: comments, strings, numbers, keywords.

const HASH = new Set(
  "py rb sh bash zsh yml yaml toml pl r mk cmake dockerfile makefile conf ini tf nix ex exs".split(" "),
);
const SLASH = new Set(
  "js mjs cjs ts tsx jsx c h cc cpp hpp cs java kt go rs swift scala php css scss less dart proto sol zig json jsonc".split(
    " ",
  ),
);
const DASH = new Set("sql lua hs elm".split(" "));

const WORDS = new Set(
  `abstract and as assert async await base bool boolean break case catch char class const continue def default defer del delete do double
  elif else end enum except export extends extern false final finally float fn for from func function global go goto if impl implements
  import in int interface internal is lambda let local long loop match mod module mut namespace new nil None none nonlocal not null
  object of or override package pass private protected public pub raise range readonly return self short static string struct super
  switch then this throw throws trait true True False try type typeof undefined union unless unsafe until use using val var virtual
  void when where while with yield select insert update create table SELECT FROM WHERE INSERT UPDATE CREATE TABLE`.split(
    /\s+/,
  ),
);

const LENGTH_MAX = 600;

const patterns = new Map();

function pattern(kind) {
  if (!patterns.has(kind)) {
    const comment = { hash: "#.*$", slash: "\\/\\/.*$|\\/\\*.*?(?:\\*\\/|$)", dash: "--.*$" }[kind];
    patterns.set(
      kind,
      new RegExp(
        `(${comment})|("(?:[^"\\\\]|\\\\.)*"?|'(?:[^'\\\\]|\\\\.)*'?|\`[^\`]*\`?)|\\b(\\d[\\w.]*)|([A-Za-z_]\\w*)`,
        "g",
      ),
    );
  }
  return patterns.get(kind);
}

function kindOf(path) {
  const name = path.slice(path.lastIndexOf("/") + 1).toLowerCase();
  const ending = name.includes(".") ? name.slice(name.lastIndexOf(".") + 1) : name;
  if (HASH.has(ending)) return "hash";
  if (SLASH.has(ending)) return "slash";
  return DASH.has(ending) ? "dash" : null;
}

// Return a function that splits a line into [text, class].
export function highlighter(path) {
  const kind = kindOf(path);
  if (!kind) return (line) => [[line, ""]];
  return (line) => {
    if (line.length > LENGTH_MAX) return [[line, ""]];
    const pieces = [];
    const search = pattern(kind);
    let end = 0;
    search.lastIndex = 0;
    for (let match; (match = search.exec(line)); end = search.lastIndex) {
      const style = match[1] ? "s-c" : match[2] ? "s-s" : match[3] ? "s-n" : WORDS.has(match[4]) ? "s-k" : "";
      if (match.index > end) pieces.push([line.slice(end, match.index), ""]);
      pieces.push([match[0], style]);
    }
    if (end < line.length) pieces.push([line.slice(end), ""]);
    return pieces;
  };
}
