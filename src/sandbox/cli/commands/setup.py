"""The `sandbox setup` command."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING

import click

from sandbox.cli.click_extensions import command, confirm, help_examples
from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.output.console import escape_text

if TYPE_CHECKING:
    from sandbox.bootstrap.package_installation import SetupPlan


@command(epilog=help_examples("sandbox setup", "sandbox setup --print", note="Next: sandbox doctor, and sandbox demo"))
@click.option("--yes", "-y", is_flag=True, help="Do not prompt.")
@click.option("--print", "prints_only", is_flag=True, help="Only print the commands that install system packages.")
def setup(yes: bool, prints_only: bool) -> None:
    """Install missing software on this machine.

    Installs system packages (bubblewrap, git, curl, e2fsprogs and, if available, gVisor) and the pinned npm packages
    for sandboxes. The command prompts before it installs system packages. Without a terminal and without --yes, the
    command prints the commands that install the system packages, but does not run them. The agent is installed together
    with the Python package of Sandbox.

    Exit code: 0 if all required software is installed, or if --print printed the commands; otherwise 1.
    """
    from sandbox.bootstrap import package_installation

    plan = package_installation.plan_for_this_machine()
    if prints_only:
        _print_commands(plan)
        return
    _install_packages(plan, is_confirmed=yes)
    if not package_installation.are_npm_packages_installed():
        click.echo("Installing the npm packages for sandboxes.", err=True)
        try:
            package_installation.install_npm_packages()
        except (package_installation.SetupError, OSError) as error:
            click.echo(f"{escape_text(str(error))} npx in sandboxes needs a registry.", err=True)
    click.echo("Done. Check this machine: sandbox doctor\nRun an example task: sandbox demo", err=True)


def _print_commands(plan: SetupPlan) -> None:
    for arguments in (*plan.commands, *plan.optional):
        click.echo(shlex.join(arguments))
    if plan.packages and not plan.commands:
        fail(_unknown_distribution(plan), ExitCode.TASK_FAILED)
    if not plan.packages:
        click.echo("All required system packages are installed.", err=True)


def _install_packages(plan: SetupPlan, *, is_confirmed: bool) -> None:
    from sandbox.bootstrap.package_installation import run_command

    commands = (*plan.commands, *plan.optional)
    if plan.packages and not plan.commands:
        fail(_unknown_distribution(plan), ExitCode.TASK_FAILED)
    if commands and not is_confirmed and not _is_accepted(plan, commands):
        if plan.packages:
            fail("No system package was installed. Run the commands above, then: sandbox setup", ExitCode.TASK_FAILED)
        return
    for arguments in plan.commands:
        if not run_command(arguments):
            message = f"Error: This command failed:\n  {escape_text(shlex.join(arguments))}"
            fail(f"{message}\nSee its output above. Only root can install system packages.", ExitCode.TASK_FAILED)
    if not all(run_command(command) for command in plan.optional):
        click.echo("gVisor (package runsc) is not available here, so the runtime is bubblewrap.", err=True)


def _is_accepted(plan: SetupPlan, commands: tuple[tuple[str, ...], ...]) -> bool:
    """Print the commands; return whether the user wants to run them. Without a terminal, return False."""
    names = [*plan.packages, *(["runsc (optional, for gVisor)"] if plan.optional else [])]
    click.echo(f"Missing system packages: {', '.join(names)}", err=True)
    for arguments in commands:
        click.echo(f"  {shlex.join(arguments)}")
    return sys.stdin.isatty() and sys.stdout.isatty() and confirm("Run these commands?", default=False)


def _unknown_distribution(plan: SetupPlan) -> str:
    packages = " ".join(plan.packages)
    return f"Error: Missing system packages: {packages}\n  Install them with the package manager of this system."
