"""The page of a task whose story is long, comes in bursts or is torn: all of it can be read undisturbed."""

import pytest

from doubles.live_server import World
from doubles.sample_task import PlayedStory, output, said, says
from doubles.stored_tasks import KeptTasks

LINES_A_FRAME = 1000


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A server with tasks whose stories are played: of a conversation, a terminal, many new files, much output."""
    world = World(tmp_path_factory.mktemp("stories"))
    kept = KeptTasks(world.data_dir)
    kept.finish("told")
    kept.finish("labelled", labels={"team": "a"})
    files = "".join(f"diff --git a/{at} b/{at}\nnew file mode 100644\nindex 0..e\n" for at in range(45_000))
    kept.finish("many", artifacts=[("many.patch", files.encode())])
    kept.finish("session", claude={"headless": False})
    kept.finish("large", lines=2000)
    kept.index()
    world.model_url = "http://127.0.0.1:9"  # nobody asks it anything
    world.start_server()
    yield world.server.said["http"]
    world.close()


@pytest.fixture
def watch(place, browser):
    """Opens the page of a task; gives it and its story, of which nothing is told yet."""

    def watch(path, before=None):
        story = None

        def play(page):
            nonlocal story
            story = PlayedStory(page, path.partition("#")[0])

        page = browser.open(f"{place}/tasks/{path}", before=before, prepare=play)
        return page, story

    yield watch
    assert browser.complaints == []


def test_what_a_burst_skipped_is_offered_and_nothing_is_missing(watch):
    page, story = watch("told")
    story.tell(*(says(f"entry {number}.") for number in range(100)))
    page.get_by_text("entry 99.", exact=True).wait_for()
    story.tell(*(says(f"entry {number}.") for number in range(100, 1500)))
    page.get_by_text("entry 1499.", exact=True).wait_for()
    earlier = page.get_by_role("button", name="Show earlier")
    while earlier.is_visible():
        earlier.click()
    assert page.locator(".says").all_inner_texts() == [f"entry {number}." for number in range(1500)]


def test_what_does_not_show_costs_a_page_little_however_much_it_is(watch):
    page, story = watch("told")
    use = {"type": "tool_use", "id": "t", "name": "Bash", "input": {}}
    one_kind, mixed = "\x01" * 50_000, "\x01a\x1b[31mb" * 5_000
    answer = {"type": "tool_result", "tool_use_id": "t", "content": f"{one_kind}end\r\n{mixed}", "is_error": True}
    story.tell(said(use), said(answer, kind="user"))
    shown = page.locator(".tool pre")
    shown.wait_for()
    assert shown.inner_text() == f"{'␁' * 50_000}end\n{'␁ab' * 5_000}"
    assert shown.locator(".ctl").first.inner_text() == "␁" * 50_000
    assert shown.locator("*").count() <= 2000


def test_what_a_terminal_shows_is_there_before_its_line_has_ended(watch):
    page, story = watch("session#output")
    story.tell(output("one\r\ntwo\r\n$ ", continued=True))
    lines = page.locator(".line-text")
    page.get_by_text("$", exact=True).wait_for()
    assert lines.all_inner_texts() == ["one", "two", "$ "]
    story.tell(output("ls\r\n", continued=False), output("app.py\r\n$ ", continued=True))
    page.get_by_text("app.py").wait_for()
    assert lines.all_inner_texts() == ["one", "two", "$ ls", "app.py", "$ "]
    page.get_by_role("button", name="stderr").click()
    assert lines.count() == 0
    page.get_by_role("button", name="stdout").click()
    story.tell({"type": "end", "state": "completed"})
    page.locator("#live:empty").wait_for(state="attached")
    assert lines.all_inner_texts() == ["one", "two", "$ ls", "app.py", "$ "]


def test_a_line_that_was_torn_is_no_part_of_what_follows(watch):
    page, story = watch("told")
    torn = says("Never whole.")["data"][:30]
    for kind in ("attempt", "gap"):
        tear = {"type": kind, "reason": "torn", "first_seq": 1, "last_seq": 2}
        story.tell(output(torn, continued=True), tear)
        story.tell(output(f"torn by {kind}", stream="stderr", continued=True), tear, says(f"Said after {kind}."))
        page.get_by_text(f"Said after {kind}.", exact=True).wait_for()
    page.get_by_role("tab", name="Output").click()
    page.get_by_role("button", name="stderr").click()
    shown = page.locator(".line-text")
    page.get_by_text("torn by gap", exact=True).wait_for()
    assert shown.all_inner_texts() == ["torn by attempt", "torn by gap"]
    page.get_by_role("button", name="stdout").click()
    assert shown.all_inner_texts()[0::2] == [torn, torn]


def lines(first, end):
    """As a program writes them: as many in a frame as came together."""
    for begin in range(first, end, LINES_A_FRAME):
        together = range(begin, min(begin + LINES_A_FRAME, end))
        yield output("".join(f"line {number}\n" for number in together))


CHOSEN = "getSelection().toString()"


def test_who_reads_further_up_is_not_disturbed_by_lines_that_come_or_are_dropped(watch):
    page, story = watch("told#output")
    story.tell(*lines(0, 1000))
    page.get_by_text("line 999", exact=True).wait_for()
    page.locator("#lines").evaluate("(box) => { box.scrollTop = 200 * 20; }")
    page.get_by_text("line 205", exact=True).select_text()
    chosen = page.evaluate(CHOSEN)
    assert chosen.strip() == "line 205"
    story.tell(*lines(1000, 1010))
    page.locator("#tally-output").get_by_text("1010").wait_for()
    assert page.evaluate(CHOSEN) == chosen

    story.tell(*lines(1010, 200_000))
    page.locator("#tally-output").get_by_text("200.0k").wait_for()
    page.locator("#lines").evaluate("(box) => { box.scrollTop = 100_000 * 20; }")
    row = page.get_by_text("line 100005", exact=True)
    row.wait_for()
    before = row.bounding_box()["y"]
    story.tell(*lines(200_000, 210_001))
    page.get_by_text("The first 10001 lines are not kept here").wait_for()
    row.wait_for()
    assert abs(row.bounding_box()["y"] - before) < 40
    page.get_by_role("button", name="Events", exact=True).click()
    assert page.locator(".line").count() == 0


def test_the_page_of_a_task_that_was_removed_says_so_and_asks_no_further(watch, place, browser):
    page, story = watch("told")
    story.tell(says("Here."))
    page.get_by_text("Here.").wait_for()
    page.route(f"{place}/tasks/told", lambda route: route.fulfill(status=404, body="gone"))
    story.is_gone = True
    page.get_by_text("This task is kept no longer.").wait_for()
    assert page.locator("#live").inner_text() == ""
    asked = len(story.asked)
    page.evaluate("dispatchEvent(new Event('online')); fetch('/assets/icon.svg').then((answer) => answer.text())")
    assert len(story.asked) == asked
    assert page.locator("#head[data-refresh]").count() == 0
    browser.forgive("404")


def test_of_a_patch_with_many_files_the_first_are_shown_and_the_rest_is_counted(watch):
    page, _ = watch("many#changes")
    page.get_by_text("and 44000 more; the download has them all.").wait_for()
    page.get_by_text("45000 files changed").wait_for()
    assert (page.locator(".file").count(), page.locator(".file[open]").count()) == (1000, 800)


TALK = """async ([use, answer]) => {
    const { Conversation } = await import("/assets/conversation.js");
    const conversation = new Conversation("stream-json");
    for (let at = 0; at < 60; at++) {
        for (const frame of [use, answer]) {
            const data = frame.data.replaceAll("ID", at).replace("MUCH", "much ".repeat(200_000));
            conversation.take({ ...frame, data });
        }
    }
    do conversation.show(true); while (conversation.hasMore);
}"""


def test_of_a_long_conversation_the_end_is_kept_however_long_its_entries_are(watch):
    page, _ = watch("told")
    use = said({"type": "tool_use", "id": "ID", "name": "tool ID", "input": {}})
    answer = said({"type": "tool_result", "tool_use_id": "ID", "content": "MUCH"}, kind="user")
    page.evaluate(TALK, [use, answer])
    told = page.get_by_text("earlier entries are only in the transcript").inner_text()
    assert 8 <= int(told.split()[0]) <= 14
    assert page.locator(".tool-name").last.inner_text() == "tool 59"


HELD = """async () => {
    const { follow } = await import("/assets/story.js");
    const lines = [];
    const over = (following) => new Promise((done) => {
        following.made = follow("/tasks/large/story", 0, (frames) => {
            lines.push(...frames.filter((frame) => frame.type === "output").map((frame) => frame.data));
            following.made.hold(true);
            setTimeout(() => following.made.hold(false), 0);
        }, (state) => state === "over" && done());
    });
    await over({});
    return lines;
}"""


def test_a_page_that_is_behind_asks_for_no_more_and_goes_on_without_a_hole(watch, browser):
    page, _ = watch("told")
    assert page.evaluate(HELD) == [f"line {number} of large\n" for number in range(2000)]
    afters = [int(one.url.partition("after=")[2]) for one in browser.asked("large/story")]
    assert len({*afters}) > 2


NEVER_BY_ITSELF = "window.setInterval = () => 0;"
FRESH = """() => new Promise((done) => {
    document.addEventListener("htmx:afterRequest", () => setTimeout(done, 0), { once: true });
    window.htmx.trigger("#tasks", "refresh");
})"""


def test_a_list_that_is_asked_for_anew_takes_nothing_out_of_ones_hands(place, browser):
    page = browser.open(place, before=NEVER_BY_ITSELF)
    answers = []

    def answer(route):
        answers.append(route)
        got = route.fetch()
        route.fulfill(response=got, body=got.text().replace('class="pager">', f'class="pager">{len(answers)} '))

    page.route(f"{place}/", answer)
    pager = page.locator(".pager")
    for held in ("#sort", "#label-labelled-1"):
        page.locator(held).focus()
        page.evaluate(FRESH)
        assert page.locator(f"{held}:focus").count() == 1
        assert pager.inner_text().startswith(str(len(answers)))
    page.locator("#task-told").hover()
    page.mouse.down()
    before = pager.inner_text()
    page.evaluate(FRESH)
    assert pager.inner_text() == before
    page.mouse.up()
    page.wait_for_url("**/tasks/told")
    page.goto(place)
    page.get_by_label("Filter by label").fill("team=")
    page.get_by_label("Filter by label").blur()
    page.evaluate(FRESH)
    assert pager.inner_text().startswith(str(len(answers)))
    assert page.get_by_label("Filter by label").input_value() == "team="
    # What it shows then is old, which it says until it is answered again.
    page.unroute(f"{place}/")
    page.route(f"{place}/", lambda route: route.fulfill(status=503, body="busy"))
    page.evaluate(FRESH)
    page.get_by_text("The server answered 503; what is shown may be old.").wait_for()
    assert page.locator("#task-told").is_visible()
    page.unroute(f"{place}/")
    page.evaluate(FRESH)
    page.locator("#banner").wait_for(state="hidden")
    browser.forgive("503")
