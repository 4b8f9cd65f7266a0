"""The `sandbox doctor` command."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.lazy_group import command, help_examples
from sandbox.cli.options import current_options, output_options
from sandbox.cli.output.console import stdout_console
from sandbox.cli.output.json_output import print_json
from sandbox.cli.output.text import escape_text, wrap_text
from sandbox.cli.server_options import load_configuration, settings_options

if TYPE_CHECKING:
    from sandbox.bootstrap.doctor import Finding


@command(epilog=help_examples("sandbox doctor"))
@settings_options
@output_options("text", "json")
def doctor(**server_options: Any) -> None:
    """Check this machine and suggest fixes.

    On a terminal, problems come first.

    Exit code: 0 if tasks can run on this machine, otherwise 1.
    """
    settings = load_configuration(server_options).settings
    from sandbox.bootstrap.doctor.checks import run_checks

    findings, options = run_checks(settings), current_options()
    can_run = all(finding.ok or not finding.is_needed for finding in findings)
    if options.format == "json":
        print_json({"can_run_tasks": can_run, "findings": [_to_json(finding) for finding in findings]})
    else:
        _print_findings(findings, has_color=options.has_color)
    if not can_run:
        fail("No task can run here yet. Fix the items marked with ✗ and run this again.", ExitCode.TASK_FAILED)
    is_ok = all(finding.ok for finding in findings)
    click.echo(f"Tasks can run here{'' if is_ok else '; see the items marked with !'}.", err=True)


def _to_json(finding: Finding) -> dict[str, Any]:
    return {
        "name": finding.name,
        "ok": finding.ok,
        "message": finding.message,
        "mend": finding.remedy,
        "is_needed": finding.is_needed,
    }


def _print_findings(findings: Sequence[Finding], *, has_color: bool) -> None:
    from rich.text import Text

    console = stdout_console(has_color=has_color)
    if console.is_terminal:  # problems first
        findings = sorted(findings, key=lambda finding: (finding.ok, not finding.is_needed))
    width = max((len(finding.name) for finding in findings), default=0)
    width_left = console.width - width - 5 if console.is_terminal else None
    previous_name = None
    for finding in findings:
        name = escape_text(finding.name) if finding.name != previous_name else ""
        previous_name = finding.name
        mark = ("✓", "green") if finding.ok else ("✗", "bold red") if finding.is_needed else ("!", "yellow")
        first, *others = wrap_text(finding.message, width_left)
        console.print(Text.assemble(mark, " ", (f"{name:<{width}}", "bold"), "  ", first), soft_wrap=True)
        remedy = wrap_text(f"→ {finding.remedy}", width_left) if finding.remedy else []
        for line in (*others, *remedy):
            console.print(Text(" " * (width + 4) + line), soft_wrap=True)
