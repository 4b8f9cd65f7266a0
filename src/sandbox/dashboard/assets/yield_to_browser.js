// Splits long work into slices, so that the page stays responsive.

const SLICE_MILLISECONDS = 12;

let sliceEnd = 0;
const waiting = [];
const channel = new MessageChannel();
channel.port1.onmessage = () => {
  sliceEnd = performance.now() + SLICE_MILLISECONDS;
  waiting.shift()?.();
};

// Continue immediately within a slice; otherwise, continue after the browser has handled input.
export function pause() {
  if (performance.now() < sliceEnd) return undefined;
  return new Promise((resolve) => {
    waiting.push(resolve);
    channel.port2.postMessage(null);
  });
}

// Append an element for each item. `isCurrent` ends the work early.
export async function appendInSlices(parent, items, create, isCurrent = () => true) {
  for (const item of items) {
    await pause();
    if (!isCurrent()) return;
    parent.append(create(item));
  }
}
