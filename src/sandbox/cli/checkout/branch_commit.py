"""Commits a task's changes to a new branch in the checkout, without using the working tree, and pushes the branch.

No file from the patch is written to the working tree, so none can run as a hook or a filter. The commit message is made
from the agent's final message, which is untrusted.
"""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple, NoReturn
from urllib.parse import quote, quote_plus

import click

from sandbox.cli.checkout.user_checkout import fail_with_git_output
from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.output.console import escape_text
from sandbox.model.repository_urls import public_repository_url, repository_location

if TYPE_CHECKING:
    from subprocess import CompletedProcess

    from sandbox.cli.checkout.user_checkout import Checkout


_CONFIG = ("i18n.commitEncoding=UTF-8", "core.splitIndex=false")
_FETCH_OPTIONS = (
    *("--no-tags", "--no-prune", "--no-write-fetch-head", "--no-recurse-submodules", "--no-auto-maintenance"),
    *("--quiet", "--refmap="),
)
"""Options with which a fetch changes nothing except the object database."""


@dataclass(frozen=True)
class NewBranch:
    """A branch to create in a checkout. remote: the remote to fetch missing commits from, and to push the branch to."""

    checkout: Checkout
    name: str
    remote: str | None = None

    def require_available(self) -> None:
        """Fail if the name is invalid or in use."""
        if self.checkout.git_output("check-ref-format", "--branch", self.name) != self.name:
            raise click.BadParameter(f"{self.name!r} is not a valid branch name", param_hint="'--branch'")
        checked_out = self.checkout.git_output("worktree", "list", "--porcelain") or ""
        if self._existing_commit() is not None or f"branch {self._ref}" in checked_out.splitlines():
            self._fail_because_it_exists("in this checkout")

    def commit(self, base: str, patch: Path, message: str) -> str:
        """Commit the patch on top of `base`, and create the branch at this commit; return the commit."""
        self._require_identity()
        with TemporaryDirectory() as directory:
            environment = {**os.environ, "GIT_INDEX_FILE": str(Path(directory) / "index")}
            apply = ("apply", "--cached", "--whitespace=nowarn", "--", str(patch.resolve()))
            for arguments in (("read-tree", base), apply):
                completed = self.checkout.run_git(*arguments, config=_CONFIG, environment=environment)
                if completed.returncode:
                    sentence = f"The patch does not apply to commit {base[:12]}, so no branch was created."
                    fail_with_git_output(sentence, completed.stderr)
            tree = self._output(self.checkout.run_git("write-tree", environment=environment))
        signing = ["-S"] if self.checkout.git_output("config", "--type=bool", "commit.gpgSign") == "true" else []
        committed = self.checkout.run_git(
            "commit-tree", *signing, "-p", base, tree, config=_CONFIG, stdin=message.encode()
        )
        commit = self._output(committed)
        created = self.checkout.run_git("update-ref", "-m", "sandbox task apply", self._ref, commit, "")
        if created.returncode:
            fail_with_git_output(f"git could not create the branch {self._shown}.", created.stderr)
        return commit

    def push(self, commit: str) -> tuple[str, str | None]:
        """Push the branch and make it track the new remote branch. Delete the branch if the push fails.

        A branch that exists on the remote is never changed. Return the remote and, if it is known, the URL that opens a
        pull request.
        """
        lease = f"--force-with-lease={self._ref}:"  # an empty value requires that the remote branch does not exist
        try:
            remote = self.remote or push_remote(self.checkout)
            pushed = self.checkout.run_git_with_user_config(
                "push", "--porcelain", "--set-upstream", lease, "--", remote, f"{self._ref}:{self._ref}"
            )
            if pushed.returncode:
                self._fail_push(remote, pushed)
        except BaseException:
            self.checkout.run_git("update-ref", "-d", self._ref, commit)
            raise
        url = self.checkout.git_output("remote", "get-url", "--push", remote)
        return remote, pull_request_url(url, self.name) if url else None

    def fetch_missing(self, base: str, repository: str, branch: str) -> None:
        """Fetch the commit `base` if the checkout does not have it. repository, branch: what the task cloned."""
        if self._has(base):
            return
        remote = self.remote or _remote_of(self.checkout, repository) or push_remote(self.checkout)
        sources = [base]
        if self._is_branch_ref(f"refs/heads/{branch}"):  # some servers send only branches, not single commits
            sources.append(f"refs/heads/{branch}")
        for source in sources:
            fetched = self.checkout.run_git("fetch", *_FETCH_OPTIONS, "--", remote, source)
            if self._has(base):
                return
        sentence = f"Neither this checkout nor its remote {escape_text(remote)} has the task's commit {base[:12]}."
        advice = f"Run the command in a checkout of {escape_text(public_repository_url(repository))}, or add --remote."
        fail_with_git_output(sentence, fetched.stderr, advice)

    @property
    def _ref(self) -> str:
        return f"refs/heads/{self.name}"

    @property
    def _shown(self) -> str:
        return escape_text(self.name)

    def _existing_commit(self) -> str | None:
        return self.checkout.git_output("rev-parse", "--verify", "--quiet", "--end-of-options", self._ref)

    def _is_branch_ref(self, ref: str) -> bool:
        """Return whether the reference is valid. A refspec such as `main:refs/heads/main` would move a branch."""
        return "\0" not in ref and not self.checkout.run_git("check-ref-format", ref).returncode

    def _has(self, commit: str) -> bool:
        return not self.checkout.run_git("cat-file", "-e", f"{commit}^{{commit}}").returncode

    def _require_identity(self) -> None:
        completed = self.checkout.run_git("var", "GIT_COMMITTER_IDENT")
        if completed.returncode:
            advice = "Set it: git config user.name NAME; git config user.email EMAIL"
            fail_with_git_output(
                "The commit would have no author: git is not configured with a name and email.", b"", advice
            )

    def _output(self, completed: CompletedProcess[bytes]) -> str:
        if completed.returncode:
            fail_with_git_output("git could not create the commit.", completed.stderr)
        return completed.stdout.decode().strip()

    def _fail_push(self, remote: str, pushed: CompletedProcess[bytes]) -> NoReturn:
        if b"(stale info)" in pushed.stdout:
            self._fail_because_it_exists(f"on {escape_text(remote)}")
        sentence = f"git could not push to {escape_text(remote)}, so no branch was created."
        reasons = [line[1:].strip() for line in pushed.stdout.splitlines() if line.startswith(b"!")]
        fail_with_git_output(
            sentence, pushed.stderr + b"\n".join(reasons), "Create the branch only here: leave out --push"
        )

    def _fail_because_it_exists(self, place: str) -> NoReturn:
        message = f"Error: The branch {self._shown} already exists {place}, so nothing was changed."
        fail(f"{message}\n  Choose another name: --branch {self._shown}-2", ExitCode.CONFLICT)


def push_remote(checkout: Checkout) -> str:
    """Return the remote for pushing new branches: `remote.pushDefault`, otherwise `origin`, otherwise the only one."""
    names = (checkout.git_output("remote") or "").splitlines()
    for name in (checkout.git_output("config", "--get", "remote.pushDefault"), "origin"):
        if name in names:
            return str(name)
    if len(names) != 1:
        problem = f"several remotes: {', '.join(names)}" if names else "no remote"
        advice = "Choose one: add --remote NAME" if names else "Add one: git remote add origin URL"
        fail(f"Error: This checkout has {escape_text(problem)}.\n  {advice}", ExitCode.USAGE)
    return names[0]


def _remote_of(checkout: Checkout, repository: str) -> str | None:
    """Return the remote for this repository, even if the remote's URL uses a different protocol."""
    location = repository_location(repository)
    for name in (checkout.git_output("remote") or "").splitlines():
        url = checkout.git_output("remote", "get-url", name)
        if url and repository_location(url) == location:
            return name
    return None


_SSH_HOSTS = {"ssh.github.com:443": "github.com", "altssh.gitlab.com:443": "gitlab.com"}
"""Maps SSH endpoints on the HTTPS port to the hosts of their web pages."""


def pull_request_url(remote_url: str, branch: str) -> str | None:
    """Return the URL that opens a pull request for a branch on GitHub or GitLab; None for any other host."""
    host, _, path = repository_location(remote_url).partition("/")
    if not remote_url.startswith("http"):
        host = _SSH_HOSTS.get(host, host.partition(":")[0])
    page = f"https://{host}/{quote(path, safe='/%')}"
    if path and host.startswith("github."):
        return f"{page}/pull/new/{quote(branch)}"
    if path and host.startswith("gitlab."):
        return f"{page}/-/merge_requests/new?merge_request%5Bsource_branch%5D={quote_plus(branch)}"
    return None


SUBJECT_CHARACTERS_MAX = 72
CLAUSE_CHARACTERS_MIN = 30
"""Minimum length to which a subject is cut at the end of a sentence or clause. Otherwise, it is cut at a word."""

BODY_CELLS_MAX = 72
"""Width of the body. Code, and words that exceed the width, are not wrapped."""

BODY_LINES_MAX = 60
BODY_CHARACTERS_MAX = 8000

CHAIN_TASK_CHARACTERS_MAX = 200
"""Maximum length of each task's line in the commit message for a chain of tasks."""

TRAILER = "Sandbox-Task"

_HEADING = re.compile(r"#{1,6}\s+")
_MARKERS = re.compile(r"\A(?:#{1,6}|[-*+>]|[0-9]{1,3}[.)])\s+")
_LIST_ITEM = re.compile(r"\s*(?:[-*+]|[0-9]{1,3}[.)])\s+")
_FENCES = ("```", "~~~")
_SENTENCE_END = re.compile(r"[.!?](?=\s)")
_CLAUSE_END = re.compile(r"(?=[,;:]\s|\s[–—(-])")
_DANGLING_WORDS = re.compile(
    r"( (a|an|and|as|at|because|but|by|for|from|in|of|on|or|so|that|the|to|too|very|when|which|with))+$"
)
"""Words that cannot end a subject."""

_INSTRUCTION_START = re.compile(
    r"(---|diff -|Index: |>?From |(From|Subject|Date|Cc):|\[PATCH\]|[\w-]+-by:)", re.IGNORECASE
)
"""Matches the start of a patch, of an email or header for `git am`, of a sign-off and of a `git send-email` recipient.

An indented line is plain text.
"""

_SCISSORS = re.compile(r"([<>])(?=[8%])|([8%])(?=[<>])")
"""Marks in a line of hyphens at which git and `git am` cut a message, even if the line is indented."""

_REBASE_INSTRUCTION = re.compile(r"\A((fixup|squash|amend)! ?)+")
"""Starts of subjects that `git rebase --autosquash` reads as an instruction to change another commit."""

_WORD = r"(?:[^\W_]|\.)++"
_NEXT_WORD = rf"[\s_-]++{_WORD}"
_CI_INSTRUCTION = re.compile(
    rf"\[\s*+((?:skip|no)(?:{_NEXT_WORD}){{1,3}}|{_WORD}(?:{_NEXT_WORD}){{0,2}}[\s_-]++skip)[\s_-]*+\]"
    r"|\*{3}(no_ci)\*{3}",
    re.IGNORECASE,
)
"""Texts, such as `[skip ci]`, that make CI services ignore a commit.

No character can be both part of a word and a separator. Otherwise, the search would take exponential time for some
messages.
"""

_CI_WORD = re.compile(r"(?<![a-z])(ci|cd|actions?|checks?|builds?|deploy|release|pipelines?)(?![a-z])", re.IGNORECASE)
"""Every instruction for a CI service contains one of these words. The text of a Markdown link rarely does."""


class CommittedTask(NamedTuple):
    """A task whose changes become one commit, alone or together with those of the other tasks of its chain."""

    id: str
    name: str
    final_message: str


def build_commit_message(task: CommittedTask) -> str:
    """Return a subject, a wrapped body and the `Sandbox-Task` trailer.

    The subject is the task's name, which says what was requested; the final message says what the agent claims. A name
    that is too long is cut, and the body starts with the whole name. The trailer is in a separate last paragraph, so
    that no line of the message is read as a trailer. No line is an instruction for git or for a CI service, and no line
    signs the commit off.
    """
    lines = [escape_text(line.rstrip()) for line in task.final_message[:BODY_CHARACTERS_MAX].splitlines()]
    is_cut = len(task.final_message) > BODY_CHARACTERS_MAX
    title, subject = _subject(_name_title(task) or "Apply the changes of a task")
    return _compose(subject, lines if subject == title else [title, "", *lines], task.id, is_cut=is_cut)


def _name_title(task: CommittedTask) -> str:
    """Return the task's name without Markdown, such as the marks of a heading."""
    return _plain(escape_text(task.name)).lstrip("# ")


def _subject(title: str) -> tuple[str, str]:
    """Return the title without a prefix such as `fixup!`, and the subject, which may be shorter."""
    title = _REBASE_INSTRUCTION.sub(lambda match: match[0].replace("!", ":"), title)
    return title, _shorten(title)


def _compose(subject: str, lines: Sequence[str], task_id: str, *, is_cut: bool = False) -> str:
    body = list(map(_escape_instruction, _squeeze(_wrap(lines))))
    if len(body) > BODY_LINES_MAX or is_cut:
        body = [*body[:BODY_LINES_MAX], "…"]
    paragraphs = [subject, "\n".join(body), f"{TRAILER}: {escape_text(task_id)}"]
    message = "\n\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"
    return _CI_INSTRUCTION.sub(_escape_ci_instruction, message)


def build_chain_message(tasks: Sequence[CommittedTask]) -> str:
    """Return a commit message for a chain of tasks, given in the order in which they ran.

    The subject is the name of the first task. The body has one line for each task: the first line of its final message,
    or its name if it has no final message.
    """
    lines = [f"- {_title(task.final_message) or _plain(escape_text(task.name))}" for task in tasks]
    title, subject = _subject(_name_title(tasks[0]) or "Apply the changes of a chain of tasks")
    return _compose(subject, lines if subject == title else [title, "", *lines], tasks[-1].id)


def _title(message: str) -> str:
    lines = [escape_text(line.rstrip()) for line in message[:BODY_CHARACTERS_MAX].splitlines()]
    first = _find_title(lines)
    return "" if first is None else textwrap.shorten(_plain(lines[first]), CHAIN_TASK_CHARACTERS_MAX, placeholder=" …")


def _find_title(lines: Sequence[str]) -> int | None:
    """Return the index of the first line that is neither empty nor a heading."""
    return next((at for at, line in enumerate(lines) if line.strip() and not _HEADING.match(line)), None)


def _escape_instruction(line: str) -> str:
    if "-" in line:
        line = _SCISSORS.sub(r"\1\2 ", line)
    return f" {line}" if _INSTRUCTION_START.match(line) else line


def _escape_ci_instruction(match: re.Match[str]) -> str:
    text = match[1] or match[2]
    is_link = match.string.startswith("(", match.end()) and not _CI_WORD.search(text)
    return match[0] if is_link else f"({text})"


def _plain(line: str) -> str:
    """Convert a line to a subject: without Markdown, and with single spaces."""
    text = " ".join(_MARKERS.sub("", line.strip(), count=1).split())
    return text.replace("**", "").replace("`", "").strip() or text


def _shorten(title: str) -> str:
    """Cut a title at the end of a sentence, of a clause or of a word, without an ellipsis."""
    title = title.removesuffix("…").rstrip() or title
    if len(title) <= SUBJECT_CHARACTERS_MAX:
        return title
    start = title[: SUBJECT_CHARACTERS_MAX + 1]
    for pattern in (_SENTENCE_END, _CLAUSE_END):
        ends = [match.end() for match in pattern.finditer(start) if match.end() >= CLAUSE_CHARACTERS_MIN]
        if ends:
            return start[: ends[-1]].rstrip()
    words = _DANGLING_WORDS.sub("", start.rpartition(" ")[0].rstrip(" ,;:"))
    return words or title[:SUBJECT_CHARACTERS_MAX]


def _wrap(lines: Iterable[str]) -> Iterator[str]:
    """Wrap prose; keep code."""
    is_code = False
    for line in lines:
        is_fence = line.lstrip().startswith(_FENCES)
        is_code = is_code != is_fence
        if is_code or is_fence or len(line) <= BODY_CELLS_MAX:
            yield line
            continue
        item = _LIST_ITEM.match(line)
        indent = " " * (len(item[0]) if item else len(line) - len(line.lstrip()))
        yield from textwrap.wrap(
            line, BODY_CELLS_MAX, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )


def _squeeze(lines: Iterable[str]) -> Iterator[str]:
    """Drop leading, trailing and repeated empty lines."""
    is_gap, has_text = False, False
    for line in lines:
        if not line.strip():
            is_gap = has_text
            continue
        if is_gap:
            yield ""
        yield line
        is_gap, has_text = False, True
