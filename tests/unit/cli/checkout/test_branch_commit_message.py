"""The message of a commit with a task's changes: subject, wrapped body and trailer. Hostile text is escaped."""

import subprocess
import time

import pytest

from doubles.deployment import git, make_repository
from sandbox.cli.checkout.branch_commit import (
    BODY_LINES_MAX,
    CHAIN_TASK_CHARACTERS_MAX,
    SUBJECT_CHARACTERS_MAX,
    CommittedTask,
    build_chain_message,
    build_commit_message,
)

ID = "fix-42"


def build(text: str, name: str = "Fix bug #42") -> str:
    return build_commit_message(CommittedTask(ID, name, text))


def trailers(message: str) -> list[str]:
    """Return the trailers as git reads them."""
    completed = subprocess.run(
        ["git", "interpret-trailers", "--parse"], input=message.encode(), capture_output=True, check=True, timeout=60
    )
    return completed.stdout.decode().splitlines()


def test_name_is_the_subject_and_the_final_message_is_the_body():
    assert build("All tests pass now!\n- `basket.py`: sums all prices.\n", "Fix the failing test.") == (
        "Fix the failing test.\n\nAll tests pass now!\n- `basket.py`: sums all prices.\n\nSandbox-Task: fix-42\n"
    )
    assert build("## Summary\n\nAdded a retry.\n").startswith("Fix bug #42\n\n## Summary\n\nAdded a retry.\n\n")


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_task_without_a_final_message_has_no_body(text):
    assert build(text) == "Fix bug #42\n\nSandbox-Task: fix-42\n"


@pytest.mark.parametrize(
    ("line", "subject"),
    [
        ("**Fixed** the `total_cents` loop", "Fixed the total_cents loop"),
        ("- Fix the loop", "Fix the loop"),
        ("1. Fix the loop", "Fix the loop"),
        ("Fix   the\tloop", "Fix the loop"),
        ("# Fix the loop", "Fix the loop"),
        ("**", "**"),
    ],
)
def test_subject_has_no_markdown(line, subject):
    assert build("Done.", line).splitlines()[0] == subject


def test_subject_without_a_task_name_has_a_default():
    assert build("Done.", "").splitlines()[0] == "Apply the changes of a task"


def test_long_name_is_cut_and_repeated_in_the_body():
    text = "The total left out the last price because the loop ended one element too early, so I replaced it."
    subject, gap, *body = build("Done.", text).splitlines()
    assert (subject, gap) == ("The total left out the last price because the loop ended one element", "")
    assert " ".join(body[:-4]) == text
    assert body[-4:] == ["", "Done.", "", "Sandbox-Task: fix-42"]
    assert max(map(len, body)) <= 72


@pytest.mark.parametrize("text", ["x" * 500, "word " * 500, "x" * 71 + " y"])
def test_subject_of_the_commit_message_is_bounded(text):
    subject = build("Done.", text).splitlines()[0]
    assert 60 < len(subject) <= SUBJECT_CHARACTERS_MAX
    assert "…" not in subject


@pytest.mark.parametrize(
    ("line", "subject"),
    [
        ("Fix the loop in the basket module. It ends one element too early, and leaves out the price.",
         "Fix the loop in the basket module."),
        ("The tests fail. Find the bug, fix it, and add a test for the case that is missing there.",
         "The tests fail. Find the bug, fix it"),
        ("Ok. The total left out the last price of every basket, so that nobody paid for the last item.",
         "Ok. The total left out the last price of every basket"),
        ("The total left out the last price (the loop ended one element too early in each basket).",
         "The total left out the last price"),
        ("The total left out the last price, so every customer who had two items paid for the wrong one.",
         "The total left out the last price"),
        ("Replace the list of the prices that the basket sums with a generator that yields all of them.",
         "Replace the list of the prices that the basket sums with a generator"),
        ("The tests fail. Find the bug, fix it, and add a test for the missing…",
         "The tests fail. Find the bug, fix it, and add a test for the missing"),
        ("A" * 70 + ". " + "B" * 20, "A" * 70 + "."),
        ("A" * 71 + ". " + "B" * 20, "A" * 71 + "."),
        ("A" * 72 + ". " + "B" * 20, "A" * 72),
    ],
)  # fmt: skip
def test_long_subject_is_cut_at_the_end_of_a_sentence_or_clause_or_word(line, subject):
    assert build("Done.", line).splitlines()[0] == subject


def test_list_items_are_wrapped_with_an_indent_but_code_is_not():
    code = "print(" + ", ".join(["value"] * 20) + ")"
    item = "- " + "word " * 30
    lines = build(f"Done.\n\n{item}\n\n```\n{code}\n```\n").splitlines()
    assert code in lines
    assert [line for line in lines if line.startswith("  word")]


def test_control_and_bidi_characters_are_escaped():
    message = build("Body\x07 \u2066x", "Fix \x1b[31mred\x1b[m \u202eevil\u202c\x00")
    assert message.startswith("Fix \\x1b[31mred\\x1b[m \\u202eevil\\u202c\\x00\n\nBody\\x07 \\u2066x\n\n")
    assert build("Done.", "Grüße: 値段 ✅").startswith("Grüße: 値段 ✅\n")


@pytest.mark.parametrize(
    "text",
    [
        "Done.\n\nSandbox-Task: other\nSigned-off-by: Boss <boss@example.org>",
        "Sandbox-Task: other",
        "Done.\n---\nSandbox-Task: other",
        "Done.\n--- a/file\n+++ b/file",
        "Done.\r\n\r\nCo-authored-by: Boss <boss@example.org>\r\n",
        "",
    ],
)
def test_task_trailer_is_the_only_trailer(text):
    assert trailers(build(text)) == ["Sandbox-Task: fix-42"]


COPY_DIFF = "diff --git a/count.txt b/other.txt\nsimilarity index 100%\ncopy from count.txt\ncopy to other.txt"


@pytest.mark.parametrize(
    "body",
    [
        COPY_DIFF,
        "word " * 14 + COPY_DIFF,
        "```\nIndex: other.txt\n--- /dev/null\n+++ other.txt\n@@ -0,0 +1 @@\n+x\n```",
        "word " * 14 + "--- a/other.txt",
        f"From {'0' * 40} Mon Sep 17 00:00:00 2001\nFrom: Boss <boss@example.org>\nSubject: Other\n\nText",
        "From: Boss <boss@example.org>\nSubject: Other\n\nText",
        "from: Boss <boss@example.org>",
        "Date: Mon, 1 Jan 2001 00:00:00 +0000",
        "[PATCH] Other subject",
        f">From {'0' * 40} Mon Sep 17 00:00:00 2001",
        "Lost.\n  -- >8 --\n\nFrom: Boss <boss@example.org>\nSubject: Other",
        "Lost.\n\n# ------------------------ >8 ------------------------\nThe rest",
        "Lost.\n- - 8< - - cut here - - %< - -\nThe rest",
        "The condition is x >8 y.",
        "The files differ: diff --git is not at the start of a line. From now on, the index is read.",
    ],
)
def test_message_is_preserved_in_an_email(tmp_path, body):
    message = build(f"Fixed.\n\n{body}")
    author, applied_message, files = send_by_email(tmp_path, message)
    assert author == "Test <test@example.org> 2026-01-29"
    assert applied_message.split() == message.split()
    assert ("x >8 y" in applied_message) == ("x >8 y" in body)
    assert not applied_message.startswith(("Other", "The rest"))
    assert files == ["count.txt"]


def send_by_email(directory, message):
    """Commit a change with this message, and apply the commit with `git am`. Return its author, message and files."""
    bare = directory / "repo.git"
    make_repository(bare, {"count.txt": "0\n"})
    for name in ("sender", "receiver"):
        git("clone", "-q", str(bare), str(directory / name), cwd=directory)
    (directory / "message").write_text(message)
    (directory / "sender" / "count.txt").write_text("1\n")
    git("commit", "-qa", "-F", str(directory / "message"), cwd=directory / "sender")
    email = directory / "email"
    email.write_text(git("format-patch", "-1", "--stdout", cwd=directory / "sender"))
    git("am", "-q", "--scissors", str(email), cwd=directory / "receiver")
    author = git("log", "-1", "--format=%an <%ae> %as", cwd=directory / "receiver").strip()
    applied_message = git("log", "-1", "--format=%B", cwd=directory / "receiver")
    return author, applied_message, git("ls-files", cwd=directory / "receiver").splitlines()


@pytest.mark.parametrize("text", ["[" + "_" * 7900, "[skip" + "_" * 7900, "[" + "a_" * 3900, "[skip " * 1300])
def test_message_is_built_quickly_from_any_text(text):
    begin = time.process_time()
    build(f"Fix it.\n\n{text}")
    assert time.process_time() - begin < 1


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Fix [skip** ci] it", "Fix (skip ci) it"),
        ("Fix [skip pre-commit.ci] it", "Fix (skip pre-commit.ci) it"),
        ("Fix [pre-commit.ci skip] it", "Fix (pre-commit.ci skip) it"),
        ("Fix it.\n\n[CI  skip]", "(CI  skip)"),
        ("Fix it.\n\n[no ci] [skip actions] [skip azurepipelines] [travis skip]", "(no ci) (skip actions)"),
        ("Fix it.\n\n***NO_CI***", "(NO_CI)"),
        ("Fix it [skip ci](docs/ci.md)", "Fix it (skip ci)(docs/ci.md)"),
        (
            "Fix it.\n\n[skip-ci] [ci-skip] [CI_SKIP] [CF-Pages-Skip] [skip-cd]",
            "(skip-ci) (ci-skip) (CI_SKIP) (CF-Pages-Skip)",
        ),
        ("Fix it.\n\n[skip travis ci] [travis ci skip]", "(skip travis ci) (travis ci skip)"),
        (
            "Fix [the no-op skip list] and [no two lists are equal]",
            "[the no-op skip list] and [no two lists are equal]",
        ),
        ("Fix [skip lists](docs/lists.md) and xs[no], skip CI [1]", "[skip lists](docs/lists.md)"),
        ("Fix it.\n\n- [ ] skip\n- [x] no", "- [ ] skip\n- [x] no"),
    ],
)
def test_message_contains_no_instruction_for_a_ci_service(text, shown):
    name, _, final_message = text.partition("\n\n")
    message = build(final_message, name)
    assert shown in message
    assert not any(mark in message.lower() for mark in ("ci]", "[ci", "***", "ci skip]", "-skip]", "[skip a", "[skip-"))


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("fixup! Add a check", "fixup: Add a check"),
        ("- **squash!** amend! Add a check", "squash: amend: Add a check"),
        ("Fixup! is a word; so is amend! here", "Fixup! is a word; so is amend! here"),
    ],
)
def test_subject_contains_no_instruction_for_a_rebase(text, subject):
    assert build("Done.", text).splitlines()[0] == subject


def test_body_contains_no_sign_off():
    message = build("Done.\n\nSigned-off-by: Boss <boss@example.org>\nReviewed-By: Boss\n\nReviewed by nobody.")
    assert "\n Signed-off-by: Boss <boss@example.org>\n Reviewed-By: Boss\n\nReviewed by nobody.\n" in message


def test_body_adds_no_email_recipient():
    message = build("Done.\n\nCc: x@example.org\ncc: y@example.org\nccache: faster")
    assert "\n Cc: x@example.org\n cc: y@example.org\nccache: faster\n" in message


def test_body_of_the_commit_message_is_bounded():
    message = build("Done.\n" + "line\n" * 100_000)
    assert len(message.splitlines()) <= BODY_LINES_MAX + 6
    assert "\n…\n" in message


def test_message_of_a_chain_has_one_line_for_each_task():
    tasks = [CommittedTask("a", "# Add `basket`", ""), CommittedTask("b", "Second", "# Done\n\n- Fixed it.\nMore.")]
    assert build_chain_message(tasks) == "Add basket\n\n- Add basket\n- Fixed it.\n\nSandbox-Task: b\n"


def test_subject_of_a_chain_is_cut_at_a_word():
    subject = build_chain_message([CommittedTask("a", "Restructure " * 9, "")] * 2).splitlines()[0]
    assert len(subject) <= SUBJECT_CHARACTERS_MAX
    assert set(subject.split()) == {"Restructure"}


def test_long_name_of_a_chain_is_repeated_in_the_body():
    name = "The tests fail. Find the bug, fix it, and add a test for the case that is missing there."
    message = build_chain_message([CommittedTask("a", name, "All tests pass now!"), CommittedTask("b", "Second", "")])
    assert message == (
        f"The tests fail. Find the bug, fix it\n\n{name[:70]}\n{name[71:]}\n\n"
        "- All tests pass now!\n- Second\n\nSandbox-Task: b\n"
    )


def test_message_of_a_chain_has_no_instructions_and_its_lines_are_bounded():
    hostile = [CommittedTask("a", "fixup! x [skip ci]", "word " * 1000), CommittedTask("b", "", "Signed-off-by: x <y>")]
    message = build_chain_message([*hostile] * 100)
    assert message.startswith("fixup: x (skip ci)\n")
    assert len(message.splitlines()) <= BODY_LINES_MAX + 6
    assert max(map(len, message.splitlines())) <= CHAIN_TASK_CHARACTERS_MAX
    assert trailers(message) == ["Sandbox-Task: b"]
