"""Small diffs of the agent's edits: context, bounds and hostile text."""

import time

import pytest

from sandbox.cli.output.event_lines import diff_edits


def edit(old: str | None, new: str, path: str = "a.py") -> dict:
    return {"path": path, "old": old, "new": new}


def diff(*edits: dict, lines_max: int = 100) -> list[str]:
    return [line.text for line in diff_edits(edits, "a.py", lines_max)]


def test_changed_lines_have_one_line_of_context():
    old, new = "one\ntwo\nthree\nfour\nfive\n", "one\ntwo\n3\nfour\nfive\n"
    assert diff(edit(old, new)) == [" two", "-three", "+3", " four"]


def test_equal_lines_between_changes_are_shown():
    assert diff(edit("a\nb\nc", "A\nb\nC")) == ["-a", "+A", " b", "-c", "+C"]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("a\nb\n", "a\n", [" a", "-b"]),
        ("a\n", "a\nb\n", [" a", "+b"]),
        ("", "a\n", ["+a"]),
        (None, "a\nb\n", ["+a", "+b"]),
        ("a\na\n", "a\n", [" a", "-a"]),
        ("a\n", "", ["-a"]),
        ("same", "same", [" same"]),
        (None, "", []),
    ],
)
def test_lines_are_removed_and_added(old, new, expected):
    assert diff(edit(old, new)) == expected


def test_paths_are_shown_when_they_differ_from_the_summary():
    lines = diff_edits([edit("a", "b"), edit("c", "d"), edit(None, "x", "other.py")], "a.py", 100)
    assert [(line.kind, line.text) for line in lines] == [
        ("removed", "-a"), ("added", "+b"), ("note", "…"), ("removed", "-c"), ("added", "+d"),
        ("path", "other.py"), ("added", "+x"),
    ]  # fmt: skip


def test_long_diff_is_truncated_and_omitted_lines_are_counted():
    lines = diff(edit("gone\n", "".join(f"{n}\n" for n in range(1500))), edit("a\nb", "c"), lines_max=3)
    assert lines == ["-gone", "+0", "+1", "… 3 lines removed and 1,501 lines added in total"]


def test_truncated_texts_are_noted():
    [line, note] = diff_edits([edit(None, "x" * 100)], "a.py", 8, is_cut=True)
    assert (line.kind, note.text) == ("added", "… at least 1 line added in total")


def test_diff_with_exactly_the_maximum_number_of_lines_has_no_note():
    assert diff(edit(None, "a\nb\nc"), lines_max=3) == ["+a", "+b", "+c"]


def test_diff_of_large_texts_is_fast():
    old, new = ("\n".join(f"{prefix}{n % 7}" for n in range(50_000)) for prefix in "ab")
    start = time.process_time()
    assert len(diff(edit(old, new), lines_max=8)) == 9
    assert time.process_time() - start < 2


def test_missing_fields_in_responses_from_another_server_version_are_ignored():
    assert diff({"path": "a.py"}) == []
