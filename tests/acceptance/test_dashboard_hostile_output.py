"""The dashboard with hostile and large output, and its accessibility."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from doubles.browser import accessibility_violations
from doubles.deployment import Deployment
from doubles.stored_tasks import StoredTasks
from sandbox.cli.output.console import escape_text
from sandbox.model.events import EgressDenied, Metrics, Output, ToolCallEnded, Usage

LINES = 10_000
BLOCKED_MILLISECONDS_MAX = 5000
"""A busy machine renders these pages in one to three seconds; without the tested limits it takes 11 s to minutes."""
ESCAPE_INVISIBLE_CHARACTERS_SCRIPT = "async (text) => (await import('/assets/untrusted_text.js')).visible(text)"
RENDER_MARKDOWN = """async (text) => {
    const { markdown } = await import("/assets/markdown.js");
    const began = performance.now();
    const element = document.body.appendChild(markdown(text));
    const height = document.body.offsetHeight;
    element.remove();
    return [element.innerHTML, performance.now() - began, height];
}"""
SCRIPT = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
BIDI, NUL = "a\u202eb\u2066c\U000e0041d", "x\x00y\x1b]0;title\x07z"
HOSTILE = (
    f"{SCRIPT} **bold** [a](javascript:window.hacked=3) [b](data:text/html,x) <b>raw</b>\n\n"
    f"```html\n{SCRIPT}\n```\n\n| {SCRIPT} | b |\n| --- | --- |\n| {BIDI} | {NUL} |\n"
)
PATCH = f"""diff --git a/src/<i>.py b/src/<i>.py
new file mode 100644
--- /dev/null
+++ b/src/<i>.py
@@ -0,0 +1,3 @@
+def f(): return "{SCRIPT}"  # {BIDI}
+x = 42
+--- a/not/a/file
diff --git a/old.c b/old.c
--- a/old.c
+++ b/old.c
@@ -1,2 +1,1 @@
 int main(void) {{ return 0; }} /* one */
-static const char *s = "two"; // 3
"""
DEEP_JSON = b'{"a":' * 20_000 + b"1" + b"}" * 20_000
LONG_LINE = "<i>" + "0123456789" * 104_857 + "the very end"


def stdout_event(event):
    return Output.from_bytes("stdout", json.dumps(event).encode() + b"\n")


def assistant(*blocks):
    return stdout_event({"type": "assistant", "message": {"content": list(blocks)}})


def hostile_events():
    """Yield output that a malicious agent can produce with Claude Code and its tools."""
    tool_use = {
        "type": "tool_use",
        "id": "t1",
        "name": SCRIPT,
        "input": {"command": SCRIPT + NUL, "deep": {"a": [SCRIPT]}},
    }
    tool_result = {
        "type": "tool_result",
        "tool_use_id": "t1",
        "content": f"\x1b[31mred\x1b[0m {BIDI} {SCRIPT}",
        "is_error": True,
    }
    yield assistant({"type": "text", "text": HOSTILE}, tool_use)
    yield stdout_event({"type": "user", "message": {"content": [tool_result]}})
    yield ToolCallEnded(SCRIPT, "t1", 12, is_error=True)
    for malformed in (
        "null",
        "[]",
        '{"type":"assistant"}',
        '{"type":"assistant","message":{"content":[null,1,{"type":"text"}]}}',
        "{",
    ):
        yield Output.from_bytes("stdout", malformed.encode() + b"\n")
    yield Output.from_bytes("stdout", f"\x1b[32mgreen\x1b[0m {SCRIPT} {BIDI} {NUL}\n".encode())
    yield Output.from_bytes("stderr", b"\xff\xfe not text\n")
    for at in range(0, len(LONG_LINE), 65536):
        part = LONG_LINE[at : at + 65536]
        yield Output.from_bytes(
            "stdout", part.encode() + (b"\n" if len(part) < 65536 else b""), is_continued=len(part) == 65536
        )
    yield EgressDenied(SCRIPT, 443, SCRIPT)
    yield Metrics(cpu_percent=50, memory_used_bytes=10**8)
    yield Usage("claude-sonnet-4-5-20250929", 1000, 50, cost_usd=0.01)


def malformed_events():
    """Yield lines whose values have unexpected types or are nested too deeply, followed by ordinary output."""
    hostile_input = {"toString": 1, "valueOf": 1}
    uses = [{"type": "tool_use", "id": name, "name": name, "input": {}} for name in ("deep", "odd")]
    yield assistant(*uses, {"type": "tool_use", "id": "poison", "name": hostile_input, "input": hostile_input})
    yield stdout_event(
        {"type": "system", "subtype": "init", "claude_code_version": hostile_input, "model": hostile_input}
    )
    yield stdout_event({"type": "result", "subtype": hostile_input, "result": hostile_input})
    deep_tool_result = {"type": "tool_result", "tool_use_id": "deep", "is_error": True, "content": "DEEP"}
    deep_tool_use = {"type": "tool_use", "id": "asks", "name": "asks", "input": {"deep": "DEEP"}}
    for line in (stdout_event({"type": "user", "message": {"content": [deep_tool_result]}}), assistant(deep_tool_use)):
        yield Output.from_bytes("stdout", line.data.replace(b'"DEEP"', DEEP_JSON))
    tool_results = [
        {
            "type": "tool_result",
            "tool_use_id": "odd",
            "content": [{"type": "text", "text": hostile_input}, {"type": hostile_input}],
        },
        {"type": "tool_result", "tool_use_id": "asks", "is_error": True, "content": {"plain": ["object"]}},
    ]
    yield stdout_event({"type": "user", "message": {"content": tool_results}})
    yield assistant({"type": "text", "text": "Said after the poison."})
    yield Output.from_bytes("stderr", b"Written after the poison.\n")


def events_with_many_fields():
    """Yield two failed tool calls, which the page shows expanded: one with a few fields, one with too many to show."""
    for name, fields in {"small": 3, "large": 20_000}.items():
        tool_input = {f"{name}-{number}": "value" for number in range(fields)}
        yield assistant({"type": "tool_use", "id": name, "name": name, "input": tool_input})
        tool_result = {"type": "tool_result", "tool_use_id": name, "content": f"{name} failed", "is_error": True}
        yield stdout_event({"type": "user", "message": {"content": [tool_result]}})


@pytest.fixture(scope="module")
def hostile_output_server(tmp_path_factory):
    """A server with finished tasks. Their output is hostile, malformed or long, or is not in stream-json format."""
    deployment = Deployment(tmp_path_factory.mktemp("strained"))
    tasks = StoredTasks(deployment.data_dir)
    tasks.current_time = datetime.now(UTC) - timedelta(hours=1)  # within the retention time
    files = {"page.html": SCRIPT, "notes.md": HOSTILE, "hostile.patch": PATCH}
    artifacts = [(name, text.encode()) for name, text in files.items()]
    recorder = tasks.add_running_task("hostile", lines=0, artifacts=artifacts)
    for event in hostile_events():
        recorder.record(event)
    tasks.complete(recorder)
    recorder = tasks.add_running_task("poisoned", lines=0)
    for event in malformed_events():
        recorder.record(event)
    tasks.complete(recorder)
    recorder = tasks.add_running_task("wide", lines=0)
    for event in events_with_many_fields():
        recorder.record(event)
    tasks.complete(recorder)
    tasks.add_completed_task("endless", lines=LINES)
    said = assistant({"type": "text", "text": "Said *in between*."}).data
    transcript = [("transcript.ndjson", said)]
    recorder = tasks.add_running_task("plain", lines=0, artifacts=transcript, claude={"output_format": "text"})
    recorder.record(Output.from_bytes("transcript", said))
    recorder.record(Output.from_bytes("stdout", b"Said afterwards.\n"))
    tasks.complete(recorder)
    recorder = tasks.add_running_task("session", lines=0, artifacts=transcript, claude={"headless": False})
    recorder.record(assistant({"type": "text", "text": "Forged by a program."}))
    tasks.complete(recorder)
    tasks.index()
    deployment.model_url = "http://127.0.0.1:9"  # not used
    deployment.start_server()
    yield deployment
    deployment.close()


@pytest.fixture
def base_url(hostile_output_server, browser):
    """The server's URL. After the test, the fixture fails on console errors or requests to other hosts."""
    address = hostile_output_server.server.ready_message["http"]
    yield address
    browser.assert_no_errors(address)


def test_hostile_output_is_rendered_as_text(base_url, browser):
    page = browser.open(f"{base_url}/tasks/hostile")
    message = page.locator(".says").first
    message.wait_for()
    assert SCRIPT in message.inner_text()
    assert message.locator("strong").inner_text() == "bold"
    assert message.locator("a").count() == 0
    assert "<b>raw</b>" in message.inner_text()
    assert "a‹U+202E›b‹U+2066›c‹U+E0041›d" in message.inner_text()
    tool = page.locator(".tool")
    assert (tool.get_attribute("open"), SCRIPT in tool.text_content()) == ("", True)
    assert tool.locator(".a1").text_content() == "red"

    page.get_by_role("tab", name="Output").click()
    page.get_by_role("button", name="stdout").click()
    lines = page.locator(".line-text")
    rendered = next(text for text in lines.all_inner_texts() if text.startswith("green"))
    assert rendered == f"green {SCRIPT} a‹U+202E›b‹U+2066›c‹U+E0041›d x␀y␛]0;title␇z"
    page.get_by_role("button", name=f"Show all {len(LONG_LINE):,} characters").click()
    page.get_by_role("dialog").get_by_text("<i>0123456789").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="stderr").click()
    assert lines.all_inner_texts() == ["\ufffd\ufffd not text"]

    page.get_by_role("tab", name="Network").click()
    assert SCRIPT in page.locator(".refused").inner_text()
    page.get_by_role("tab", name="Artifacts").click()
    for name in ("page.html", "notes.md"):
        page.get_by_role("button", name=name, exact=True).click()
        page.locator(".preview:visible").get_by_text(SCRIPT).first.wait_for()
    page.locator("#fact-diff", has_text="+3 −1 in 2 files").wait_for()  # computed by the page
    page.get_by_role("tab", name="Changes").click()
    page.get_by_text("2 files changed").wait_for()
    heads = page.locator(".file-head").all_inner_texts()
    assert heads == ["src/<i>.py\nnew\n+3\nViewed", "old.c\n−1\nViewed"]
    page.locator(".file .add .tx").first.wait_for()
    added = page.locator(".file").first.locator(".add .tx").all_inner_texts()
    assert added == [f'def f(): return "{SCRIPT}"  # a‹U+202E›b‹U+2066›c‹U+E0041›d', "x = 42", "--- a/not/a/file"]
    assert page.evaluate("window.hacked === undefined")
    assert page.locator("#main script, #main img, #main iframe, #main b").count() == 0


def test_malformed_output_does_not_stop_the_page(base_url, browser):
    page = browser.open(f"{base_url}/tasks/poisoned")
    page.get_by_text("Said after the poison.").wait_for()
    assert page.locator(".tool-name").all_inner_texts() == ["deep", "odd"]
    assert "valueOf" in page.locator(".aside").inner_text()
    page.locator(".tool").nth(1).locator("summary").click()
    assert '"toString": 1' in page.locator(".tool pre").text_content()
    page.get_by_role("tab", name="Output").click()
    page.get_by_text("Written after the poison.").wait_for()


def test_failing_view_does_not_block_other_views(base_url, browser):
    failing = """const parse = Date.parse;
        Date.parse = (text) => {
            if (new Error().stack.includes("metrics.js")) throw new Error("of the test");
            return parse(text);
        };"""
    page = browser.open(f"{base_url}/tasks/hostile#output", init_script=failing)
    page.get_by_text("1,000 tokens in").wait_for()
    assert len(browser.console_errors) > 1
    browser.ignore_errors("of the test")


def open_plain_page(base_url, browser):
    """Open a page on this origin without scripts, for testing a single JavaScript module."""
    url = f"{base_url}/plain"
    plain = "<!doctype html><title>Plain</title>"
    return browser.open(
        url,
        prepare=lambda page: page.route(url, lambda route: route.fulfill(content_type="text/html", body=plain)),
    )


def test_invisible_characters_are_escaped_as_in_the_cli(base_url, browser):
    page = open_plain_page(base_url, browser)
    for hidden in map(
        chr,
        (
            *range(9),
            *range(11, 32),
            0x7F,
            0x9F,
            0xAD,
            0x180E,
            0x200D,
            0x2028,
            0x202E,
            0xE0041,
            0x3164,
            0x2800,
            0xFE0F,
            0x61C,
            0xFDD0,
        ),
    ):
        assert escape_text(hidden) != hidden
        assert page.evaluate(ESCAPE_INVISIBLE_CHARACTERS_SCRIPT, hidden) != hidden, hex(ord(hidden))
    plain = "caf\u00e9\t\u9577 \U0001f44d\n"
    assert page.evaluate(ESCAPE_INVISIBLE_CHARACTERS_SCRIPT, plain) == plain


def test_pathological_markdown_does_not_block_the_page(base_url, browser):
    page = open_plain_page(base_url, browser)
    durations = {
        name: page.evaluate(RENDER_MARKDOWN, text)[1]
        for name, text in {
            "heading": f"# x{' ' * 4_000}x",
            "fence": f"```{'a' * 150_000}`",
            "tildes": f"{'~' * 4_000}`",
            "table": f"a|b\n{' ' * 150_000}x",
            "cells": f"a|b\n-{' ' * 150_000}x",
            "columns": f"a|b\n-|-\n{'|' * 50_000}",
            "rows": "a|b\n-|-\n" + "|\n" * 90_000,
            "items": "- \n" * 60_000,
            "quotes": "> " * 100_000,
            "nested items": "- " * 100_000,
            "mixed emphasis": "**a_" * 50_000,
            "crossed emphasis": "_a__b" * 40_000,
            "stars": "*" * 200_000,
            "underlined headings": "a\n-\n" * 50_000,
            "brackets": "[" * 200_000,
            "links": "[a](" * 50_000,
            "images": "![" * 100_000,
            "backticks": "".join("`" * (number % 300) + " " for number in range(1300)),
            "addresses": "http://a.b/(" * 16_000,
            "mail addresses": "a@b.c." * 33_000,
            "entities": "&#x" * 66_000,
            "backslashes": "\\" * 200_000,
            "tags": "<a " * 66_000,
            "definitions": "[a]: b\n" * 28_000,
        }.items()
    }
    assert {
        name: milliseconds for name, milliseconds in durations.items() if milliseconds > BLOCKED_MILLISECONDS_MAX
    } == {}
    for text, html in {
        "# One #\n## Two ##": "<h3>One</h3><h4>Two</h4>",
        "### Three\n# One\n###### Six": "<h3>Three</h3><h3>One</h3><h4>Six</h4>",
        "# C#": "<h3>C#</h3>",
        "~~~ js\na\n~~~": '<pre tabindex="0" dir="ltr"><code>a</code></pre>',
        "| a | b |\n| :-- | --: |\n| 1 | 2 |": "<td>1</td><td>2</td>",
        "***both***": "<em><strong>both</strong></em>",
        "Title\n===": "<h3>Title</h3>",
        "AT&amp;T": "<p>AT&amp;T</p>",
        "- [ ] open\n- [x] done": "<li>☐ open</li><li>☑ done</li>",
        "3. third": '<ol start="3"><li>third</li></ol>',
        "[x](javascript:alert)": '<span title="javascript:alert">x</span>',
        "![x](data:image/png;base64,AA)": '<span title="data:image/png;base64,AA">x</span>',
        "see https://example.com.": '<a href="https://example.com" rel="noreferrer noopener nofollow" target="_blank"',
        "<b>raw</b>": "<p>&lt;b&gt;raw&lt;/b&gt;</p>",
        "a&#x202E;b&ZeroWidthSpace;c &eacute;": "<p>a‹U+202E›b‹U+200B›c \u00e9</p>",
        "<https://example.com/%E2%80%AE>": ">https://example.com/%E2%80%AE</a>",
        "long\n" * 2_000 + "*text*": "long\nlong\n</div>",
    }.items():
        assert html in page.evaluate(RENDER_MARKDOWN, text)[0]


def test_pathological_output_and_edits_do_not_block_the_page(base_url, browser):
    page = open_plain_page(base_url, browser)
    show = """async (text) => {
        const { describe, jsonElement } = await import("/assets/output_line.js");
        const began = performance.now();
        const { level, preview } = describe({ text });
        const shown = preview === null ? "" : document.body.appendChild(jsonElement(text)).innerText;
        document.body.replaceChildren();
        return [preview, shown, performance.now() - began, level];
    }"""
    texts = {
        "deep": "[" * 24_000 + "]" * 24_000,
        "deep objects": '{"a":' * 8_000 + "1" + "}" * 8_000,
        "wide": json.dumps([[]] * 15_000),
        "quotes": json.dumps([{"a": list(range(2_000))}, '"' * 15_000]),
        "controls": json.dumps("\x01" * 8_000),
        "levels": "level=" * 10_000,
    }
    shown = {name: page.evaluate(show, text) for name, text in texts.items()}
    slow = {name: spent for name, (_, _, spent, _) in shown.items() if spent > BLOCKED_MILLISECONDS_MAX}
    assert slow == {}
    assert shown["deep"][1].replace("\n", "") == texts["deep"]  # long text is split into blocks
    assert (shown["controls"][0], shown["levels"][0]) == (None, None)
    preview, indented, _, level = page.evaluate(show, f'{{"level": "warning", "a": {{"<i>": [1, "{BIDI}"]}}}}')
    assert (preview, level) == ('{level: "warning", a: {…}}', "warn")
    assert indented.splitlines()[3:5] == ['    "<i>": [', "      1,"]
    compare = """async ([before, after]) => {
        const { diffLines, diffElement } = await import("/assets/line_diff.js");
        const began = performance.now();
        document.body.replaceChildren(diffElement("a", diffLines(before, after)));
        return [document.body.innerText.length, performance.now() - began];
    }"""
    for before, after in (
        ("\n" * 60_000, "a\n" * 60_000),
        ("a\nb\n" * 315, "b\na\n" * 315),
        ("x" * 60_000, "\x01y" * 30_000),
    ):
        length, spent = page.evaluate(compare, [before, after])
        assert length > 0
        assert spent < BLOCKED_MILLISECONDS_MAX


def test_long_paragraph_does_not_block_the_page(base_url, browser):
    page = open_plain_page(base_url, browser)
    durations = {
        name: page.evaluate(RENDER_MARKDOWN, text)[1]
        for name, text in {
            "nested emphasis": "**a " * 3_000 + "\n\n" + "**a " * 600 + " b**" * 600,
            "both directions": "\u05d0 a " * 50_000,
            "text without spaces": "\u0e01" * 200_000,
            "control characters": "\x01a" * 100_000,
        }.items()
    }
    assert {name: spent for name, spent in durations.items() if spent > BLOCKED_MILLISECONDS_MAX} == {}


def test_nested_emphasis_is_rendered_to_a_bounded_depth(base_url, browser):
    page = open_plain_page(base_url, browser)
    html = page.evaluate(RENDER_MARKDOWN, "**a " * 600 + " b**" * 600)[0]
    assert 90 < html.count("<strong>") < 150
    assert html.count(" b") == 600


def test_table_of_ordinary_size_is_rendered_completely(base_url, browser):
    page = open_plain_page(base_url, browser)
    text = "|".join("abcde") + "\n" + "|".join("-" * 5) + "\n" + "1|2|3|4|5\n" * 200
    count_cells = """async (text) => {
        const { markdown } = await import("/assets/markdown.js");
        return markdown(text).querySelectorAll("td").length;
    }"""
    assert page.evaluate(count_cells, text) == 1000


def test_tool_call_with_many_fields_does_not_block_the_page(base_url, browser):
    page = browser.open(f"{base_url}/tasks/wide", init_script=RECORD_BLOCKED_TIME_SCRIPT)
    page.get_by_text("19900 more fields").wait_for()
    page.get_by_text("large failed").wait_for()
    assert page.locator(".field-name", has_text="small-").count() == 3
    assert page.locator(".field-name", has_text="large-").count() == 100
    assert page.evaluate("Math.max(0, ...window.longTasks)") < BLOCKED_MILLISECONDS_MAX


def test_search_in_ten_thousand_lines_does_not_block_the_page(base_url, browser):
    page = browser.open(f"{base_url}/tasks/endless#output", init_script=RECORD_BLOCKED_TIME_SCRIPT)
    page.get_by_text(f"line {LINES - 1} of endless").wait_for()
    page.get_by_role("searchbox").fill("line 424")
    page.get_by_text("11 lines", exact=True).wait_for()
    page.get_by_role("searchbox").press("Enter")
    page.get_by_text("1 of 11 lines").wait_for()
    assert page.locator(".found-now .line-text").inner_text() == "line 424 of endless"
    page.get_by_role("button", name="Previous match").click()
    assert page.locator(".found-now .line-text").inner_text() == "line 4249 of endless"
    assert page.locator(".line").count() < 200
    assert page.evaluate("Math.max(0, ...window.longTasks)") < BLOCKED_MILLISECONDS_MAX


VIEWS = ("conversation", "output", "changes", "artifacts", "metrics", "network", "manifest")
VIEW_CONTENT = ".says, .line, .file, .artifact-row, .chart text, .refused, .code"
RECORD_BLOCKED_TIME_SCRIPT = """window.longTasks = [];
new PerformanceObserver((list) => window.longTasks.push(...list.getEntries().map((entry) => entry.duration)))
  .observe({ type: "longtask", buffered: true });"""


def test_pages_have_no_serious_accessibility_violations(base_url, browser):
    page = browser.open(base_url)
    assert accessibility_violations(page) == []
    for path, status in (
        ("/submit", 200),
        ("/server", 200),
        ("/errors", 200),
        ("/tasks/nobody", 404),
        ("/tasks/hostile", 200),
    ):
        assert page.goto(f"{base_url}{path}").status == status
        if status == 404 or "tasks" not in path:
            assert accessibility_violations(page) == [], path
    browser.ignore_errors("status of 404")
    for view in VIEWS:
        page.locator(f"#tab-{view}").click()
        page.locator(f"#panel-{view}").locator(VIEW_CONTENT).first.wait_for()
    page.evaluate("for (const panel of document.querySelectorAll('[role=tabpanel]')) panel.hidden = false")
    rendered = [page.locator(f"#panel-{view}").locator(VIEW_CONTENT).first for view in VIEWS]
    assert all(element.is_visible() for element in rendered)
    assert accessibility_violations(page) == [], "with all views visible"


def test_views_are_reachable_by_keyboard(base_url, browser):
    page = browser.open(f"{base_url}/tasks/hostile")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to content"
    page.get_by_role("tab", name="Conversation").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.view") == "output"
    assert page.url.endswith("#output")
    page.keyboard.press("End")
    page.locator("#panel-manifest").wait_for()


def test_shortcuts_are_listed_and_do_not_apply_while_typing(base_url, browser):
    page = browser.open(f"{base_url}/server")
    page.keyboard.press("?")
    sheet = page.get_by_role("dialog", name="Keyboard shortcuts")
    sheet.get_by_text("Go to the tasks").wait_for()
    assert accessibility_violations(page) == []
    page.keyboard.press("Escape")
    sheet.wait_for(state="hidden")
    page.keyboard.press("g")
    page.keyboard.press("t")
    page.wait_for_url(f"{base_url}/")
    page.goto(f"{base_url}/submit#yaml")
    editor = page.get_by_label("Manifest, YAML")
    editor.press_sequentially("c?")
    page.locator("#validation-status.ill").wait_for()
    assert "c?" in editor.input_value()
    assert page.url.endswith("/submit#yaml")
    assert sheet.count() == 0
    page.goto(f"{base_url}/server")
    page.get_by_role("button", name="Keyboard shortcuts").click()
    sheet.get_by_role("checkbox").uncheck()
    sheet.get_by_role("button", name="Close").click()
    page.keyboard.press("c")
    page.keyboard.press("?")  # this key stays active, because shortcuts are enabled in this dialog
    sheet.get_by_role("checkbox").check()
    page.keyboard.press("Escape")
    page.keyboard.press("c")
    page.wait_for_url("**/submit")
    browser.ignore_errors("status of 400")  # the typed text was validated, and is invalid


def test_conversation_of_a_task_with_plain_text_output_is_shown(base_url, browser):
    page = browser.open(f"{base_url}/tasks/plain")
    page.locator(".says em").wait_for()
    assert page.locator(".says").all_inner_texts() == ["Said in between."]
    page.get_by_role("tab", name="Output").click()
    page.get_by_role("button", name="stdout").click()
    assert page.locator(".line-text").all_inner_texts() == ["Said afterwards."]
    assert browser.requests_to("plain/artifacts/transcript.ndjson") == []


def test_terminal_output_is_not_shown_as_agent_messages(base_url, browser):
    page = browser.open(f"{base_url}/tasks/session")
    page.get_by_text("The agent had a terminal").wait_for()
    page.get_by_role("tab", name="Output").click()
    page.get_by_text("Forged by a program.").wait_for()
    page.get_by_role("tab", name="Conversation").click()
    page.get_by_text("The agent had a terminal").wait_for()
    assert page.locator("#talk > *").count() == 0
    assert browser.requests_to("session/artifacts/transcript.ndjson") == []
