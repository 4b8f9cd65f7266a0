// A task's story from the server: from `after` on, then live, over as many connections as it takes, without a hole.

const RETRY_MILLISECONDS = [500, 1000, 2000, 4000, 8000];

// onFrames: arrays of frames in their order, and their size in characters. onConnection: "live", "lost" or "over".
// Gives what ends it, and what holds it while there is too much already.
export function follow(address, after, onFrames, onConnection) {
  let source = null;
  let last = after;
  let failures = 0;
  let timer = 0;
  let isOver = false;
  let isHeld = false;

  function open() {
    clearTimeout(timer);
    if (isOver || isHeld || document.hidden || source) return;
    source = new EventSource(`${address}?after=${last}`);
    source.onopen = () => {
      failures = 0;
      onConnection("live");
    };
    source.onmessage = (event) => {
      const frames = JSON.parse(event.data).filter((frame) => frame.seq > last || frame.type === "gap");
      if (!frames.length) return;
      last = Math.max(last, frames.at(-1).seq);
      if (frames.at(-1).type === "end") {
        isOver = true;
        close();
      }
      onFrames(frames, event.data.length);
      if (isOver) onConnection("over");
    };
    // A browser gives up on some errors and not on others; here every one is tried again, from the last event on.
    source.onerror = () => {
      close();
      if (isOver) return;
      onConnection("lost");
      timer = setTimeout(open, RETRY_MILLISECONDS[Math.min(failures++, RETRY_MILLISECONDS.length - 1)]);
    };
  }

  function close() {
    source?.close();
    source = null;
  }

  // A browser has few connections to one server, so a page that nobody sees gives its own back.
  document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
  window.addEventListener("online", open);
  window.addEventListener("pagehide", close);
  open();
  return {
    end() {
      isOver = true;
      close();
      onConnection("over");
    },
    hold(isWished) {
      if (isHeld === isWished) return;
      isHeld = isWished;
      isHeld ? close() : open();
    },
  };
}
