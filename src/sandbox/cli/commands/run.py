"""The `sandbox run` command."""

from __future__ import annotations

import base64
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from sandbox.cli.checkout.apply_after_run import ApplyPrompt
from sandbox.cli.checkout.task_source import CloneSource, create_local_patch, find_clone_source
from sandbox.cli.checkout.user_checkout import Checkout
from sandbox.cli.click_extensions import command, help_examples
from sandbox.cli.errors import ExitCode, fail, hint_if_interrupted
from sandbox.cli.options import allow_secrets_option, common_options, current_options
from sandbox.cli.output.console import escape_text, terminal_width, wrap_text
from sandbox.cli.output.formatting import pluralize
from sandbox.cli.submission import (
    ManifestFile,
    id_override,
    parse_overrides,
    print_submitted,
    read_prompt,
    submit_manifest,
    wait_for_end,
)
from sandbox.model.manifest.overrides import Override
from sandbox.model.task_names_and_ids import name_from_prompt

_EXIT_CODES = """\
Exit code: 0 if the task completed (possibly without changes), 1 if it failed, 8 if it was cancelled; 4 if local changes
are not pushed, the id is in use, the patch does not apply or contains nothing that git can apply, or a different commit
is now checked out; 5 if a secret was found in the patch; 9 if the manifest is invalid."""


@command(
    epilog=help_examples(
        'sandbox run "Fix the failing tests."',
        'sandbox run "Update the changelog." --apply',
        "sandbox run - --set vm.network_mode=full <prompt.md",
        note=_EXIT_CODES,
    )
)
@click.argument("prompt")
@click.option(
    "--apply/--no-apply",
    "applies",
    default=None,
    help="Whether to apply the patch to this checkout [default: prompt on a terminal].",
)
@click.option(
    "--include-dirty/--leave-dirty",
    "includes_dirty",
    default=None,
    help="Start with your uncommitted and unpushed changes and new files, or without them.",
)
@click.option(
    "--remote",
    metavar="NAME",
    help="The remote to clone from [default: the remote of the branch's upstream, then origin].",
)
@click.option("--id", "task_id", metavar="ID", help="The task's id [default: generated].")
@click.option(
    "--set",
    "overrides",
    metavar="PATH=VALUE",
    multiple=True,
    callback=parse_overrides,
    help="Set a field of the manifest, such as vm.network_mode=full; may be repeated.",
)
@click.option(
    "--directory",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=".",
    help="A directory of the checkout [default: the current directory].",
)
@allow_secrets_option
@common_options
def run(
    prompt: str,
    applies: bool | None,
    includes_dirty: bool | None,
    allows_secrets: bool,
    directory: Path,
    **run_options: Any,
) -> None:
    """Run a task from this checkout and apply the task's changes.

    PROMPT describes the work; '-' reads it from stdin. The task clones the remote of this checkout at the last commit
    that you pushed. The agent starts in the current directory, or in the directory that you set with --directory.
    """
    from sandbox.agents import registered_agents
    from sandbox.model.manifest.parsed_document import write_json

    options, checkout = current_options(), Checkout(directory)
    text = read_prompt(prompt)
    source = find_clone_source(checkout, run_options["remote"])
    if includes_dirty is None:
        _require_pushed(checkout, source)
    overrides: list[Override] = run_options["overrides"]
    if run_options["task_id"] is not None:
        overrides.append(id_override(run_options["task_id"]))
    repository = _build_repository(source, overrides)
    if includes_dirty and "commit" not in repository:
        base = f"your changes are based on {source.branch} at {source.url}"
        raise click.UsageError(f"--include-dirty cannot be combined with another repository or branch: {base}.")
    _print_clone_source(repository, source, checkout, includes_dirty=bool(includes_dirty))
    starts_with_local_changes = bool(includes_dirty) and bool(
        checkout.count_changed() or checkout.count_changed(untracked=True)
    )
    apply_prompt = ApplyPrompt(checkout, options, applies, allows_secrets, starts_with_local_changes, checkout.head())
    patch = create_local_patch(checkout, source.commit) if includes_dirty else b""
    manifest = ManifestFile(
        "sandbox run",
        write_json(_build_manifest(text, repository, checkout.subpath(), patch, next(iter(registered_agents())))),
    )
    with options.connect() as client:
        submitted = submit_manifest(client, manifest, overrides)
        task_id = submitted["task_id"]
        if options.format != "json":
            print_submitted(submitted, options.server, is_watched=True)
        with hint_if_interrupted(task_id, apply_prompt.apply_command(task_id)):
            status = wait_for_end(client, task_id, options, should_follow=True, omits_denied_connections=True)
        apply_prompt.run(client, status)


def _require_pushed(checkout: Checkout, source: CloneSource) -> None:
    changed = checkout.count_changed()
    missing = [f"{pluralize(changed, 'file')} with uncommitted changes"] if changed else []
    verb = "is" if source.unpushed == 1 else "are"
    missing += [f"{pluralize(source.unpushed, 'commit')} that {verb} not on {source.remote}"] if source.unpushed else []
    if missing:
        message = f"Error: The task would start without local changes: {' and '.join(missing)}."
        advice = "  Include them:       add --include-dirty\n  Start without them: add --leave-dirty"
        fail(f"{escape_text(message)}\n{advice}", ExitCode.CONFLICT)


def _build_repository(source: CloneSource, overrides: Sequence[Override]) -> dict[str, Any]:
    """Return what the task clones: the source, with the URL, the branch and the commit that `--set` changes.

    The source's commit is left out for another URL or branch, which may not contain it: without a commit, a task starts
    at the latest commit of its branch.
    """
    start = {"url": source.url, "branch": source.branch}
    repository: dict[str, Any] = {}
    for override in overrides:
        match override.path:
            case ("repository", "url" | "branch" | "commit" as field):
                repository[field] = override.value
    is_source = all(repository.get(field, value) == value for field, value in start.items())
    return {**start, **({"commit": source.commit} if is_source else {}), **repository}


def _build_manifest(
    prompt: str, repository: Mapping[str, Any], subpath: str, patch: bytes, agent_kind: str
) -> dict[str, Any]:
    repository = {**repository, **({"patch": base64.b64encode(patch).decode()} if patch else {})}
    return {
        "version": "1",
        "kind": "Task",
        "metadata": {"name": name_from_prompt(prompt) or "Task"},
        "repository": {**repository, **({"subpath": subpath} if subpath else {})},
        agent_kind: {"prompt": prompt},
    }


def _print_clone_source(
    repository: Mapping[str, Any], source: CloneSource, checkout: Checkout, *, includes_dirty: bool
) -> None:
    url, branch, commit = repository["url"], repository["branch"], repository.get("commit")
    start = f"{branch} at {str(commit)[:12]}" if commit else f"the latest commit of {branch}"
    lines = [escape_text(f"From {url}, {start}.")]
    if source.has_credentials:
        lines.append(f"The credentials in the URL of {source.remote} are not sent; the server clones with its own.")
    untracked = 0 if includes_dirty else checkout.count_changed(untracked=True)
    if untracked:
        lines.append(f"{pluralize(untracked, 'untracked file')} {'is' if untracked == 1 else 'are'} not included.")
    for line in lines:
        click.echo("\n".join(wrap_text(line, terminal_width(sys.stderr), "  ")), err=True)
