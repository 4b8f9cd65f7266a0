"""The `sandbox doctor` command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from sandbox.cli.click_extensions import command, help_examples
from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.options import current_options, output_options
from sandbox.cli.output.console import activity_line, escape_text, print_json, print_message, stdout_console, wrap_text
from sandbox.cli.output.formatting import pluralize
from sandbox.cli.settings_options import load_configuration, settings_options

if TYPE_CHECKING:
    from sandbox.bootstrap.doctor import Finding

_GAP_NAMES = frozenset({"gap", "kernel"})
"""Names of findings that describe known limits if they belong to a runtime."""


@command(epilog=help_examples("sandbox doctor", "sandbox doctor --worker-server 192.0.2.10"))
@click.option("--all", "shows_all", is_flag=True, help="On a terminal, also list the known limits of all runtimes.")
@click.option(
    "--worker-server",
    metavar="HOST[:PORT]",
    help="Check whether this machine can be a host of a Slurm cluster, with workers that connect to the server at "
    "this address.",
)
@settings_options
@output_options("text", "json")
def doctor(shows_all: bool, worker_server: str | None, **server_options: Any) -> None:
    """Check this machine and suggest fixes.

    On a terminal, problems are printed last, and only the number of known limits is printed, unless --all is given.

    Exit code: 0 if tasks can run on this machine, otherwise 1.
    """
    settings = load_configuration(server_options).settings
    from sandbox.bootstrap.doctor.host_checks import run_checks

    options = current_options()
    with activity_line("Checking this machine…"):
        findings = run_checks(settings, worker_server)
    can_run = all(finding.ok or not finding.blocks_tasks for finding in findings)
    if options.format == "json":
        print_json({"can_run_tasks": can_run, "findings": [_to_json(finding) for finding in findings]})
    else:
        _print_findings(findings, shows_all=shows_all, has_color=options.has_color)
    actions = list(
        dict.fromkeys(finding.short_remedy for finding in findings if finding.short_remedy and not finding.ok)
    )
    to_do = f" To do: {', '.join(actions)}." if actions else ""
    if not can_run:
        fail(f"No task can run here yet. Fix the items marked with ✗ and run this again.{to_do}", ExitCode.TASK_FAILED)
    has_other_problems = any(not finding.ok and not finding.runtime for finding in findings)
    hint = "; see the items marked with !" if has_other_problems and not actions else ""
    runtime = _selected_runtime(findings)
    print_message(f"Tasks can run {f'with {runtime}' if runtime else 'here'}{hint}.{to_do}")


def _selected_runtime(findings: Sequence[Finding]) -> str:
    """Return the runtime that a server would use; empty if it is unknown."""
    return next((finding.runtime for finding in findings if finding.name == "sandbox"), "")


def _to_json(finding: Finding) -> dict[str, Any]:
    return {
        "name": finding.name,
        "ok": finding.ok,
        "message": finding.message,
        "remedy": finding.remedy,
        "is_needed": finding.blocks_tasks,
    }


def _print_findings(findings: Sequence[Finding], *, shows_all: bool, has_color: bool) -> None:
    from rich.text import Text

    console = stdout_console(has_color=has_color)
    if console.is_terminal:
        if not shows_all:
            findings = _summarize_gaps(findings)
        # Print problems last, because the first lines of a long list scroll out of the window.
        findings = sorted(findings, key=lambda finding: (not finding.ok, not finding.ok and finding.blocks_tasks))
    width = max((len(finding.name) for finding in findings), default=0)
    width_left = console.width - width - 5 if console.is_terminal else None
    previous_name = None
    for finding in findings:
        name = escape_text(finding.name) if finding.name != previous_name else ""
        previous_name = finding.name
        mark = _mark(finding)
        first, *others = wrap_text(finding.message, width_left)
        console.print(Text.assemble(mark, " ", (f"{name:<{width}}", "bold"), "  ", first), soft_wrap=True)
        remedy = wrap_text(f"→ {finding.remedy}", width_left) if finding.remedy else []
        for line in (*others, *remedy):
            console.print(Text(" " * (width + 4) + line), soft_wrap=True)


def _mark(finding: Finding) -> tuple[str, str]:
    """Return the symbol of a finding and its style: `·` marks properties of a runtime, which need no fix."""
    if finding.ok:
        return "✓", "green"
    if finding.blocks_tasks:
        return "✗", "bold red"
    return ("·", "dim") if finding.runtime else ("!", "yellow")


def _summarize_gaps(findings: Sequence[Finding]) -> list[Finding]:
    """Replace the known limits of the selected runtime with their number, and drop those of other runtimes."""
    selected = _selected_runtime(findings)
    gaps = [finding for finding in findings if finding.runtime == selected and _is_gap(finding)]
    others = [finding for finding in findings if not _is_gap(finding)]
    if not selected or not gaps:
        return others
    counted = f"{pluralize(len(gaps), 'known limit')} of {selected} on this kernel"
    message = f"{counted}; show {'it' if len(gaps) == 1 else 'them'} with --all"
    return [replace(gaps[0], message=message, remedy=""), *others]


def _is_gap(finding: Finding) -> bool:
    return finding.name in _GAP_NAMES and bool(finding.runtime)
