// The words in which two lines differ, as ranges of both texts.

const LENGTH_MAX = 2000;
const TOKENS_MAX = 160; // the time grows with the square of this number
// Lines that have less in common than this are shown without marks, because the marks would cover nearly everything.
const COMMON_MIN = 0.4;

const WORDS = /[\p{L}\p{N}_]+|\s+|./gsu;

// Return [ranges of before, ranges of after], each range as [start, end].
export function wordDiff(before, after) {
  const none = [[], []];
  if (before === after || before.length > LENGTH_MAX || after.length > LENGTH_MAX) return none;
  const [old, next] = [before.match(WORDS) ?? [], after.match(WORDS) ?? []];
  let head = 0;
  while (head < old.length && head < next.length && old[head] === next[head]) head++;
  let tail = 0;
  const shorter = Math.min(old.length, next.length);
  while (tail < shorter - head && old[old.length - 1 - tail] === next[next.length - 1 - tail]) tail++;
  const [oldMiddle, nextMiddle] = [old.slice(head, old.length - tail), next.slice(head, next.length - tail)];
  if (oldMiddle.length > TOKENS_MAX || nextMiddle.length > TOKENS_MAX) return none;
  const [isOldKept, isNextKept] = commonTokens(oldMiddle, nextMiddle);
  const keep = (isKept, count) => (at) => at < head || at >= count - tail || isKept[at - head] === 1;
  const oldRanges = ranges(old, keep(isOldKept, old.length));
  const nextRanges = ranges(next, keep(isNextKept, next.length));
  const isSimilar = commonShare(before, oldRanges) >= COMMON_MIN || commonShare(after, nextRanges) >= COMMON_MIN;
  return isSimilar ? [oldRanges, nextRanges] : none;
}

// Mark the tokens of a longest common subsequence.
function commonTokens(old, next) {
  const width = next.length + 1;
  const lengths = new Uint16Array((old.length + 1) * width);
  for (let i = old.length - 1; i >= 0; i--)
    for (let j = next.length - 1; j >= 0; j--)
      lengths[i * width + j] =
        old[i] === next[j]
          ? lengths[(i + 1) * width + j + 1] + 1
          : Math.max(lengths[(i + 1) * width + j], lengths[i * width + j + 1]);
  const kept = [new Uint8Array(old.length), new Uint8Array(next.length)];
  for (let i = 0, j = 0; i < old.length && j < next.length; ) {
    if (old[i] === next[j]) kept[0][i++] = kept[1][j++] = 1;
    else if (lengths[(i + 1) * width + j] >= lengths[i * width + j + 1]) i++;
    else j++;
  }
  return kept;
}

// Join changed tokens; white space between two changed words belongs to the change.
function ranges(tokens, isKept) {
  const result = [];
  let offset = 0;
  tokens.forEach((token, at) => {
    if (!isKept(at)) {
      const last = result.at(-1);
      if (last && last[1] === offset) last[1] += token.length;
      else result.push([offset, offset + token.length]);
    } else if (result.at(-1)?.[1] === offset && /^\s+$/.test(token) && at + 1 < tokens.length && !isKept(at + 1))
      result.at(-1)[1] += token.length;
    offset += token.length;
  });
  return result;
}

// The share of characters outside the ranges, not counting white space.
function commonShare(text, changed) {
  const letters = (part) => part.replace(/\s+/g, "").length;
  const whole = letters(text);
  return whole ? 1 - changed.reduce((sum, [start, end]) => sum + letters(text.slice(start, end)), 0) / whole : 0;
}
