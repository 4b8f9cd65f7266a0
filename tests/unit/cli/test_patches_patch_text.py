"""Colored patches, and patches with binary files."""

import subprocess

from sandbox.cli.patches import colorize, patch_lines, summarize_binary_files

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


def make_patch(directory, changes, executable=()):
    """Return the lines of git's binary patch for the changes of a repository that has `old.bin`, `gone.bin`, `text`."""

    def git(*arguments):
        run = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(run, cwd=directory, capture_output=True, check=True, timeout=60).stdout

    git("init", "-q")
    for name, content in {"old.bin": bytes(range(256)), "gone.bin": b"\0\1", "text": b"one\n"}.items():
        (directory / name).write_bytes(content)
    git("add", "--all")
    git("commit", "-qm", "base")
    for name, content in changes.items():
        if content is None:
            (directory / name).unlink()
        else:
            (directory / name).write_bytes(content)
    for name in executable:
        (directory / name).chmod(0o755)
    git("add", "--all")
    return git("diff", "--cached", "--binary", "--full-index").decode(errors="surrogateescape").splitlines()


def test_each_binary_file_is_one_line(tmp_path):
    changes = {"a b.bin": b"\0" * 377, "gone.bin": None, "old.bin": b"\0new", "text": b"two\n", "z\u00e4.bin": b"\0"}
    lines = list(summarize_binary_files(make_patch(tmp_path, changes)))
    assert [line for line in lines if line.startswith("Binary file")] == [
        "Binary file a b.bin: added, 377 bytes",
        "Binary file gone.bin: deleted, 2 bytes",
        "Binary file old.bin: changed, 256 to 4 bytes",
        'Binary file "z\\303\\244.bin": added, 1 bytes',
    ]
    assert lines[3:-1][0] == "diff --git a/text b/text"
    assert lines[-3:-1] == ["-one", "+two"]
    assert "GIT binary patch" not in lines


def test_executable_binary_file_is_marked(tmp_path):
    """A script that contains a NUL byte is binary, and a shell still runs it."""
    changes = {"new.sh": b"#!/bin/sh\n\0", "old.bin": b"\0new"}
    lines = list(summarize_binary_files(make_patch(tmp_path, changes, executable=changes)))
    assert [line for line in lines if line.startswith("Binary file")] == [
        "Binary file new.sh: added, 11 bytes, executable",
        "Binary file old.bin: changed, 256 to 4 bytes, executable",
    ]


def test_patch_of_text_files_is_unchanged(tmp_path):
    lines = make_patch(
        tmp_path, {"text": b"GIT binary patch\nliteral 3\n", "new": b"", "other": b"diff --git a/x b/x\n"}
    )
    assert list(summarize_binary_files(lines)) == lines
    assert list(summarize_binary_files(LINES)) == LINES
    omitted = ["# x was left out", *lines]
    assert list(summarize_binary_files(omitted)) == omitted


def test_difference_of_a_large_binary_file_has_no_size(tmp_path):
    lines = make_patch(tmp_path, {"old.bin": bytes(range(256)) + b"x"})
    assert any(line.startswith("delta") for line in lines)
    assert list(summarize_binary_files(lines)) == ["Binary file old.bin: changed"]
