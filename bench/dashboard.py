"""Measures one dashboard page under load, and the cost of many pages: `python bench/dashboard.py [SECONDS] [PAGES]`.

A task records 1,000 events per second in a real journal (for SECONDS, default 60): lines of output, a tenth of them the
agent's messages, tool calls and their results, some refused connections and metrics. Chromium shows the task's page:
first the conversation, then the output. Prints the page's long tasks (as defined by the browser: periods in which the
page does not respond), its memory, and whether the page received all events. Then PAGES (default 200) clients follow
the task in the same way as a page. Prints the growth of the server's memory. Before both measurements, Chromium opens
the Changes tab for a patch with 151 files and 23,000 lines, scrolls through it, jumps to the start and changes the
layout. Prints the first paint, the first lines, and the long tasks.
"""

import asyncio
import multiprocessing
import os
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

EVENTS_PER_SECOND = 1000
TICKS_PER_SECOND = 20
TASK = "task-001"
MANY_SECONDS = 10
RECORD_BLOCKED_TIME_SCRIPT = """window.longTasks = [];
const note = (list) => window.longTasks.push(...list.getEntries().map((entry) => Math.round(entry.duration)));
new PerformanceObserver(note)
  .observe({ type: "longtask", buffered: true });"""
FIRST_LINES = """window.firstLines = new Promise((resolve) => {
    new MutationObserver((_, observer) => {
        if (!document.querySelector(".diff-block tr")) return;
        observer.disconnect();
        requestAnimationFrame(() => resolve(performance.now()));
    }).observe(document, { childList: true, subtree: true });
});"""
PAINT_TIMES = """async () => {
    const lines = await window.firstLines;
    return [performance.getEntriesByName("first-contentful-paint")[0].startTime, lines];
}"""
SCROLL_TO_END = """async () => {
    for (let at = 0; at < document.documentElement.scrollHeight; at += 600) {
        window.scrollTo(0, at);
        await new Promise((done) => setTimeout(done, 30));
    }
}"""
PATCH_LINES = """ class Handler{0}(Base):
     def process(self, items: list[str]) -> int:
-        total = 0
-        for item in items:
-            total += self.measure(item, "width")
-        return total
+        sizes = [self.measure(item, "height") for item in items]
+        # The largest one counts.
+        return max(sizes, default=0)
+
"""
LINE = b"a line of output as programs print it, \x1b[32mwith colors\x1b[0m: %d\n"
MESSAGE = "I looked at `module_{0}` and found **one** more place:\n\n- it reads the file twice\n- it never closes it\n"


def main(seconds: int = 60, pages: int = 200) -> None:
    """Measure one page for `seconds`, then many pages."""
    print(f"load average before: {os.getloadavg()[0]:.2f}", flush=True)
    measure_patch()
    own_end, server_end = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve_one_task, args=(server_end,))
    server.start()
    port = own_end.recv()
    measure_one_page(own_end, port, seconds)
    asyncio.run(measure_many_pages(own_end, port, pages))
    own_end.send(None)
    server.join(20)
    print(f"load average after: {os.getloadavg()[0]:.2f}")


def measure_patch() -> None:
    """Print how fast a large patch is shown, and whether the page responds while the user reads the patch."""
    from doubles.browser import open_chromium
    from doubles.deployment import Deployment
    from doubles.stored_tasks import StoredTasks

    with tempfile.TemporaryDirectory() as directory, open_chromium() as program, program.browser() as browser:
        deployment = Deployment(Path(directory))
        tasks = StoredTasks(deployment.data_dir)
        tasks.current_time = datetime.now(UTC) - timedelta(hours=1)
        tasks.add_completed_task(TASK, artifacts=[(f"{TASK}.patch", make_patch().encode())])
        tasks.index()
        deployment.model_url = "http://127.0.0.1:9"  # not used
        deployment.start_server()
        try:
            for attempt in ("first visit", "second visit"):
                url = f"{deployment.server.ready_message['http']}/tasks/{TASK}#changes"
                page = browser.open(url, init_script=RECORD_BLOCKED_TIME_SCRIPT + FIRST_LINES)
                page.locator(".diff-block tr").first.wait_for()
                measure_reading(page, attempt)
                page.close()
        finally:
            deployment.close()


def measure_reading(page, attempt: str) -> None:
    """Print the long tasks while loading, scrolling to the end, jumping to the start, and changing the layout."""
    paint, lines = page.evaluate(PAINT_TIMES)
    page.wait_for_timeout(2000)
    print(f"patch, {attempt}: first contentful paint after {paint:.0f} ms, first lines after {lines:.0f} ms")
    print_long_tasks(page, "while loading")
    page.evaluate(SCROLL_TO_END)
    print_long_tasks(page, "while scrolling to the end")
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(1000)
    print_long_tasks(page, "while jumping to the start")
    page.get_by_role("button", name="Side by side").click()
    page.wait_for_timeout(3000)
    print_long_tasks(page, "while changing the layout")
    page.get_by_role("button", name="Unified").click()


def print_long_tasks(page, name: str) -> None:
    durations = sorted(page.evaluate("window.longTasks.splice(0)"))
    print(f"patch, {name}: {len(durations)} tasks over 50 ms, the longest {durations[-3:]} ms", flush=True)


def make_patch() -> str:
    """Return a patch with 151 files and 23,000 lines."""
    files = []
    for at in range(151):
        path = f"src/package_{at % 12}/module_{at}.py"
        lines = "".join(PATCH_LINES.format(number) for number in range(15))
        files.append(f"diff --git a/{path} b/{path}\n--- a/{path}\n+++ b/{path}\n@@ -1,90 +1,90 @@\n{lines}")
    return "".join(files)


def measure_one_page(server: Connection, port: int, seconds: int) -> None:
    """Print the long tasks and the memory usage of a busy task's page."""
    from doubles.browser import open_chromium

    with open_chromium() as program, program.browser() as browser:
        page = browser.open(f"http://127.0.0.1:{port}/tasks/{TASK}", init_script=RECORD_BLOCKED_TIME_SCRIPT)
        page.wait_for_timeout(2000)
        page.evaluate("window.longTasks.length = 0")
        chromium = page.context.new_cdp_session(page)
        server.send(seconds)
        heaps = []
        for second in range(seconds):
            if second == seconds // 2:
                at_conversation = page.evaluate("window.longTasks.splice(0)")
                page.locator("#tab-output").click()
            page.wait_for_timeout(1000)
            heaps.append(chromium.send("Runtime.getHeapUsage")["usedSize"] / 1e6)
        events = server.recv()
        page.wait_for_timeout(2000)
        line_count = page.locator("#tally-output").inner_text()
        at_output = page.evaluate("window.longTasks")
        elements = page.evaluate("document.querySelectorAll('*').length")
        print(
            f"one page, {EVENTS_PER_SECOND} events/s for {seconds} s: {events} events, {line_count} lines on the page"
        )
        for view, durations in (("conversation", at_conversation), ("output", at_output)):
            print(f"{view} view: {len(durations)} tasks over 50 ms, the longest {sorted(durations)[-3:]} ms")
        halves = max(heaps[: seconds // 2]), max(heaps[seconds // 2 :])
        print(f"memory used by scripts: at most {halves[0]:.0f} MB in the first half, {halves[1]:.0f} MB in the second")
        print(f"elements at the end: {elements}; errors in the browser's console: {browser.console_errors}")


async def measure_many_pages(server: Connection, port: int, pages: int) -> None:
    """Print the growth of the server's memory while `pages` pages follow the task."""
    server.send("memory")
    before = await asyncio.to_thread(server.recv)
    readers = [asyncio.create_task(read_as_page(port)) for _ in range(pages)]
    await asyncio.sleep(3)
    server.send(MANY_SECONDS)
    await asyncio.to_thread(server.recv)
    server.send("memory")
    after = await asyncio.to_thread(server.recv)
    for reader in readers:
        reader.cancel()
    read = await asyncio.gather(*readers, return_exceptions=True)
    lost = [error for error in read if not isinstance(error, asyncio.CancelledError)]
    print(f"{pages} pages on a task with {EVENTS_PER_SECOND} events/s: the server grew by {after - before:.0f} MB "
          f"(from {before:.0f} MB); {len(lost)} were lost")  # fmt: skip


async def read_as_page(port: int) -> None:
    """Request the page, then read the event stream, as the page's script does."""
    head = f"Host: 127.0.0.1:{port}\r\nAccept: text/html\r\n"
    for path, close in ((f"/tasks/{TASK}", "Connection: close\r\n"), (f"/tasks/{TASK}/story?after=0", "")):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(f"GET {path} HTTP/1.1\r\n{head}{close}\r\n".encode())
            while await reader.read(65536):
                pass
        finally:
            writer.close()


def serve_one_task(parent: Connection) -> None:
    """Run the server's process, which includes the task's runner."""
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(serve_and_record(Path(directory), parent))


async def serve_and_record(data_dir: Path, parent: Connection) -> None:
    """Handle orders: a number of seconds for which to record events, "memory" to report its memory, None to stop."""
    from doubles.fake_tasks import TO_COMPLETED, manifest
    from doubles.fake_token_store import FakeTokenStore
    from doubles.server_components import TO_RUNNING, ServerComponents
    from sandbox.agents import registered_agents
    from sandbox.api.app import create_app, create_websocket_app
    from sandbox.api.app_context import AppContext
    from sandbox.api.authentication import RequestAdmission
    from sandbox.api.http.server import bind, serve
    from sandbox.api.settings import ApiSettings
    from sandbox.dashboard.routing import add_dashboard
    from sandbox.store.sqlite import SqliteStore

    components = ServerComponents(data_dir, SqliteStore(data_dir / "index.sqlite"))
    sockets, websocket_sockets = bind("127.0.0.1", 0), bind("127.0.0.1", 0)
    port = sockets[0].getsockname()[1]
    settings = ApiSettings("bench", frozenset({port}), agents=registered_agents())
    shutting_down = asyncio.Event()
    async with components.server() as service:
        context = AppContext.create(
            service.services, settings, shutting_down, RequestAdmission(FakeTokenStore(), settings)
        )
        app = create_app(context)
        add_dashboard(app, context)
        serving = asyncio.create_task(
            serve(app, create_websocket_app(context), sockets, websocket_sockets, shutting_down=shutting_down)
        )
        await service.submit(manifest(TASK))
        await components.wait_for_launch(TASK)
        components.placement.record(TASK, *TO_RUNNING)
        parent.send(port)
        while (order := await asyncio.to_thread(parent.recv)) is not None:
            parent.send(memory_megabytes() if order == "memory" else await record_events(components, order))
        components.placement.record(TASK, *TO_COMPLETED)
        shutting_down.set()
        await serving


async def record_events(components, seconds: int) -> int:
    """Record events for `seconds`; return their number."""
    began = time.monotonic()
    per_tick = EVENTS_PER_SECOND // TICKS_PER_SECOND
    for tick in range(seconds * TICKS_PER_SECOND):
        components.placement.record(TASK, *[make_event(tick * per_tick + number) for number in range(per_tick)])
        await asyncio.sleep(max(0.0, began + (tick + 1) / TICKS_PER_SECOND - time.monotonic()))
    return seconds * EVENTS_PER_SECOND


def make_event(number: int):
    from sandbox.model import events as e

    match number % 30:
        case 0:
            return e.AgentMessage(MESSAGE.format(number))
        case 10:
            command = f"make part-{number}"
            return e.ToolCallStarted("Bash", f"t{number}", command, command)
        case 11:
            return e.ToolResult(f"t{number - 1}", "done\n" * 20, is_error=number % 90 == 11)
        case 12:
            return e.ToolCallEnded("Bash", f"t{number - 2}", 25)
        case 20 if number % 300 == 20:
            return e.EgressDenied(f"host-{number % 7}.example.com", 443, "not in allowed_hosts")
        case 21 if number % 300 == 21:
            return e.Metrics(cpu_percent=number % 100, memory_used_bytes=10**8 + number)
        case _:
            return e.Output.from_bytes("stdout", LINE % number)


def memory_megabytes() -> float:
    """Return the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
