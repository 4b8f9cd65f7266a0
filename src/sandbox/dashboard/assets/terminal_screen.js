// What a terminal shows, as lines of text: redrawn lines appear once, as in a terminal. Colors are kept.
import { withoutColors } from "/assets/untrusted_text.js";

// Rows above the screen that a program may still redraw.
const ROWS_MAX = 500;
const HEIGHT = 24; // of a terminal without an attached client
const HEIGHT_MAX = 200;
const COLUMNS_MAX = 2000;
const ROW_CHARACTERS_MAX = 100_000;
const TAB_COLUMNS = 8;
const INCOMPLETE_CHARACTERS_MAX = 4096;
const SCROLL_EVIDENCE_ROWS = 2;

const STRING = String.raw`\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)`; // for example the window's title
const SEQUENCE = String.raw`\x1b\[([0-?]*)[ -/]*([@-~])`;
const ESCAPE = String.raw`\x1b[ -/]*([0-~])`;
const TOKEN = new RegExp(String.raw`${STRING}|${SEQUENCE}|${ESCAPE}|([\0-\x1f\x7f])|[^\0-\x1f\x7f]+`, "gu");
const INCOMPLETE = /\x1b(?:\[[0-?]*[ -/]*|[\]PX^_][^\x07\x1b]*\x1b?|[ -/]*)$/;
const CLUSTERS = /\P{M}(?:\p{M}|\u200d|\ufe0e|\ufe0f)*|\p{M}/gu;
const SIMPLE = /^[\x20-\x7e]*$/;
const WIDE =
  /^(?:\p{Emoji_Presentation}|[\u1100-\u115f\u2e80-\u303e\u3041-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6\u{20000}-\u{3fffd}])/u;

// The attributes of text, and the codes that reset them.
const ATTRIBUTES = new Map([
  [1, "weight"],
  [2, "weight"],
  [22, "weight"],
  [3, "italic"],
  [23, "italic"],
  [4, "under"],
  [24, "under"],
  [7, "reverse"],
  [27, "reverse"],
]);
const RESETS = new Set([22, 23, 24, 27]);

class Style {
  #set = new Map();
  text = "";

  apply(parameters) {
    const codes = parameters.split(/[;:]/).map((code) => Number(code) || 0);
    for (let at = 0; at < codes.length; at++) {
      const code = codes[at];
      const name = ATTRIBUTES.get(code);
      if (code === 0) this.#set.clear();
      else if (name) RESETS.has(code) ? this.#set.delete(name) : this.#set.set(name, code);
      else if (code === 39) this.#set.delete("color");
      else if ((code >= 30 && code <= 37) || (code >= 90 && code <= 97)) this.#set.set("color", code);
      else if (code === 38 || code === 48) {
        const length = codes[at + 1] === 5 ? 3 : 5;
        if (code === 38) this.#set.set("color", codes.slice(at, at + length).join(";"));
        at += length - 1;
      }
    }
    this.text = this.#set.size ? `\x1b[0;${[...this.#set.values()].join(";")}m` : "";
  }
}

class Row {
  #characters = [];
  #styles = [];
  #text = "";

  // Create a row that has only a text, because it is never redrawn.
  static copy({ text, at }) {
    const row = new Row(at);
    row.#text = text;
    return row;
  }

  constructor(at = 0) {
    this.at = at;
  }

  // The text with its colors, without spaces at the end.
  get text() {
    if (this.#text === null) {
      const last = this.#characters.findLastIndex((character) => character !== " " && character !== "\xa0");
      this.#text = this.#join(last + 1);
    }
    return this.#text;
  }

  get textWithSpaces() {
    return this.#join(this.#characters.length) || this.text;
  }

  #join(length) {
    let text = "";
    let style = "";
    for (let at = 0; at < length; at++) {
      if (this.#styles[at] !== style) {
        style = this.#styles[at];
        text += style || "\x1b[m";
      }
      text += this.#characters[at];
    }
    return style ? `${text}\x1b[m` : text;
  }

  write(column, characters, style, at) {
    this.#fill(this.#characters.length, column);
    for (const character of characters) {
      this.#characters[column] = character;
      this.#styles[column++] = style;
    }
    this.#change(at);
  }

  // Fill columns with spaces.
  #fill(first, end) {
    for (let column = first; column < end; column++) {
      this.#characters[column] = " ";
      this.#styles[column] = "";
    }
  }

  erase(first, count, at) {
    this.#fill(first, Math.min(first + count, this.#characters.length));
    this.#change(at);
  }

  // Remove columns, or insert spaces. Longer rows come from programs that draw on no screen, and stay unchanged.
  shift(column, removed, inserted, at) {
    if (column >= this.#characters.length || this.#characters.length > COLUMNS_MAX) return;
    this.#characters.splice(column, removed, ...Array(inserted).fill(" "));
    this.#styles.splice(column, removed, ...Array(inserted).fill(""));
    this.#change(at);
  }

  truncate(column, at) {
    if (column >= this.#characters.length) return;
    this.#characters.length = this.#styles.length = column;
    this.#change(at);
  }

  #change(at) {
    this.at = at;
    this.#text = null;
  }
}

export class TerminalScreen {
  // The rows that a program may still redraw. The screen begins at #top; all numbers of rows are positions in #rows.
  #rows = [new Row()];
  #top = 0;
  #height = HEIGHT;
  #row = 0;
  #column = 0;
  #saved = { row: 0, column: 0 };
  #region = null; // the rows that scroll, relative to the top: [first, last]
  #style = new Style();
  #isAlternate = false;
  #before = []; // the text of the screen's rows after the last write
  #incomplete = "";
  #final = [];
  #isAfterBlank = true; // whether the last final line is blank
  #at = 0;

  // Process output. Return the lines that can no longer change, each with its text and time: { text, at }.
  write(data, at) {
    this.#at = at;
    const text = this.#incomplete + data;
    const end = INCOMPLETE.exec(text)?.[0] ?? "";
    this.#incomplete = end.length < INCOMPLETE_CHARACTERS_MAX ? end : "";
    const complete = text.slice(0, text.length - this.#incomplete.length);
    for (const [token, parameters, final, single, control] of complete.matchAll(TOKEN)) {
      if (final) this.#sequence(parameters, final);
      else if (single) this.#escape(single);
      else if (control) this.#control(control);
      else if (token[0] !== "\x1b") this.#print(token);
    }
    if (this.#isAlternate) this.#keepScrolledRows();
    return this.#take();
  }

  // The lines that may still change: { text, at }, without blank lines at the end.
  get lines() {
    const lines = this.#rows.map((row, at) => ({ at: row.at, text: at === this.#row ? row.textWithSpaces : row.text }));
    return withoutRepeatedBlanks(lines.slice(0, lines.findLastIndex(({ text }) => text) + 1), this.#isAfterBlank);
  }

  // Make all lines final, and return them. The screen is empty afterwards.
  end() {
    this.#finish();
    return this.#take();
  }

  #take() {
    const lines = this.#final;
    this.#final = [];
    return lines;
  }

  #keep(lines) {
    for (const line of withoutRepeatedBlanks(lines, this.#isAfterBlank)) this.#final.push(line);
    if (lines.length) this.#isAfterBlank = !lines.at(-1).text;
  }

  #finish() {
    this.#keep(this.lines);
    this.#rows = [new Row(this.#at)];
    this.#top = this.#row = this.#column = 0;
    this.#region = null;
    this.#before = [];
  }

  get #current() {
    while (this.#rows.length <= this.#row) this.#rows.push(new Row(this.#at));
    return this.#rows[this.#row];
  }

  #print(text) {
    const characters = SIMPLE.test(text) ? text : clusters(text);
    this.#current.write(this.#column, characters, this.#style.text, this.#at);
    this.#column += characters.length;
    if (this.#column > ROW_CHARACTERS_MAX) {
      this.#newLine();
      this.#column = 0;
    }
  }

  #control(character) {
    if (character === "\r") this.#column = 0;
    else if (character === "\n" || character === "\v" || character === "\f") this.#newLine();
    else if (character === "\b") this.#column = Math.max(0, this.#column - 1);
    else if (character === "\t") this.#moveToColumn((Math.floor(this.#column / TAB_COLUMNS) + 1) * TAB_COLUMNS);
  }

  #escape(final) {
    if (final === "7") this.#save();
    else if (final === "8") this.#restore();
    else if (final === "D") this.#newLine();
    else if (final === "E") {
      this.#column = 0;
      this.#newLine();
    } else if (final === "M") this.#reverseLine();
    else if (final === "c") {
      this.#finish();
      this.#isAlternate = false;
      this.#style = new Style();
    }
  }

  #save() {
    this.#saved = { row: this.#row - this.#top, column: this.#column };
  }

  #restore() {
    this.#row = this.#top + this.#saved.row;
    this.#column = this.#saved.column;
  }

  #sequence(parameters, final) {
    if (final === "m") {
      if (!/^[<=>?]/.test(parameters)) this.#style.apply(parameters);
      return;
    }
    if (parameters[0] === "?") {
      if ((final === "h" || final === "l") && /(?:^|;)(?:47|1047|1049)$/.test(parameters.slice(1)))
        this.#selectScreen(final === "h");
      return;
    }
    const [first = 0, second = 0] = parameters.split(";").map((each) => Math.min(Number(each) || 0, COLUMNS_MAX));
    const count = first || 1;
    const row = this.#row;
    if (final === "A" || final === "F") this.#row = Math.max(this.#isAlternate ? this.#top : 0, row - count);
    else if (final === "B" || final === "E" || final === "e")
      this.#row = Math.min(row + count, Math.max(row, this.#bottom));
    else if (final === "C" || final === "a") this.#moveToColumn(this.#column + count);
    else if (final === "D") this.#column = Math.max(0, this.#column - count);
    else if (final === "G" || final === "`") this.#moveToColumn(count - 1);
    else if (final === "H" || final === "f") this.#moveTo(count, second || 1);
    else if (final === "d") this.#moveTo(count, this.#column + 1);
    else if (final === "s") this.#save();
    else if (final === "u") this.#restore();
    else if (final === "r") this.#selectRegion(first, second);
    else if (final === "J") this.#eraseScreen(first);
    else if (final === "K") this.#eraseRow(first);
    else if (final === "X") this.#current.erase(this.#column, count, this.#at);
    else if (final === "P") this.#current.shift(this.#column, count, 0, this.#at);
    else if (final === "@") this.#current.shift(this.#column, 0, count, this.#at);
    else if (final === "L") this.#moveRows(row, -count);
    else if (final === "M") this.#moveRows(row, count);
    else if (final === "S") this.#scroll(count);
    else if (final === "T") this.#moveRows(this.#regionFirst, -count);
    if (final === "E" || final === "F") this.#column = 0;
  }

  // A program on the alternate screen draws the whole screen. A switch makes the current content final.
  #selectScreen(isAlternate) {
    if (isAlternate === this.#isAlternate) return;
    this.#isAlternate = isAlternate;
    this.#finish();
  }

  get #bottom() {
    return this.#top + this.#height - 1;
  }

  get #regionFirst() {
    return this.#top + (this.#region?.[0] ?? 0);
  }

  get #regionLast() {
    return this.#region ? this.#top + this.#region[1] : this.#bottom;
  }

  #selectRegion(first, last) {
    const end = Math.min(last || this.#height, HEIGHT_MAX);
    this.#region = first > 1 || end < this.#height ? [Math.max(first, 1) - 1, Math.max(first, end) - 1] : null;
    this.#row = this.#top;
    this.#column = 0;
  }

  #moveTo(row, column) {
    // The size of the window is not recorded. If a program moves to a row, the window is at least that high.
    if (row <= HEIGHT_MAX) this.#height = Math.max(this.#height, row);
    this.#row = this.#top + Math.min(row, this.#height) - 1;
    this.#moveToColumn(column - 1);
  }

  #moveToColumn(column) {
    this.#column = Math.min(column, Math.max(COLUMNS_MAX, this.#column));
  }

  #newLine() {
    if (this.#row !== this.#regionLast) this.#row++;
    else if (this.#region) this.#scroll(1);
    else {
      this.#row++;
      this.#top++;
    }
    this.#dropRows();
  }

  // The oldest rows can no longer be redrawn.
  #dropRows() {
    const number = this.#top - ROWS_MAX;
    if (number < ROWS_MAX / 2) return;
    this.#keep(this.#rows.splice(0, number).map(({ at, text }) => ({ at, text })));
    this.#top -= number;
    this.#row -= number;
  }

  #reverseLine() {
    if (this.#row === this.#regionFirst) this.#moveRows(this.#regionFirst, -1);
    else this.#row = Math.max(this.#top, this.#row - 1);
  }

  // Scroll up. Rows that leave the top of the screen are kept above it.
  #scroll(count) {
    const first = this.#regionFirst;
    if (first !== this.#top) {
      this.#moveRows(first, count);
      return;
    }
    const number = Math.min(count, this.#regionLast - first + 1);
    this.#fillRows(this.#regionLast);
    this.#rows.splice(this.#regionLast + 1, 0, ...Array.from({ length: number }, () => new Row(this.#at)));
    this.#top += number;
    this.#row += number;
    this.#dropRows();
  }

  #fillRows(last) {
    while (this.#rows.length <= last) this.#rows.push(new Row(this.#at));
  }

  // Move the rows from `first` to the end of the region up by `count` rows; down if it is negative.
  #moveRows(first, count) {
    const last = this.#regionLast;
    if (first > last) return;
    this.#fillRows(last);
    const number = Math.min(Math.abs(count), last - first + 1);
    const blank = Array.from({ length: number }, () => new Row(this.#at));
    if (count > 0) {
      this.#rows.splice(first, number);
      this.#rows.splice(last - number + 1, 0, ...blank);
    } else {
      this.#rows.splice(last - number + 1, number);
      this.#rows.splice(first, 0, ...blank);
    }
  }

  // which: 0 to the end, 1 from the beginning, 2 all, 3 all and the rows above the screen.
  #eraseScreen(which) {
    if (which === 0 || which === 1) this.#eraseRow(which);
    if (which === 0) this.#rows.length = Math.min(this.#rows.length, this.#row + 1);
    else if (which === 1) for (const row of this.#rows.slice(this.#top, this.#row)) row.truncate(0, this.#at);
    else if (which === 2) {
      this.#rows.length = Math.min(this.#rows.length, this.#top);
      this.#height = Math.max(HEIGHT, this.#row - this.#top + 1);
    } else if (which === 3) {
      this.#rows.splice(0, this.#top);
      this.#row -= this.#top;
      this.#top = 0;
    }
  }

  #eraseRow(which) {
    if (which === 0) this.#current.truncate(this.#column, this.#at);
    else if (which === 1) this.#current.erase(0, this.#column + 1, this.#at);
    else if (which === 2) this.#current.truncate(0, this.#at);
  }

  // A full-screen program scrolls by drawing its text again further up. Keep the rows that it scrolled off, and drop
  // those that it scrolled back into view.
  #keepScrolledRows() {
    const before = this.#before;
    this.#before = this.#rows.slice(this.#top, this.#top + this.#height).map(({ at, text }) => ({ at, text }));
    if (isAt(before, this.#before, 0)) return;
    const returned = returnedRows(this.#rows.slice(0, this.#top), this.#before);
    this.#rows.splice(this.#top - returned, returned);
    this.#top -= returned;
    this.#row -= returned;
    const number = returned ? 0 : scrolledRows(before, this.#before);
    if (!number) return;
    this.#rows.splice(this.#top, 0, ...before.slice(0, number).map(Row.copy));
    this.#top += number;
    this.#row += number;
    this.#dropRows();
  }
}

// The number of rows at the end of `above` that are also at the beginning of a screen.
function returnedRows(above, now) {
  for (let number = Math.min(above.length, now.length); number > 0; number--) {
    const rows = above.slice(-number);
    if (rows.every((row, at) => isSame(row, now[at])) && rows.some(({ text }) => text)) return number;
  }
  return 0;
}

// The number of rows by which the beginning of a screen has moved up; 0 if it has not.
function scrolledRows(before, now) {
  for (let number = 1; number < before.length; number++) if (isAt(before, now, number)) return number;
  return 0;
}

// Ignore colors, because a program may also recolor text that has not moved.
const isSame = (one, other) => one.text === other.text || withoutColors(one.text) === withoutColors(other.text);

function isAt(before, now, offset) {
  let evidence = 0;
  for (let at = 0; at < now.length && at + offset < before.length && isSame(before[at + offset], now[at]); at++)
    if (now[at].text && ++evidence === SCROLL_EVIDENCE_ROWS) return true;
  return false;
}

// Return the lines with at most one blank line in a row.
function withoutRepeatedBlanks(lines, isAfterBlank) {
  return lines.filter(({ text }, at) => text || !(at ? !lines[at - 1].text : isAfterBlank));
}

// The characters by column: a wide character is followed by an empty one.
function clusters(text) {
  const characters = [];
  for (const [cluster] of text.matchAll(CLUSTERS)) {
    characters.push(cluster);
    if (WIDE.test(cluster)) characters.push("");
  }
  return characters;
}
