// The heights of many lines, with fast sums: where a line begins, and which line is at a position.

const BLOCK = 256;

export class LineHeights {
  #heights = new Uint32Array(1024);
  #blocks = [];
  #count = 0;
  #total = 0;

  get count() {
    return this.#count;
  }

  get total() {
    return this.#total;
  }

  push(height) {
    if (this.#count === this.#heights.length) {
      const larger = new Uint32Array(this.#count * 2);
      larger.set(this.#heights);
      this.#heights = larger;
    }
    this.#heights[this.#count++] = 0;
    if (this.#blocks.length * BLOCK < this.#count) this.#blocks.push(0);
    this.set(this.#count - 1, height);
  }

  // Set the height of a line; return the change.
  set(at, height) {
    const change = height - this.#heights[at];
    this.#heights[at] = height;
    this.#blocks[Math.floor(at / BLOCK)] += change;
    this.#total += change;
    return change;
  }

  truncate(count) {
    while (this.#count > count) {
      this.set(this.#count - 1, 0);
      this.#count--;
    }
    this.#blocks.length = Math.ceil(this.#count / BLOCK);
  }

  // Remove the first lines; return their height.
  dropFirst(count) {
    const height = this.offsetOf(count);
    this.#heights.copyWithin(0, count, this.#count);
    this.#count -= count;
    this.#blocks = [];
    for (let at = 0; at < this.#count; at++) {
      const block = Math.floor(at / BLOCK);
      this.#blocks[block] = (this.#blocks[block] ?? 0) + this.#heights[at];
    }
    this.#total -= height;
    return height;
  }

  offsetOf(at) {
    const block = Math.floor(at / BLOCK);
    let offset = 0;
    for (let each = 0; each < block; each++) offset += this.#blocks[each];
    for (let each = block * BLOCK; each < at; each++) offset += this.#heights[each];
    return offset;
  }

  // The line at a position; the last one for positions past the end.
  indexAt(offset) {
    let block = 0;
    while (block < this.#blocks.length - 1 && offset >= this.#blocks[block]) offset -= this.#blocks[block++];
    let at = block * BLOCK;
    while (at < this.#count - 1 && offset >= this.#heights[at]) offset -= this.#heights[at++];
    return at;
  }
}
