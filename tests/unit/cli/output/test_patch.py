"""A patch in colour."""

from sandbox.cli.output.patch import colorize

LINES = [
    "diff --git a/q.sql b/q.sql",
    "--- a/q.sql",
    "+++ b/q.sql",
    "@@ -1,3 +1,2 @@ select",
    " one",
    "--- a comment",
    "-two",
    "++++ three",
    "\\ No newline at end of file",
    "diff --git a/\x1b[2J b/x",
]


def test_lines_are_coloured_by_what_they_are_and_not_by_how_they_begin():
    styles = [
        line.split("m")[0].removeprefix("\x1b[") if line.startswith("\x1b[") else ""
        for line in colorize(LINES, has_color=True)
    ]
    assert styles == ["1", "1", "1", "36", "", "31", "31", "32", "", "1"]


def test_without_colour_nothing_but_the_text_is_left_and_that_is_harmless():
    shown = list(colorize(LINES, has_color=False))
    assert shown[:-1] == LINES[:-1]
    assert shown[-1] == r"diff --git a/\x1b[2J b/x"


def test_a_hunk_that_promises_more_lines_than_there_are_does_no_harm():
    assert list(colorize(["@@ -1,999999999 +1 @@", "+x", "diff"], has_color=False)) == [
        "@@ -1,999999999 +1 @@",
        "+x",
        "diff",
    ]
