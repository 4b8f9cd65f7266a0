"""Colored patches."""

from sandbox.cli.checkout.downloaded_patch import colorize, patch_lines

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


def test_lines_are_colored_by_their_meaning():
    styles = [
        line.split("m")[0].removeprefix("\x1b[") if line.startswith("\x1b[") else ""
        for line in colorize(LINES, has_color=True)
    ]
    assert styles == ["1", "1", "1", "36", "", "31", "31", "32", "", "1"]


def test_lines_are_escaped_even_without_color():
    lines = list(colorize(LINES, has_color=False))
    assert lines[:-1] == LINES[:-1]
    assert lines[-1] == r"diff --git a/\x1b[2J b/x"


def test_names_in_patch_headers_are_escaped(tmp_path):
    patch = tmp_path / "patch"
    hidden = ["a\u00a0b", "a\u2003b", "\ue000", "\u0301x", "a\udcffb"]
    lines = [f"diff --git a/{name} b/{name}" for name in hidden] + ["@@ -0,0 +1 @@", "+a\u00a0b \udcff"]
    patch.write_bytes(b"".join(line.encode(errors="surrogateescape") + b"\n" for line in lines))
    escaped = ["a\\xa0b", "a\\u2003b", "\\ue000", "\\u0301x", "a\\udcffb"]
    shown = [f"diff --git a/{name} b/{name}" for name in escaped] + ["@@ -0,0 +1 @@", "+a\u00a0b \ufffd"]
    assert list(colorize(patch_lines(patch), has_color=False)) == shown


def test_names_in_any_script_are_unchanged_in_headers():
    lines = ["diff --git a/h\u00e4\u00df b.txt b/h\u00e4\u00df b.txt", "+++ b/\u9577 \u0e01\u0e34.txt\t"]
    assert list(colorize(lines, has_color=False)) == [line.rstrip("\t") for line in lines]


def test_hunk_with_wrong_line_count_is_accepted():
    assert list(colorize(["@@ -1,999999999 +1 @@", "+x", "diff"], has_color=False)) == [
        "@@ -1,999999999 +1 @@",
        "+x",
        "diff",
    ]
