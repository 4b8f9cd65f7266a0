"""Coloured patches."""

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


def test_lines_are_coloured_by_their_meaning():
    styles = [
        line.split("m")[0].removeprefix("\x1b[") if line.startswith("\x1b[") else ""
        for line in colorize(LINES, has_color=True)
    ]
    assert styles == ["1", "1", "1", "36", "", "31", "31", "32", "", "1"]


def test_text_without_colour_is_escaped():
    lines = list(colorize(LINES, has_color=False))
    assert lines[:-1] == LINES[:-1]
    assert lines[-1] == r"diff --git a/\x1b[2J b/x"


def test_hunk_with_wrong_line_count_is_accepted():
    assert list(colorize(["@@ -1,999999999 +1 @@", "+x", "diff"], has_color=False)) == [
        "@@ -1,999999999 +1 @@",
        "+x",
        "diff",
    ]
