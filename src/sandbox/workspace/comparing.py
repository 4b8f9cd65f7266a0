"""A comparison with git beside it, which judges the ignore rules and may take the changes."""

from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

from sandbox.contracts.layout import AttemptLayout
from sandbox.workspace.base_tree import BaseTree
from sandbox.workspace.comparison import Changes, Comparison
from sandbox.workspace.files import Files
from sandbox.workspace.git import Git
from sandbox.workspace.ignore_rules import IgnoreRules, lay_out_ignore_files
from sandbox.workspace.pipes import pipe, run_with_thread
from sandbox.workspace.stoppable import Stop

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
    rules_directory = attempt.ignore_rules
    try:
        await lay_out_ignore_files(git, attempt.repository, base.ignore_files, rules_directory)
    except BaseException:
        for waiting in beside:
            waiting.close()
        raise
    with pipe() as (asked, asking), pipe() as (answers, answering):

        def work(stop: Stop) -> tuple[C, NotCarried]:
            with Files(attempt.workspace) as files, asking, IgnoreRules(rules_directory, asking, answers) as rules:
                changes = begin(files, stop)
                comparison = Comparison(files, base, rules, changes, stop)
                comparison.run()
                end(changes)
                return changes, comparison.left_out

        judging = git.run(
            *(f"--git-dir=../{attempt.repository.name}", "--work-tree=."),
            *("check-ignore", "--no-index", "--stdin", "-z", "--verbose", "--non-matching"),
            directory=rules_directory,
            stdin=asked,
            stdout=answering,
            good_codes=(0, 1),
        )
        changes, left_out = await run_with_thread(work, *beside, judging)
    return changes, dict(sorted(left_out.items()))
