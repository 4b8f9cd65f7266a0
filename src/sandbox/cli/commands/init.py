"""The `sandbox init` command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from sandbox.cli.checkout.task_source import find_clone_source
from sandbox.cli.checkout.user_checkout import Checkout
from sandbox.cli.click_extensions import command, help_examples
from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.output.console import escape_text, terminal_width, wrap_text
from sandbox.cli.submission import ManifestFile, fail_with_field_errors, field_error_details, parse_overrides
from sandbox.model.manifest.field_formats import (
    ALLOWED_HOST,
    ARTIFACT_PATTERN,
    BRANCH,
    DURATION,
    NO_CONTROL_CHARACTERS,
    PROMPT,
    REPOSITORY_URL,
    Format,
)
from sandbox.model.manifest.overrides import Override, OverrideError
from sandbox.model.task_names_and_ids import name_from_prompt

PROMPT_PLACEHOLDER = "Describe the work here, and how to verify it."
NETWORK_MODES = ("isolated", "outbound", "full")

_HEADER = """\
# A task for Sandbox. Check it with:  sandbox task validate {name}
# Submit it and watch:                sandbox task submit {name} --follow
# All fields and their defaults:      docs/manifest.md
"""


@command(
    epilog=help_examples(
        "sandbox init",
        "sandbox init --yes --set vm.network_mode=full fix.yaml",
        note="Next: sandbox task submit task.yaml --follow",
    )
)
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path, allow_dash=True), default="task.yaml")
@click.option("--yes", "-y", is_flag=True, help="Do not prompt; use the values of the checkout and the defaults.")
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
@click.option(
    "--set",
    "overrides",
    metavar="PATH=VALUE",
    multiple=True,
    callback=parse_overrides,
    help="Set a field, such as vm.network_mode=full; may be repeated. The command does not prompt for these fields.",
)
def init(file: Path, yes: bool, force: bool, overrides: list[Override]) -> None:
    """Create a manifest for the current git checkout.

    FILE defaults to task.yaml; '-' means stdout.
    """
    from sandbox.agents import registered_agents
    from sandbox.model.manifest.yaml import write_yaml

    if str(file) != "-":
        _require_writable(file, force=force)
    if not yes and not (sys.stdin.isatty() and sys.stderr.isatty()):
        fail(
            "Error: This command prompts for input and needs a terminal.\n  Use the defaults: add --yes",
            ExitCode.USAGE,
        )
    preset = {".".join(map(str, override.path)) for override in overrides}
    agent_kind = next(iter(registered_agents()))
    data = _manifest_from_checkout(preset, agent_kind, is_interactive=not yes)
    _apply_overrides(data, overrides)
    _name_after_prompt(data, preset, agent_kind)
    if not yes:
        _prompt_fields(data, preset, agent_kind)
    text = _HEADER.format(name="FILE" if str(file) == "-" else file.name) + write_yaml(data)
    _require_valid(text)
    if str(file) == "-":
        click.echo(text, nl=False)
        return
    with file.open("w" if force else "x") as opened:
        opened.write(text)
    escaped_name = escape_text(str(file))
    click.echo(f"Wrote {escaped_name}.", err=True)
    if PROMPT_PLACEHOLDER in text:
        click.echo(f"  First describe the work in it: {agent_kind}.prompt", err=True)
    click.echo(f"  Submit it and watch: sandbox task submit {escaped_name} --follow", err=True)


def _require_writable(file: Path, *, force: bool) -> None:
    if file.is_symlink():  # an applied patch or a cloned repository may contain it
        message = f"Error: {escape_text(str(file))} is a symbolic link.\n  Remove the link, or give another FILE"
        fail(message, ExitCode.CONFLICT)
    if file.exists() and not force:
        message = f"Error: {escape_text(str(file))} already exists.\n  Overwrite it: add --force, or give another FILE"
        fail(message, ExitCode.CONFLICT)


def _manifest_from_checkout(preset: set[str], agent_kind: str, *, is_interactive: bool) -> dict[str, Any]:
    """Build the manifest from the checkout, without the fields that only the user can set."""
    repository: dict[str, Any] = {}
    checkout = Checkout.find(Path())
    name = (checkout.root if checkout else Path.cwd()).name
    missing = [path for path in ("repository.url", "repository.branch") if path not in preset]
    if missing and checkout and checkout.git_output("remote"):
        source = find_clone_source(checkout, None)
        repository = {"url": source.url, "branch": source.branch}
    elif missing and not is_interactive:
        _fail_unknown_repository(checkout, missing)
    return {
        "version": "1",
        "kind": "Task",
        "metadata": {"name": f"A task for {name}"},
        "repository": repository,
        agent_kind: {} if is_interactive else {"prompt": PROMPT_PLACEHOLDER},
        "vm": {"network_mode": "isolated"},
        "lifecycle": {"timeout": "1h"},
    }


def _fail_unknown_repository(checkout: Checkout | None, missing: list[str]) -> NoReturn:
    reason = f"{checkout.root} has no remote" if checkout else f"{Path.cwd()} is not in a git checkout"
    options = " ".join(f"--set {path}={path.rpartition('.')[2].upper()}" for path in missing)
    message = f"Error: {escape_text(reason)}, so the repository of the task is unknown."
    fail(f"{message}\n  Set it: add {options}", ExitCode.USAGE)


def _apply_overrides(data: dict[str, Any], overrides: list[Override]) -> None:
    try:
        for override in overrides:
            override.apply(data)
    except OverrideError as error:
        raise click.BadParameter(str(error)) from None


def _name_after_prompt(data: dict[str, Any], preset: set[str], agent_kind: str) -> None:
    """Set the task's name to the first line of the prompt, unless the user set the name or there is no prompt."""
    match data:
        case {"metadata": dict(metadata), **sections} if not preset & {"metadata", "metadata.name"}:
            section = sections.get(agent_kind)
            prompt = section.get("prompt") if isinstance(section, dict) else None
            if isinstance(prompt, str) and prompt != PROMPT_PLACEHOLDER and (name := name_from_prompt(prompt)):
                metadata["name"] = name


def _prompt_fields(data: dict[str, Any], preset: set[str], agent_kind: str) -> None:
    """Prompt for the fields that were not set; repeat a prompt after an invalid answer."""

    def prompt(path: str, question: str, check: Callable[[str], Any], default: str | None = None) -> None:
        section, field = path.split(".")
        if path not in preset and isinstance(data[section], dict):
            default = default or data[section].pop(field, None)
            value = click.prompt(question, default=default, value_proc=check, err=True)
            data[section] |= {field: value} if value else {}

    prompt("repository.url", "Repository", _validator(REPOSITORY_URL))
    prompt("repository.branch", "Branch", _validator(BRANCH))
    prompt(f"{agent_kind}.prompt", "Prompt", _validator(PROMPT))
    _name_after_prompt(data, preset, agent_kind)
    prompt("metadata.name", "Name", _validator(NO_CONTROL_CHARACTERS))
    prompt("vm.network_mode", f"Network access ({', '.join(NETWORK_MODES)})", _parse_network_mode)
    if isinstance(data["vm"], dict) and data["vm"].get("network_mode") == "outbound":
        prompt("vm.allowed_hosts", "Allowed hosts, separated by commas", _parse_hosts)
    prompt("lifecycle.timeout", "Timeout", _validator(DURATION))
    prompt(
        "lifecycle.artifact_patterns",
        "Files to collect in addition to the patch, separated by commas",
        _parse_patterns,
        "none",
    )


def _validator(text_format: Format) -> Callable[[str], str]:
    def check(value: str) -> str:
        error = text_format.find_error(value)
        if error is not None:
            width = terminal_width(sys.stderr)
            width_left = width - len("Error: ") if width else None
            raise click.UsageError("\n".join(wrap_text(f"It {error}.", width_left, "  ")))
        return value

    return check


def _parse_network_mode(value: str) -> str:
    if value not in NETWORK_MODES:
        raise click.UsageError(f"The network access must be one of {', '.join(NETWORK_MODES)}.")
    return value


def _parse_hosts(value: str) -> list[str]:
    return [_validator(ALLOWED_HOST)(host.strip()) for host in value.split(",")]


def _parse_patterns(value: str) -> list[str]:
    return (
        []
        if value.strip() == "none"
        else [_validator(ARTIFACT_PATTERN)(pattern.strip()) for pattern in value.split(",")]
    )


def _require_valid(text: str) -> None:
    from sandbox.model.errors import InvalidManifestError

    try:
        ManifestFile("manifest", text.encode()).parse()
    except InvalidManifestError as error:
        # Omit line numbers: they refer to text that has not been written to a file.
        field_errors = [
            {**field_error, "line": None, "column": None} for field_error in field_error_details(error.errors)
        ]
        fail_with_field_errors("manifest", error.message, field_errors)
