"""A comparison with git beside it, which judges the ignore rules, if there are any, and may take the changes."""

from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from sandbox.contracts.layout import AttemptLayout
from sandbox.workspace.base_tree import BaseTree
from sandbox.workspace.comparison import Changes, Comparison, Rules
from sandbox.workspace.files import Files
from sandbox.workspace.git import Git
from sandbox.workspace.ignore_rules import IgnoreRules, NoRules, lay_out_ignore_files
from sandbox.workspace.pipes import pipe, run_with_thread
from sandbox.workspace.stoppable import Stop

T = TypeVar("T")
C = TypeVar("C", bound=Changes)
NotCarried = Mapping[bytes, str]
"""Paths, and why no patch can carry what is there."""


async def compare(
    git: Git,
    attempt: AttemptLayout,
    base: BaseTree,
    begin: Callable[[Files, Stop], C],
    end: Callable[[C], None],
    *beside: Coroutine[Any, Any, bytes],
) -> tuple[C, NotCarried]:
    """Walk the workspace in a thread and tell every change to what `begin` gives; `beside` runs meanwhile.

    The directory of the ignore rules must be there, empty. Gives what took the changes, and what
    no patch can carry, sorted. Raises GitError, OSError, TooManyEntriesError.
    """
    try:
        await lay_out_ignore_files(git, attempt.repository, base.ignore_files, attempt.ignore_rules)
    except BaseException:
        for waiting in beside:
            waiting.close()
        raise

    def walk(stop: Stop, rules: Rules) -> tuple[C, NotCarried]:
        with Files(attempt.workspace) as files:
            changes = begin(files, stop)
            comparison = Comparison(files, base, rules, changes, stop)
            comparison.run()
            end(changes)
            return changes, dict(sorted(comparison.left_out.items()))

    if not base.ignore_files:
        return await run_with_thread(lambda stop: walk(stop, NoRules()), *beside)
    return await _walk_judged(walk, git, attempt, beside)


async def _walk_judged(
    walk: Callable[[Stop, Rules], T], git: Git, attempt: AttemptLayout, beside: Sequence[Coroutine[Any, Any, bytes]]
) -> T:
    """With a git that is asked about what the base commit ignores."""
    with pipe() as (asked, asking), pipe() as (answers, answering):

        def work(stop: Stop) -> T:
            with asking, IgnoreRules(attempt.ignore_rules, asking, answers) as rules:
                return walk(stop, rules)

        judging = git.run(
            *(f"--git-dir=../{attempt.repository.name}", "--work-tree=."),
            *("check-ignore", "--no-index", "--stdin", "-z", "--verbose", "--non-matching"),
            directory=attempt.ignore_rules,
            stdin=asked,
            stdout=answering,
            good_codes=(0, 1),
        )
        return await run_with_thread(work, *beside, judging)
