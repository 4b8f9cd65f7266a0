"""The screen of `sandbox top` at any size."""

from datetime import UTC, datetime

import pytest

from doubles.sample_task import task_status
from sandbox.cli.commands.top.screen_content import KEY_HELP, STATE_FILTERS, Snapshot, TaskFilter, TopView

NOW = datetime(2026, 1, 29, 10, 12, tzinfo=UTC)
HEALTH = {
    "status": "ok",
    "ready": True,
    "reasons": [],
    "version": "1.2.3",
    "uptime_seconds": 7265.0,
    "tasks": {"pending": 1, "running": 2, "completed": 1200},
    "disk": {"free_bytes": 3 * 1024**3, "total_bytes": 1024**4},
}


def make_view(*tasks, missing=0, **health):
    view = TopView("http://localhost:8122")
    view.update(Snapshot({**HEALTH, **health}, tasks, missing))
    return view


def render_lines(view, width=140, height=24):
    return [line.plain.rstrip() for line in view.render(width, height, NOW)]


TASKS = [
    task_status("running", "fix-42", progress={**task_status("running")["progress"], "current_tool": "Bash"}),
    task_status("pending", "6f1c6a0e-0d3c-4b6e-9a39-d4a3b1c7e001", state_message="Waiting for 8 CPUs"),
    task_status("failed", "broken"),
    task_status("completed", "done"),
]


def test_task_line_shows_its_current_activity():
    lines = render_lines(make_view(*TASKS))
    assert lines[0].endswith("Sandbox 1.2.3 at http://localhost:8122 · up 2 h 1 min · 3.0 GiB of disk free")
    assert lines[1] == "1 pending · 2 running · 1,200 completed"
    assert lines[3].split() == ["ID", "STATE", "AGE", "TURNS", "TOKENS", "COST", "NOW", "NAME"]
    assert lines[4].split()[:9] == ["▸", "fix-42", "running", "119", "s", "4", "27,501", "$0.0895", "Bash"]
    assert "Waiting for 8 CPUs" in lines[5]
    assert "  Claude Code exited with 1  " in lines[6]
    assert "took 27 s" in lines[7]
    assert lines[-1] == KEY_HELP


def test_failed_tasks_share_one_count_because_their_sandboxes_may_have_been_released():
    released = task_status("failed_preserved", "broken", sandbox_kept=False)
    lines = render_lines(make_view(released, tasks={"failed": 1, "failed_preserved": 2, "cancelled": 1}))
    assert lines[1] == "3 failed · 1 cancelled"
    assert "failed, released" in lines[4]


@pytest.mark.parametrize(("width", "height"), [(80, 24), (140, 50), (60, 10), (20, 5), (300, 3)])
def test_screen_fits_the_window(width, height):
    lines = make_view(*TASKS * 30, missing=7).render(width, height, NOW)
    assert len(lines) <= height
    assert max(line.cell_len for line in lines) <= width


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_generated_id_is_shortened(width):
    chosen = task_status("running", "a-long-id-that-the-user-chose-for-this-task")
    lines = render_lines(make_view(*TASKS, chosen), width)
    assert lines[5].split()[0] == "6f1c6a0e"
    assert any(chosen["id"] in line for line in lines)


def test_shortened_ids_are_unique():
    ids = [f"6f1c6a0e-0d3c-4b6e-9a39-d4a3b1c7e00{number}" for number in range(2)]
    lines = render_lines(make_view(*(task_status("running", one) for one in ids)), 80)
    assert [line.replace("▸", "").split()[0] for line in lines[4:6]] == ids
    similar = ["6f1c6a0e-0d3c-4b6e-9a39-d4a3b1c7e001", "6f1c6a0e-1d3c-4b6e-9a39-d4a3b1c7e001"]
    lines = render_lines(make_view(*(task_status("running", one) for one in similar)), 80)
    assert [line.replace("▸", "").split()[0] for line in lines[4:6]] == ["6f1c6a0e-0", "6f1c6a0e-1"]


def type_search(view, text):
    view.open_search()
    return [view.type_search(bytes([byte])) for byte in text]


def test_filter_is_shown_and_explains_an_empty_list():
    view = make_view(*TASKS)
    assert render_lines(view)[2] == ""
    assert type_search(view, b"flaky  \xc2\x9b2J\r")[-1]
    view.filter_next_states()
    assert view.filter == TaskFilter("flaky \x9b2J", "active")
    assert render_lines(view)[2] == r"Search: flaky \x9b2J · Only active tasks"
    view.update(Snapshot(HEALTH, (), 0))
    assert render_lines(view)[3] == "No such tasks."


def test_state_filters_are_selected_in_a_cycle():
    task_filter, seen = TaskFilter("word"), []
    for _ in STATE_FILTERS:
        task_filter = task_filter.next_states()
        seen.append(task_filter.states)
    assert (set(seen), task_filter) == (set(STATE_FILTERS), TaskFilter("word"))


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        (b"abc", "abc"), (b"abc\x7f\x7f", "a"), (b"\x7f", ""), (b"abc\x15x", "x"), ("grün".encode(), "grün"),
        ("grün\x08\x08".encode(), "gr"), ("grü".encode()[:-1], "gr"), (b"x" * 500, "x" * 100), (b"a\x01b", "ab"),
    ],
)  # fmt: skip
def test_search_text_can_be_edited(typed, shown):
    view = make_view(*TASKS)
    assert not any(type_search(view, typed))
    view.type_search(b"\x1b[A")  # an arrow key
    assert render_lines(view)[-1] == f"Search: {shown}▏  enter search  esc back"
    assert not view.type_search(b"\x1b")
    assert (view.filter, render_lines(view)[-1]) == (TaskFilter(), KEY_HELP)


@pytest.mark.parametrize(("answer", "task_id"), [(b"y", "fix-42"), (b"Y", "fix-42"), (b"n", None), (b"\x1b[A", None)])
def test_cancel_question_names_the_task_that_was_selected_when_the_question_was_asked(answer, task_id):
    view = make_view(*TASKS)
    view.ask_cancel()
    view.update(Snapshot(HEALTH, (task_status("running", "new"),), 0))
    assert render_lines(view)[-1] == "Cancel fix-42? y/n  Fix bug #42"
    assert (view.has_question, view.answer_cancel(answer), view.has_question) == (True, task_id, False)
    assert render_lines(view)[-1] == ("Nothing was cancelled." if task_id is None else KEY_HELP)


def test_cancel_has_no_question_for_an_ended_task_or_an_empty_list():
    view = make_view(*TASKS)
    view.move_selection(2)
    view.ask_cancel()
    assert (view.has_question, render_lines(view)[-1]) == (False, "The task has already ended.")
    view = make_view()
    view.ask_cancel()
    assert not view.has_question


def test_name_in_the_question_is_escaped():
    view = make_view(task_status("running", "fix-42", name="\x1b[31mred"))
    view.ask_cancel()
    assert render_lines(view)[-1] == r"Cancel fix-42? y/n  \x1b[31mred"


def test_help_lists_keys_and_the_states_of_each_filter_until_a_key_is_pressed():
    view = make_view(*TASKS)
    view.toggle_help()
    lines = render_lines(view, 80)
    for key in ("enter", "/", "f", "c", "?", "q"):
        assert any(line.split()[:1] == [key] for line in lines)
    for name in STATE_FILTERS:
        assert any(line.split()[:1] == [name] for line in lines)
    assert any(line.split()[:3] == ["failed", "failed", "and"] for line in lines)
    assert lines[-1] == "Press any key to return."
    view.toggle_help()
    assert render_lines(view)[-1] == KEY_HELP


@pytest.mark.parametrize(("width", "height"), [(80, 24), (60, 10), (20, 5), (300, 3)])
def test_help_fits_the_window(width, height):
    view = make_view(*TASKS)
    view.toggle_help()
    lines = view.render(width, height, NOW)
    assert len(lines) <= height
    assert max(line.cell_len for line in lines) <= width


def test_key_help_fits_a_narrow_window():
    assert render_lines(make_view(*TASKS), 60)[-1] == KEY_HELP


def test_selection_follows_the_task():
    view = make_view(*TASKS)
    view.move_selection(2)
    assert view.selected_id == "broken"
    view.update(Snapshot(HEALTH, (task_status("running", "new"), *TASKS), 0))
    assert view.selected_id == "broken"
    view.update(Snapshot(HEALTH, tuple(TASKS[:2]), 0))
    assert view.selected_id == "fix-42"


def test_selection_stops_at_both_ends_and_scrolls():
    tasks = [task_status("running", f"task-{number}") for number in range(100)]
    view = make_view(*tasks, missing=3)
    view.move_selection(-5)
    assert view.selected_id == "task-0"
    view.move_selection(1000)
    lines = render_lines(view, height=24)
    assert view.selected_id == "task-99"
    assert any(line.startswith("▸ task-99") for line in lines)
    assert lines[-5] == "3 older ones: sandbox task list"
    view.move_selection(-1000)
    lines = render_lines(view, height=24)
    assert lines[4].startswith("▸ task-0")
    assert lines[-5].startswith("85 more tasks below")


def test_unready_or_unreachable_server_is_shown():
    view = make_view(*TASKS, ready=False, reasons=["The disk is full."])
    assert "Not accepting tasks: The disk is full." in render_lines(view)[1]
    view.show_error("Cannot reach http://localhost:8122. Retrying.")
    lines = render_lines(view)
    assert lines[-1] == "Cannot reach http://localhost:8122. Retrying."
    assert any("fix-42" in line for line in lines)


def test_control_characters_in_names_are_escaped():
    lines = render_lines(make_view(task_status("running", "a", name="\x1b]0;owned\x07\nnext", state_message="\x1b[2J")))
    assert all("\x1b" not in line and "\n" not in line for line in lines)


def test_empty_list_shows_the_submit_command():
    assert "sandbox task submit" in "".join(render_lines(make_view()))


@pytest.mark.parametrize(("width", "columns"), [(80, ["ID", "STATE", "AGE", "NOW", "NAME"]), (120, None)])
def test_name_takes_precedence_over_numbers_and_leaves_room_for_the_activity(width, columns):
    named = {"name": "Rename the module that reads the configuration of the server"}
    wordy = {"error": {"code": "x", "message": "The tests of the parser fail on the second machine, again and again."}}
    lines = render_lines(make_view(task_status("failed", TASKS[1]["id"], **named, **wordy)), width)
    heading = lines[3].split()
    assert heading == (columns or ["ID", "STATE", "AGE", "TURNS", "TOKENS", "COST", "NOW", "NAME"])
    begin, end = lines[3].index("NOW"), lines[3].index("NAME")
    assert end - begin >= 28
    assert lines[4][end:].startswith("Rename the module")


def test_name_stays_in_a_narrow_window_next_to_a_long_id_and_state():
    reason = "The agent was still working after 1h; raise lifecycle.timeout."
    failed = {"error": {"code": "timeout", "message": reason}, "sandbox_kept": True}
    lines = render_lines(make_view(task_status("failed_preserved", "fetch-refused", **failed)), 80)
    assert "NAME" in lines[3].split()
    assert "failed, preserved" in lines[4]
    assert "Fix bug #42" in lines[4]


def test_full_failure_message_of_the_selected_task_is_shown_above_the_keys():
    reason = f"The clone failed after {'a long time in a big repository ' * 4}of the server; try again."
    tasks = [task_status("running", "fix-42"), task_status("failed", "b", error={"code": "x", "message": reason})]
    view = make_view(*tasks)
    assert render_lines(view, 80)[-4].startswith("Fix bug #42: ")
    view.move_selection(1)
    lines = render_lines(view, 80)
    assert " ".join(" ".join(lines[-4:-1]).split()) == f"Fix bug #42: {reason}"
    assert lines[-1] == KEY_HELP
    assert len(view.render(80, 24, NOW)) == 24
    assert not [line for line in render_lines(view, 80, 10) if line.startswith("Fix bug #42: ")]


def test_failure_that_is_too_long_for_the_window_is_cut():
    reason = "word " * 200
    lines = render_lines(make_view(task_status("failed", "b", error={"code": "x", "message": reason})), 80)
    assert lines[-2].endswith("…")
    assert all(len(line) <= 80 for line in lines)


def test_continuations_and_reruns_have_their_marks_and_prompts():
    name, prompt = "Fix the flaky ledger test", "Add a regression test"
    tasks = [
        task_status("running", "first", name=name),
        task_status("running", "second", name=name, parent="first", prompt_beginning=prompt),
        task_status("running", "third", name=name, parent="first", rerun_of="second"),
    ]
    lines = render_lines(make_view(*tasks), 240)
    assert lines[4].endswith(f"  {name}")
    assert lines[5].endswith(f"  ↳ {prompt} · {name}")
    assert lines[6].endswith(f"  ↻ {name}")
