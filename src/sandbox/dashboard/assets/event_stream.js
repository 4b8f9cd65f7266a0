// A task's event stream: events after `after`, then live events. Reconnects as often as necessary, without gaps.

const RETRY_MILLISECONDS = [500, 1000, 2000, 4000, 8000];

// onEvents receives arrays of events in order, and their size in characters. onConnection receives "live", "lost" or "over".
// Returns `end` to stop the stream, and `hold` to pause it while too much is pending.
export function follow(url, after, onEvents, onConnection) {
  let source = null;
  let last = after;
  let failures = 0;
  let timer = 0;
  let isOver = false;
  let isHeld = false;

  function open() {
    clearTimeout(timer);
    if (isOver || isHeld || document.hidden || source) return;
    source = new EventSource(`${url}?after=${last}`);
    source.onopen = () => {
      failures = 0;
      onConnection("live");
    };
    source.onmessage = (message) => {
      const events = JSON.parse(message.data).filter((event) => event.seq > last || event.type === "gap");
      if (!events.length) return;
      last = Math.max(last, events.at(-1).seq);
      if (events.at(-1).type === "end") {
        isOver = true;
        close();
      }
      onEvents(events, message.data.length);
      if (isOver) onConnection("over");
    };
    // Browsers do not retry after every error. Always retry here, from the last event.
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

  // Browsers limit the number of connections to a server, so close the connection of a hidden page.
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
    hold(shouldHold) {
      if (isHeld === shouldHold) return;
      isHeld = shouldHold;
      isHeld ? close() : open();
    },
  };
}
