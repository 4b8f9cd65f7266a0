"""The Changes tab of a task's page: layouts, highlighting, keyboard, comments, and hostile or large patches."""

import subprocess

import pytest

from doubles.browser import accessibility_violations
from doubles.deployment import Deployment, wait_until
from doubles.stored_tasks import StoredTasks
from sandbox.model.events import Parent

BLOCKED_MILLISECONDS_MAX = 5000
"""A busy machine renders these pages in one to three seconds; without limits it takes minutes."""
FILE_COUNT, FILE_LINES = 151, 152
EDITED_FILES = 20
SCRIPT = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
RECORD_BLOCKED_TIME_SCRIPT = """window.longTasks = [];
new PerformanceObserver((list) => window.longTasks.push(...list.getEntries().map((entry) => entry.duration)))
  .observe({ type: "longtask", buffered: true });"""
RENDERED_ROWS = 8000
RENDER_LINES_SCRIPT = """async (wanted) => {
  const rows = document.querySelector(".files").getElementsByTagName("tr");
  while (rows.length < wanted) {
    window.scrollBy(0, 2000);
    await new Promise((done) => setTimeout(done, 30));
  }
}"""
RESTYLE_SCRIPT = """() => {
  document.body.style.setProperty("--restyled", performance.now());
  return getComputedStyle(document.querySelector(".tabs")).color;
}"""
DELAY_INTERSECTIONS_SCRIPT = """{
  const Observer = window.IntersectionObserver;
  window.IntersectionObserver = class extends Observer {
    constructor(callback, options) { super((entries) => setTimeout(() => callback(entries), 400), options); }
  };
}"""
BEFORE = {
    "app.py": b"import os\n\n\ndef total(items, start):\n    return sum(items) + start\n\n\nEND = 1\n",
    "binary.bin": bytes(range(256)),
    "deleted.txt": b"gone\n",
    "ends.txt": b"one\ntwo\n",
    "old name.txt": b"kept\n" * 20,
    "run.sh": b"echo 1\n",
    "windows.txt": b"one\r\ntwo\r\n",
}
AFTER = {
    "app.py": b'import os\n\n\ndef total(values, start):\n    return sum(values) + start\n\n\nEND = 1\nNAME = "x"\n',
    "binary.bin": bytes(range(255)),
    "ends.txt": b"one\r\ntwo",
    "empty.txt": b"",
    "new name.txt": b"kept\n" * 20,
    "run.sh": b"echo 1\n",
    "windows.txt": b"one\r\nTWO\r\n",
}
CHAIN = (
    {"a.py": b"one = 1\ntwo = 2\n", "b.py": b"x = 1\n", "c.py": b"c = 1\n"},
    {"a.py": b"one = 10\ntwo = 2\n", "b.py": b"x = 2\n", "c.py": b"c = 1\n"},
    {"a.py": b"one = 10\ntwo = 20\n", "b.py": b"x = 2\n", "c.py": b"c = 2\n"},
)
"""The repository, the result of a first task, and the result of a second task that continues the first."""


def make_patch(directory, before, after, executable=()):
    """Return the patch between two trees, as Sandbox creates it."""

    def git(*arguments):
        options = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "core.quotePath=false")
        command = ["git", *options, "-c", "core.autocrlf=false", *arguments]
        return subprocess.run(command, cwd=directory, capture_output=True, check=True, timeout=60).stdout

    git("init", "-q")
    for files in (before, after):
        git("rm", "-rfq", "--ignore-unmatch", ".")
        for name, content in files.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            path.chmod(0o755 if files is after and name in executable else 0o644)
        git("add", "--all")
        git("commit", "-q", "-m", "a")
    return git("diff-tree", "-r", "--binary", "--patch", "--find-renames", "HEAD^", "HEAD")


def large_patch():
    """Return a patch of FILE_COUNT files with FILE_LINES changed lines each."""
    half = FILE_LINES // 2
    lines = [f"-    value_{at} = compute(old, {at})\n+    value_{at} = compute(new, {at})\n" for at in range(half)]
    return "".join(
        f"diff --git a/pkg{at % 10}/module_{at}.py b/pkg{at % 10}/module_{at}.py\nindex 0..1 100644\n"
        f"--- a/pkg{at % 10}/module_{at}.py\n+++ b/pkg{at % 10}/module_{at}.py\n@@ -1,{half} +1,{half} @@\n"
        + "".join(lines)
        for at in range(FILE_COUNT)
    )


def patch_of_edits():
    """Return a patch of EDITED_FILES files. Each replaces lines, which takes fewer rows side by side; some are long."""
    tail = " and a longer text that is wrapped in a narrow window" * 2
    return "".join(
        f"diff --git a/src/edit_{at}.py b/src/edit_{at}.py\nindex 0..1 100644\n"
        f"--- a/src/edit_{at}.py\n+++ b/src/edit_{at}.py\n@@ -1,8 +1,9 @@\n"
        " first = 0\n-old = 1\n-older = 2\n-oldest = 3\n+new = 1\n+newer = 2\n+newest = 3\n+added = 4\n"
        f" # {at}{tail}\n context = 1\n context = 2\n last = 0\n"
        for at in range(EDITED_FILES)
    )


@pytest.fixture(scope="module")
def server_url(tmp_path_factory):
    deployment = Deployment(tmp_path_factory.mktemp("changes"))
    tasks = StoredTasks(deployment.data_dir)
    every_kind = make_patch(tmp_path_factory.mktemp("tree"), BEFORE, AFTER, executable=["run.sh"])
    hostile = patch_of_new_file([SCRIPT, "a\x1b[8mb\u202ec"], name="<i>/x.html").encode()
    many = "".join(f"diff --git a/{at} b/{at}\nnew file mode 100644\nindex 0..e\n" for at in range(45_000)).encode()
    for name, patch in {"kinds": every_kind, "same": every_kind, "hostile": hostile, "many": many}.items():
        tasks.add_completed_task(name, artifacts=[(f"{name}.patch", patch)])
    first, second, third = CHAIN
    patches = {
        "step.patch": make_patch(tmp_path_factory.mktemp("step"), second, third),
        "step.chain.patch": make_patch(tmp_path_factory.mktemp("chain"), first, third),
    }
    parent = Parent("kinds", "0" * 40, ())
    tasks.add_completed_task("step", parent=parent, artifacts=list(patches.items()))
    unchanged = [("unchanged.patch", b""), ("unchanged.chain.patch", patches["step.chain.patch"])]
    tasks.add_completed_task("unchanged", parent=parent, artifacts=unchanged)
    tasks.add_completed_task("cut", artifacts=[("cut.patch", b"# truncated: creating it took longer than 1.0 s\n")])
    tasks.add_completed_task("edits", artifacts=[("edits.patch", patch_of_edits().encode())])
    tasks.add_completed_task("large", artifacts=[("large.patch", large_patch().encode())])
    tasks.index()
    deployment.model_url = "http://127.0.0.1:9"  # not used
    deployment.start_server()
    yield deployment.server.ready_message["http"]
    deployment.close()


@pytest.fixture
def base_url(server_url, browser):
    """The server's URL. After the test, the fixture fails on console errors or requests to other hosts."""
    yield server_url
    browser.assert_no_errors(server_url)


def patch_of_new_file(lines, name="a.py"):
    added = "".join(f"+{line}\n" for line in lines)
    return (
        f"diff --git a/{name} b/{name}\nnew file mode 100644\n--- /dev/null\n+++ b/{name}\n"
        f"@@ -0,0 +1,{len(lines)} @@\n{added}"
    )


def open_changes(browser, base_url, task="kinds", **options):
    page = browser.open(f"{base_url}/tasks/{task}#changes", **options)
    page.locator(".diff-block tr, .diff-body p").first.wait_for()
    return page


def file_of(page, name):
    return page.locator(f'.file[aria-label="{name}"]')


def current_file(page):
    return page.locator(".file.current").get_attribute("aria-label")


def test_each_kind_of_change_is_shown(base_url, browser):
    page = open_changes(browser, base_url)
    page.set_viewport_size({"width": 1280, "height": 3000})
    file_of(page, "windows.txt").locator("tr.add").wait_for()
    heads = [head.replace("\nViewed", "").split("\n") for head in page.locator(".file-head").all_inner_texts()]
    assert heads == [
        ["app.py", "+3", "−2"],
        ["binary.bin", "binary"],
        ["deleted.txt", "deleted", "−1"],
        ["empty.txt", "new"],
        ["ends.txt", "+2", "−2"],
        ["old name.txt → new name.txt", "renamed"],
        ["run.sh", "mode changed, 100644 → 100755"],
        ["windows.txt", "+1", "−1"],
    ]
    assert page.locator(".diff-body p").all_inner_texts() == [
        "This is a binary file; its content is in the patch.",
        "The new file is empty.",
        "The content is unchanged.",
        "Only the mode changed, from 100644 to 100755.",
    ]
    page.get_by_text("8 files changed").wait_for()
    # A carriage return is shown, unless all lines end with one.
    assert file_of(page, "ends.txt").locator(".tx").all_inner_texts() == [
        "one", "two", "one␍", "two (no newline at the end)"
    ]  # fmt: skip
    assert file_of(page, "windows.txt").locator(".tx").all_inner_texts() == ["one", "two", "TWO"]


def test_changed_words_and_syntax_are_highlighted(base_url, browser):
    page = open_changes(browser, base_url)
    app = file_of(page, "app.py")
    app.locator(".s-k", has_text="import").wait_for()
    words = [app.locator(f"{side} .word").all_inner_texts() for side in (".del", ".add")]
    assert words == [["items", "items"], ["values", "values"]]
    assert app.locator("tr.add .s-s").all_inner_texts() == ['"x"']


def test_layout_is_remembered_and_a_narrow_window_has_one_column(base_url, browser):
    page = open_changes(browser, base_url)
    page.get_by_role("button", name="Side by side").click()
    row = file_of(page, "app.py").locator("tr", has_text="total")
    row.wait_for()
    assert row.locator("td").all_inner_texts() == [
        "4", "def total(items, start):", "4", "def total(values, start):"
    ]  # fmt: skip
    page.reload()
    row.wait_for()
    assert row.locator("td").count() == 4
    page.set_viewport_size({"width": 390, "height": 900})
    file_of(page, "app.py").locator("tr.del", has_text="total").wait_for()
    assert accessibility_violations(page) == []


def test_viewed_files_stay_collapsed_but_not_in_other_tasks(base_url, browser):
    page = open_changes(browser, base_url)
    viewed = file_of(page, "app.py").get_by_role("button", name="Viewed")
    viewed.click()
    page.get_by_text("1 of 8 viewed").wait_for()
    page.reload()
    page.get_by_text("1 of 8 viewed").wait_for()
    assert not file_of(page, "app.py").locator(".diff-body").is_visible()
    assert file_of(page, "deleted.txt").locator(".diff-body").is_visible()
    page.goto(f"{base_url}/tasks/same#changes")
    file_of(page, "app.py").locator("tr.add").first.wait_for()
    page.goto(f"{base_url}/tasks/kinds#changes")
    page.get_by_text("1 of 8 viewed").wait_for()
    viewed.click()
    file_of(page, "app.py").locator("tr.add").first.wait_for()
    assert page.get_by_text("1 of 8 viewed").count() == 0


def test_all_files_can_be_collapsed_and_the_tree_can_be_filtered(base_url, browser):
    page = open_changes(browser, base_url)
    page.get_by_role("button", name="Collapse all").click()
    assert page.locator(".diff-body:visible").count() == 0
    page.get_by_role("searchbox", name="Filter files").fill("WINDOWS")
    tree = page.get_by_role("navigation", name="Changed files")
    tree.get_by_text("app.py").wait_for(state="detached")
    tree.get_by_role("button").click()
    file_of(page, "windows.txt").locator("tr.add").wait_for()
    assert page.locator(".diff-body:visible").count() == 1
    page.get_by_role("searchbox", name="Filter files").fill("nothing")
    tree.get_by_text("No file matches.").wait_for()
    page.get_by_role("button", name="Collapse all").click()
    page.get_by_role("button", name="Expand all").click()
    assert page.locator(".diff-body:visible").count() == 8


def test_keyboard_shortcuts_move_between_files_and_changes(base_url, browser):
    page = open_changes(browser, base_url)
    page.keyboard.press("j")
    assert current_file(page) == "app.py"
    page.keyboard.press("n")
    assert page.locator("tr.current .tx").inner_text() == "def total(items, start):"
    page.keyboard.press("n")
    assert page.locator("tr.current .tx").inner_text() == 'NAME = "x"'
    page.keyboard.press("n")
    assert current_file(page) == "deleted.txt"
    page.keyboard.press("p")
    page.keyboard.press("p")
    assert page.locator("tr.current .tx").inner_text() == "def total(items, start):"
    page.keyboard.press("v")
    page.get_by_text("1 of 8 viewed").wait_for()
    assert current_file(page) == "app.py"
    page.keyboard.press("v")
    file_of(page, "app.py").locator("tr.add").first.wait_for()
    # In a text field, these keys enter text and do not trigger shortcuts.
    page.get_by_role("searchbox", name="Filter files").press_sequentially("jv")
    assert page.get_by_role("searchbox", name="Filter files").input_value() == "jv"
    assert page.get_by_text("1 of 8 viewed").count() == 0


def test_a_key_marks_each_file_as_viewed_and_selects_the_next_one(base_url, browser):
    page = open_changes(browser, base_url)
    names = page.locator(".file").evaluate_all("(files) => files.map((file) => file.ariaLabel)")
    page.keyboard.press("j")
    page.keyboard.press("V")
    assert current_file(page) == names[1]
    file_of(page, names[2]).get_by_role("button", name="Viewed").click()
    page.keyboard.press("V")
    assert current_file(page) == names[3]  # the file in between has been viewed
    for _ in names:
        page.keyboard.press("V")
    page.get_by_text("8 of 8 viewed").wait_for()
    assert current_file(page) == names[-1]


def test_marking_files_as_viewed_skips_no_file_and_the_count_stays_on_screen(base_url, browser):
    page = open_changes(browser, base_url)
    viewed = []
    for _ in range(8):
        page.keyboard.press("j")
        page.keyboard.press("v")
        viewed.append(current_file(page))
    names = page.locator(".file").evaluate_all("(files) => files.map((file) => file.ariaLabel)")
    assert (len(viewed), viewed) == (8, names)
    count = page.locator(".tabs").get_by_role("status").get_by_text("8 of 8 viewed")
    count.wait_for()
    page.get_by_role("button", name="Expand all").click()
    page.keyboard.press("j")
    page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    box = count.bounding_box()
    assert 0 <= box["y"] < page.viewport_size["height"]
    page.locator("#tab-output").click()
    count.wait_for(state="hidden")


def test_only_the_visible_part_of_a_large_patch_is_rendered(base_url, browser):
    page = open_changes(browser, base_url, "large", init_script=RECORD_BLOCKED_TIME_SCRIPT)
    page.get_by_text(f"{FILE_COUNT} files changed").wait_for()
    wait_until(lambda: page.locator(".file").count() == FILE_COUNT, 30, "all files")
    assert page.locator(".diff-block tr").count() < FILE_COUNT * FILE_LINES / 10
    last = f"pkg{(FILE_COUNT - 1) % 10}/module_{FILE_COUNT - 1}.py"
    page.get_by_role("button", name=f"module_{FILE_COUNT - 1}.py").first.click()
    file_of(page, last).locator("tr.add .word", has_text="new").first.wait_for()
    assert file_of(page, last).locator("button.file-toggle").evaluate("(it) => it === document.activeElement")
    assert page.evaluate("Math.max(0, ...window.longTasks)") < BLOCKED_MILLISECONDS_MAX


@pytest.mark.parametrize(
    ("layout", "width", "tolerance_pixels"),
    [("Unified", 1280, 2), ("Side by side", 1280, 2), ("Unified", 390, 2)],
    ids=["unified", "split", "phone"],
)
def test_file_chosen_in_the_tree_is_scrolled_to_the_top(base_url, browser, layout, width, tolerance_pixels):
    page = open_changes(browser, base_url, "edits")
    page.get_by_role("button", name=layout).click()
    page.set_viewport_size({"width": width, "height": 900})
    tops = {}
    for step in range(EDITED_FILES):
        at = (7 * step + 9) % EDITED_FILES
        if step % 10 == 0:
            page.reload()  # with the heights of no file measured
            page.locator(".diff-block tr").first.wait_for()
            if width == 390:
                page.locator(".tree-panel > summary").click()
        page.locator(".tree-file", has_text=f"edit_{at}.py").click()
        file_of(page, f"src/edit_{at}.py").locator(".diff-block tr").first.wait_for()
        tops[at] = settled_distance(page, f"src/edit_{at}.py")
    assert {at: top for at, top in tops.items() if abs(top) > 2} == {}


def test_chosen_file_is_not_covered_by_a_title_bar_that_appears_later(base_url, browser):
    page = open_changes(browser, base_url, "edits", init_script=DELAY_INTERSECTIONS_SCRIPT)
    page.evaluate("scrollTo(0, 0)")
    page.locator(".tabs:not(.below-title-bar)").wait_for()
    page.locator(".tree-file", has_text="edit_12.py").dispatch_event("click")
    page.locator(".tabs.below-title-bar").wait_for()
    assert abs(settled_distance(page, "src/edit_12.py")) <= 2


def test_title_bar_appears_without_new_styles_for_the_lines(base_url, browser):
    """A patch has so many elements that the page would be blocked if the browser visited or styled all of them."""
    page = open_changes(browser, base_url, "large")
    page.evaluate(RENDER_LINES_SCRIPT, RENDERED_ROWS)
    page.evaluate("scrollTo(0, 0)")
    title_bar = page.locator("#title-bar")
    title_bar.wait_for(state="hidden")
    chromium = page.context.new_cdp_session(page)
    chromium.send("Performance.enable")

    def style_seconds(change):
        before = read_metric(chromium, "RecalcStyleDuration")
        change()
        return read_metric(chromium, "RecalcStyleDuration") - before

    def show_title_bar():
        page.evaluate("scrollTo(0, 400)")
        title_bar.wait_for()

    def hide_title_bar():
        page.evaluate("scrollTo(0, 0)")
        title_bar.wait_for(state="hidden")

    def style_everything():
        page.evaluate(RESTYLE_SCRIPT)

    everything = min(style_seconds(style_everything) for _ in range(5))
    for change in (show_title_bar, hide_title_bar):
        seconds = []
        for _ in range(5):
            (hide_title_bar if change is show_title_bar else show_title_bar)()
            seconds.append(style_seconds(change))
        assert min(seconds) < everything, (change, seconds, everything)


def read_metric(chromium, name):
    """Return a performance metric of the page."""
    metrics = chromium.send("Performance.getMetrics")["metrics"]
    return next(metric["value"] for metric in metrics if metric["name"] == name)


def settled_distance(page, name):
    """Return the distance of a file from its place below the tabs in pixels, when it no longer changes."""
    return page.evaluate(
        """async (name) => {
          const file = document.querySelector(`.file[aria-label="${name}"]`);
          const wanted = Number.parseFloat(getComputedStyle(file).scrollMarginTop);
          const isAtEnd = () => innerHeight + scrollY >= document.documentElement.scrollHeight - 1;
          const distance = () => {
            const top = file.getBoundingClientRect().top;
            return isAtEnd() && top > wanted && top < innerHeight - 60 ? 0 : Math.round(top - wanted);
          };
          let [last, since] = [distance(), performance.now()];
          const end = since + 3000;
          while (performance.now() < Math.min(end, since + 150)) {
            await new Promise(requestAnimationFrame);
            if (distance() !== last) [last, since] = [distance(), performance.now()];
          }
          return last;
        }""",
        name,
    )


def test_page_stays_where_the_user_scrolls_after_choosing_a_file(base_url, browser):
    page = open_changes(browser, base_url, "edits")
    page.get_by_role("button", name="Side by side").click()
    page.locator(".tree-file", has_text="edit_12.py").click()
    assert abs(settled_distance(page, "src/edit_12.py")) <= 2
    page.mouse.move(900, 500)
    page.mouse.wheel(0, 600)
    wait_until(lambda: settled_distance(page, "src/edit_12.py") == -600, 30, "the scrolled page")
    page.mouse.wheel(0, -1500)
    wait_until(lambda: settled_distance(page, "src/edit_12.py") > 600, 30, "the page scrolled back")


def test_page_shows_the_first_files_of_a_huge_patch_and_counts_the_rest(base_url, browser):
    page = browser.open(f"{base_url}/tasks/many#changes", init_script=RECORD_BLOCKED_TIME_SCRIPT)
    page.get_by_text("and 42000 more; download the patch to see all.").wait_for()
    page.get_by_text("45,000 files changed").wait_for()
    assert page.locator(".file").count() == 3000
    assert page.evaluate("Math.max(0, ...window.longTasks)") < BLOCKED_MILLISECONDS_MAX


def test_hostile_patch_and_comments_are_shown_as_text(base_url, browser):
    page = open_changes(browser, base_url, "hostile")
    page.locator("tr.add").first.wait_for()
    assert page.locator(".tx").all_inner_texts() == [SCRIPT, "a␛[8mb‹U+202E›c"]
    page.locator("td.ln").last.click()
    page.get_by_role("textbox", name="Comment on line 2 of <i>/x.html").fill(f"{SCRIPT}\u202e")
    page.get_by_role("button", name="Add comment").click()
    open_change_dialog(page)
    assert page.locator(".comment-text").all_inner_texts() == [f"{SCRIPT}‹U+202E›"] * 2
    page.reload()
    page.locator(".comment-row").wait_for()
    assert page.evaluate("window.hacked === undefined")
    assert page.locator("#main script, #main img, #main i").count() == 0


def open_change_dialog(page):
    """Open and return the dialog that asks for a change."""
    page.locator("#continue").click()
    return page.get_by_role("dialog", name="Ask for a change")


def copied_prompt(page):
    dialog = open_change_dialog(page)
    dialog.get_by_role("button", name="Copy as prompt").click()
    dialog.get_by_role("button", name="Back").click()
    return page.evaluate("window.copied")


RECORD_COPIES = """Object.defineProperty(navigator, "clipboard", {
    value: { writeText: async (text) => { window.copied = text; } },
});"""


def test_comment_without_a_current_change_goes_to_the_first_change_in_the_file(base_url, browser):
    page = open_changes(browser, base_url)
    for key in ("j", "j", "m"):
        page.keyboard.press(key)
    assert current_file(page) == "binary.bin"
    page.get_by_text("This file has no lines to comment on.").wait_for()
    assert page.locator(".comment-form").count() == 0
    page.keyboard.press("j")
    page.keyboard.press("m")
    page.keyboard.type("jv?m")
    text = file_of(page, "deleted.txt").get_by_role("textbox", name="Comment on line 1")
    assert text.input_value() == "jv?m"
    assert current_file(page) == "deleted.txt"
    page.keyboard.press("Escape")
    page.locator(".comment-form").wait_for(state="detached")


def test_comment_on_a_replaced_line_goes_to_the_added_line(base_url, browser):
    page = open_changes(browser, base_url)
    app = file_of(page, "app.py")
    for _ in range(30):
        page.keyboard.press("n")
        if app.locator("tr.current.del + tr.add, tr.current.del + tr.del").count():
            break
    assert app.locator("tr.current.del").count() == 1
    page.keyboard.press("m")
    form = app.locator("tr.add.current + .comment-row .comment-form")
    form.wait_for()
    line = app.locator("tr.current .ln").nth(1).inner_text()
    assert form.locator(".comment-line").inner_text() == f"Line {line} (new)"
    assert app.locator("tr.del + .comment-row").count() == 0


def test_unfinished_comment_survives_a_reload_in_its_tab(base_url, browser):
    page = open_changes(browser, base_url, "hostile")
    page.locator("td.ln").first.click()
    text = page.get_by_role("textbox", name="Comment on line 1")
    text.fill("Half a tho")
    page.reload()
    text.wait_for()
    assert text.input_value() == "Half a tho"
    page.get_by_role("button", name="Cancel").click()
    page.reload()
    page.locator("tr.add").first.wait_for()
    assert text.count() == 0


def test_comments_become_a_prompt(base_url, browser):
    page = open_changes(browser, base_url, "same", init_script=RECORD_COPIES)
    dialog = open_change_dialog(page)
    assert dialog.get_by_role("button", name="Copy as prompt").is_disabled()
    assert dialog.get_by_role("button", name="Submit task").is_disabled()
    dialog.get_by_role("button", name="Back").click()
    app = file_of(page, "app.py")
    app.locator("tr.del", has_text="total").locator("td.ln").first.click()
    page.get_by_role("textbox", name="Comment on line 4").fill("Keep this name.")
    page.keyboard.press("Control+Enter")
    app.locator(".comment-row .comment").wait_for()
    page.keyboard.press("n")
    page.keyboard.press("n")
    page.keyboard.press("m")
    page.keyboard.type("Discarded.")
    page.keyboard.press("Escape")
    page.keyboard.press("m")
    page.keyboard.type("Why?")
    page.get_by_role("button", name="Add comment").click()
    page.locator("#title-bar").get_by_role("button", name="Ask for a change (2)").click()
    dialog.get_by_role("textbox", name="What else should change").fill("Add tests.")
    assert dialog.get_by_role("list", name="Comments").locator(".mono").all_inner_texts() == ["app.py:4", "app.py:9"]
    assert accessibility_violations(page) == []
    dialog.get_by_role("button", name="Back").click()
    first = "app.py:4 (before the change)\n> def total(items, start):\nKeep this name."
    second = 'app.py:9\n> NAME = "x"\nWhy?'
    wanted = f"Add tests.\n\n{first}\n\n{second}"
    assert copied_prompt(page) == wanted
    page.get_by_role("button", name="Side by side").click()
    app.locator("table.split").wait_for()
    assert app.locator(".comment-text").all_inner_texts() == ["Keep this name.", "Why?"]
    assert page.locator("#continue").inner_text() == "Ask for a change (2)"
    page.reload()
    app.locator(".comment-row").first.wait_for()
    assert copied_prompt(page) == wanted
    app.locator(".comment-row").first.get_by_role("button", name="Remove").click()
    assert copied_prompt(page) == f"Add tests.\n\n{second}"
    assert accessibility_violations(page) == []


def test_comment_can_be_edited(base_url, browser):
    page = open_changes(browser, base_url, "hostile")
    page.locator("td.ln").first.click()
    page.get_by_role("textbox", name="Comment on line 1").fill("Rename thsi.")
    page.keyboard.press("Control+Enter")
    comment = page.locator(".comment-row .comment-text")
    comment.wait_for()
    for keys, expected in (("Escape", "Rename thsi."), ("Control+Enter", "Rename this.")):
        page.get_by_role("button", name="Edit").click()
        text = page.get_by_role("textbox", name="Comment on line 1")
        assert text.input_value() == "Rename thsi."
        text.fill("Rename this.")
        text.press(keys)
        comment.wait_for()
        assert comment.all_inner_texts() == [expected]
        assert page.evaluate("document.activeElement.textContent") == "Edit"
    assert page.locator("#continue").inner_text() == "Ask for a change (1)"
    page.reload()
    comment.wait_for()
    assert comment.all_inner_texts() == ["Rename this."]
    page.get_by_role("button", name="Edit").click()
    assert accessibility_violations(page) == []
    dialog = open_change_dialog(page)
    dialog.get_by_role("button", name="Remove").click()
    page.locator(".comment-row").wait_for(state="detached")


def test_comments_are_submitted_as_a_continuation(base_url, browser):
    requests = []

    def respond(route):
        requests.append((route.request.post_data_json, route.request.headers["idempotency-key"]))
        if len(requests) == 1:
            body = {"error": "conflict", "message": "The patch of this task is not complete."}
            route.fulfill(status=409, json=body)
        else:
            route.fulfill(status=202, json={"task_id": "hostile"})

    page = browser.open(
        f"{base_url}/tasks/same#changes", prepare=lambda page: page.route("**/tasks/same/continue", respond)
    )
    dialog = open_change_dialog(page)
    ask = dialog.get_by_role("button", name="Submit task")
    dialog.get_by_role("textbox", name="What should change").fill("Add tests.")
    ask.click()
    page.get_by_text("The patch of this task is not complete.").wait_for()
    browser.ignore_errors("status of 409")
    page.keyboard.press("Control+Enter")
    page.wait_for_url("**/tasks/hostile")
    assert [body for body, _ in requests] == [{"prompt": "Add tests."}] * 2
    assert requests[0][1] == requests[1][1]
    page.goto(f"{base_url}/tasks/same#changes")
    assert open_change_dialog(page).get_by_role("textbox", name="What should change").input_value() == ""


def changed_files(page):
    return [head.split("\n")[0] for head in page.locator(".file-head").all_inner_texts()]


def wait_for_changed_files(page, files):
    wait_until(lambda: changed_files(page) == files, 20, "the changes")


def test_changes_in_a_whole_chain_can_be_reviewed(base_url, browser):
    page = open_changes(browser, base_url, "step")
    wait_for_changed_files(page, ["a.py", "b.py", "c.py"])
    task, chain = (page.get_by_role("button", name=name) for name in ("This task", "Whole chain"))
    assert [each.get_attribute("aria-pressed") for each in (task, chain)] == ["false", "true"]
    task.click()
    wait_for_changed_files(page, ["a.py", "c.py"])
    assert [each.get_attribute("aria-pressed") for each in (task, chain)] == ["true", "false"]
    assert page.locator("#tally-changes").inner_text() == "2"
    file_of(page, "c.py").get_by_role("button", name="Viewed").click()

    chain.click()
    file_of(page, "b.py").locator("tr.add").wait_for()
    assert [each.get_attribute("aria-pressed") for each in (task, chain)] == ["false", "true"]
    assert chain.evaluate("(it) => it === document.activeElement")
    page.get_by_text("3 files changed").wait_for()
    page.get_by_text("1 of 3 viewed").wait_for()  # both patches change c.py in the same way
    assert changed_files(page) == ["a.py", "b.py", "c.py"]
    assert page.locator("#tally-changes").inner_text() == "3"
    link = page.get_by_role("link", name="Download patch of the chain")
    assert link.get_attribute("download") == "step.chain.patch"
    assert accessibility_violations(page) == []
    page.keyboard.press("j")
    page.keyboard.press("j")
    assert current_file(page) == "b.py"
    page.keyboard.press("v")
    page.get_by_text("2 of 3 viewed").wait_for()
    page.keyboard.press("s")
    page.get_by_text("1 of 2 viewed").wait_for()
    assert changed_files(page) == ["a.py", "c.py"]
    page.keyboard.press("s")
    page.get_by_text("2 of 3 viewed").wait_for()


def test_review_starts_in_the_scope_of_the_copied_command_until_another_scope_is_chosen(base_url, browser):
    page = browser.open(f"{base_url}/tasks/step")
    assert page.locator("#copy-apply").get_attribute("data-copy-command") == "task apply step --chain"
    page.get_by_role("link", name="Review changes").click()
    wait_for_changed_files(page, ["a.py", "b.py", "c.py"])
    page.get_by_role("button", name="This task").click()
    wait_for_changed_files(page, ["a.py", "c.py"])
    page.reload()
    wait_for_changed_files(page, ["a.py", "c.py"])
    # The next task in the chain starts with the same choice.
    page.goto(f"{base_url}/tasks/unchanged#changes")
    page.get_by_text("The agent changed nothing.").wait_for()
    page.get_by_role("button", name="Whole chain").click()
    wait_for_changed_files(page, ["a.py", "b.py", "c.py"])
    page.goto(f"{base_url}/tasks/step#changes")
    wait_for_changed_files(page, ["a.py", "b.py", "c.py"])


def test_comments_on_a_whole_chain_state_which_version_they_refer_to(base_url, browser):
    page = open_changes(browser, base_url, "step", init_script=RECORD_COPIES)
    wait_for_changed_files(page, ["a.py", "b.py", "c.py"])
    page.get_by_role("button", name="This task").click()
    wait_for_changed_files(page, ["a.py", "c.py"])
    file_of(page, "c.py").locator("tr.add").wait_for()

    def comment(kind, line, text):
        file_of(page, "a.py").locator(f"tr.{kind}", has_text=line).locator("td.ln").first.click()
        page.get_by_role("textbox", name="Comment on line").fill(text)
        page.keyboard.press("Control+Enter")
        page.locator(".comment-form").wait_for(state="detached")

    comment("del", "two = 2", "Removed by this task.")
    comment("add", "two = 20", "Added by this task.")
    page.get_by_role("button", name="Whole chain").click()
    file_of(page, "b.py").locator("tr.add").wait_for()
    texts = file_of(page, "a.py").locator(".comment-text")
    assert texts.all_inner_texts() == ["Added by this task."]
    comment("del", "one = 1", "Removed by the first task.")
    comment("add", "one = 10", "Added by the first task.")
    wanted = "\n\n".join(
        (
            "a.py:2 (before the change)\n> two = 2\nRemoved by this task.",
            "a.py:2\n> two = 20\nAdded by this task.",
            "a.py:1 (before the first task)\n> one = 1\nRemoved by the first task.",
            "a.py:1\n> one = 10\nAdded by the first task.",
        )
    )
    assert copied_prompt(page) == wanted
    page.get_by_role("button", name="This task").click()
    wait_until(lambda: changed_files(page) == ["a.py", "c.py"], 20, "this task's changes")
    file_of(page, "a.py").locator(".comment-row").nth(2).wait_for()
    assert texts.all_inner_texts() == ["Added by the first task.", "Removed by this task.", "Added by this task."]
    assert copied_prompt(page) == wanted


def test_chain_can_be_reviewed_if_its_last_task_changed_nothing(base_url, browser):
    page = browser.open(f"{base_url}/tasks/unchanged#changes")
    file_of(page, "b.py").locator("tr.add").wait_for()
    changes = page.locator(".figures > div").first
    wait_until(lambda: "+4 −4 in 3 files" in changes.inner_text(), 30, "the size of the chain's patch")
    assert changes.inner_text().split("\n") == ["Changes", "none in this task; +4 −4 in 3 files in the chain"]
    assert page.locator("#copy-apply").get_attribute("data-copy-command") == "task apply unchanged --chain"
    assert page.locator(".actions .primary").all_inner_texts() == ["Review changes"]
    assert page.locator("#download-patch").count() == 0
    assert accessibility_violations(page) == []
    page.keyboard.press("s")
    page.get_by_text("The agent changed nothing.").wait_for()
    page.keyboard.press("s")
    file_of(page, "b.py").locator("tr.add").wait_for()


def test_task_that_does_not_continue_another_has_no_scope_switch(base_url, browser):
    page = open_changes(browser, base_url)
    assert page.get_by_role("button", name="Whole chain").count() == 0
    page.keyboard.press("?")
    page.get_by_text("Mark the file as viewed, or remove the mark").wait_for()
    assert page.get_by_text("Switch between this task and the whole chain").count() == 0


def test_incomplete_patch_is_explained(base_url, browser):
    page = browser.open(f"{base_url}/tasks/cut#changes")
    page.get_by_text("The patch is incomplete: creating it took longer than 1.0 s. See the artifacts.").wait_for()


def test_review_link_scrolls_to_the_changes(base_url, browser):
    page = browser.open(f"{base_url}/tasks/kinds")
    page.get_by_role("link", name="Review changes").click()
    page.locator(".file").first.wait_for()
    wait_until(lambda: page.wait_for_timeout(50) or page.locator("#title-bar").is_visible(), 20, "the page to scroll")
    assert page.locator(".diff-head").bounding_box()["y"] < 150
    buttons = page.locator("#title-bar").get_by_role("button")
    assert buttons.all_inner_texts() == ["Copy apply command", "Ask for a change"]
    buttons.first.click()
    page.locator(".toast", has_text="sandbox task apply kinds --server").wait_for()
    page.locator("#title-bar summary").click()
    assert accessibility_violations(page) == []
    page.locator("#title-bar").get_by_role("button", name="Copy command for a branch").click()
    page.locator(".toast", has_text="sandbox task apply kinds --branch sandbox/kinds").wait_for()
    page.set_viewport_size({"width": 390, "height": 844})
    assert buttons.all_inner_texts() == ["Ask for a change"]
    page.locator("#title-bar summary").click()
    menu = ["Ask for a change", "Copy apply command", "Copy command for a branch", "Download patch"]
    assert buttons.all_inner_texts() == menu
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.set_viewport_size({"width": 1280, "height": 720})
    page.locator("#tab-output").click()
    assert page.locator("#title-bar").get_by_role("button").all_inner_texts() == ["Review changes"]


def open_plain_page(base_url, browser):
    """Open a page on this origin without scripts, for testing a single JavaScript module."""
    url = f"{base_url}/plain"
    plain = "<!doctype html><title>Plain</title>"
    return browser.open(
        url,
        prepare=lambda page: page.route(url, lambda route: route.fulfill(content_type="text/html", body=plain)),
    )


def test_unusual_file_names_are_parsed_from_a_patch(base_url, browser, tmp_path):
    names = [
        "x b/y.txt",
        "h\u00e4\u00df.txt",
        'say "hi".txt',
        "tab\there",
        "back\\slash",
        "line\nbreak",
        "\x01",
        "b/a b/b",
    ]
    renamed = "new/h\u00e4\u00df b/\t"
    before = {**dict.fromkeys(names, b"one\n"), "old": b"kept\n" * 20}
    after = {**dict.fromkeys(names, b"two\n"), renamed: b"kept\n" * 20}
    patch = make_patch(tmp_path, before, after).decode()
    page = open_plain_page(base_url, browser)
    parse = """async (patch) => {
        const { parse } = await import("/assets/patch.js");
        return parse(patch).map((file) => [file.kind, file.path]);
    }"""
    found = page.evaluate(parse, patch)
    assert sorted(found) == sorted([["", name] for name in names] + [["renamed", renamed]])


def test_patch_with_long_lines_does_not_block_the_page(base_url, browser):
    page = open_plain_page(base_url, browser)
    show = """async (patch) => {
        document.body.innerHTML = '<div id="panel-changes"></div><span id="tally-changes"></span>';
        const { Changes } = await import("/assets/changes.js");
        const artifacts = [{ name: "patch", size_bytes: patch.length, download_url: "patch" }];
        window.fetch = async (url) => (url === "list" ? Response.json({ artifacts }) : new Response(patch));
        let longest = 0;
        const observer = new PerformanceObserver((list) => {
            for (const entry of list.getEntries()) longest = Math.max(longest, entry.duration);
        });
        observer.observe({ type: "longtask" });
        await new Changes("list", "patch").show(true);
        const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
        for (let at = 0; at < 300 && (at < 3 || document.querySelector(".diff-block:empty")); at++) {
            document.querySelector(".diff-block:empty")?.scrollIntoView();
            await pause(30);
        }
        observer.disconnect();
        return [[...document.querySelectorAll(".tx")].map((cell) => cell.textContent), longest];
    }"""
    shown = {
        name: page.evaluate(show, patch_of_new_file(lines))
        for name, lines in {
            "control characters": ["\x01a" * 1_000] * 790,
            "numbers": ["1 " * 299] * 790,
            "one line": ["\x01a" * 1_500_000],
            "empty lines": [""] * 100_000,
        }.items()
    }
    assert {name: spent for name, (_, spent) in shown.items() if spent > BLOCKED_MILLISECONDS_MAX} == {}
    assert shown["one line"][0][0].endswith(f" … and {3_000_000 - 5000:,} more characters")
    ordinary = [f"x = {number}" for number in range(790)]
    assert page.evaluate(show, patch_of_new_file(ordinary))[0] == ordinary


def test_hostile_source_is_highlighted_within_a_time_limit(base_url, browser):
    page = open_plain_page(base_url, browser)
    run = """async ([languages, texts]) => {
        const { highlight } = await import("/assets/syntax.js");
        const slow = [];
        for (const language of languages) for (const text of texts) {
            const began = performance.now();
            let longest = 0;
            let last = began;
            const tick = () => {
                longest = Math.max(longest, performance.now() - last);
                last = performance.now();
            };
            const ticker = setInterval(tick, 20);
            await highlight(language, [text]);
            clearInterval(ticker);
            if (longest > 2000) slow.push([language, text.slice(0, 20), longest]);
        }
        const [spans] = await highlight("python", ["x = 1  # one"]);
        return [slow, [...spans]];
    }"""
    lines = "\n"
    texts = [
        "(" * 15_000,
        '"' * 15_001,
        "<a " * 5000,
        "`${" * 5000,
        ("/*" * 50 + lines) * 500,
        ("x" * 9000 + lines) * 10,
    ]
    slow, spans = page.evaluate(run, [["javascript", "python", "markdown", "cpp", "xml"], texts])
    assert slow == []
    assert spans in ([4, 5, 4, 7, 12, 1], [])  # no colors if highlighting of earlier texts was slow


def test_web_worker_that_does_not_respond_leaves_the_text_without_colors(base_url, browser):
    stuck = """window.ended = 0;
        window.Worker = class { postMessage() {} terminate() { window.ended++; } };"""
    page = open_changes(browser, base_url, init_script=stuck)
    app = file_of(page, "app.py")
    wait_until(lambda: page.evaluate("window.ended") == 1, 30, "the end of the worker")
    assert app.locator("tr.add .tx").first.inner_text() == "def total(values, start):"
    assert app.locator("[class^='s-']").count() == 0


def test_changed_words_are_marked_only_in_similar_lines(base_url, browser):
    page = open_plain_page(base_url, browser)
    compare = """async ([before, after]) => {
        const { wordDiff } = await import("/assets/word_diff.js");
        const began = performance.now();
        const ranges = wordDiff(before, after);
        const texts = [before, after].map((text, at) => ranges[at].map(([start, end]) => text.slice(start, end)));
        return [texts, performance.now() - began];
    }"""

    def marks(before, after):
        return page.evaluate(compare, [before, after])[0]

    assert marks("a = b + c", "a = b + d") == [["c"], ["d"]]
    assert marks("call(one, two)", "call(one, two, three)") == [[], [", three"]]
    assert marks("old words here now", "new words here") == [["old", " now"], ["new"]]
    assert marks("nothing in common", "entirely different text!") == [[], []]
    assert marks("same", "same") == [[], []]
    assert marks("smile \U0001f600", "smile \U0001f601") == [["\U0001f600"], ["\U0001f601"]]
    for hostile in (["a b " * 450, "b a " * 450], ["(" * 1999, ")" * 1999], ["x" * 10**6, "y" * 10**6]):
        assert page.evaluate(compare, hostile)[1] < BLOCKED_MILLISECONDS_MAX
