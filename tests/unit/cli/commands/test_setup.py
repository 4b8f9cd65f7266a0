"""`sandbox setup` prints or runs the commands of the plan."""

import pytest
from click.testing import CliRunner

from sandbox.bootstrap import package_installation
from sandbox.bootstrap.package_installation import SetupError, SetupPlan
from sandbox.cli.main import root

INSTALL, GVISOR = ("apt-get", "install", "-y", "bubblewrap"), ("apt-get", "install", "-y", "runsc")
PACKAGES_MISSING = SetupPlan(("bubblewrap",), (("apt-get", "update"), INSTALL), (GVISOR,))
NOTHING_MISSING = SetupPlan((), ())


class Machine:
    """Records the commands that are run. failing: the commands that fail."""

    def __init__(self):
        self.plan, self.failing, self.commands = PACKAGES_MISSING, set(), []
        self.has_npm_packages, self.npm_error = False, None

    def run_command(self, command):
        self.commands.append(command)
        return command not in self.failing

    def install_npm_packages(self):
        if self.npm_error:
            raise self.npm_error
        self.has_npm_packages = True


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(package_installation, "plan_for_this_machine", lambda: machine.plan)
    monkeypatch.setattr(package_installation, "run_command", machine.run_command)
    monkeypatch.setattr(package_installation, "are_npm_packages_installed", lambda: machine.has_npm_packages)
    monkeypatch.setattr(package_installation, "install_npm_packages", machine.install_npm_packages)
    return machine


def invoke(*options):
    return CliRunner().invoke(root, ["setup", *options])


def test_print_option_prints_the_commands_and_installs_nothing(machine):
    result = invoke("--print")
    assert (result.exit_code, machine.commands, machine.has_npm_packages) == (0, [], False)
    assert result.stdout.splitlines() == ["apt-get update", "apt-get install -y bubblewrap", "apt-get install -y runsc"]


def test_commands_are_printed_but_not_run_without_a_terminal(machine):
    result = invoke()
    assert (result.exit_code, machine.commands, machine.has_npm_packages) == (1, [], False)
    assert "  apt-get install -y bubblewrap\n" in result.stdout
    assert "No system package was installed." in result.stderr


def test_yes_option_installs_packages_and_npm_packages(machine):
    result = invoke("--yes")
    assert result.exit_code == 0, result.output
    assert machine.commands == [*PACKAGES_MISSING.commands, GVISOR]
    assert machine.has_npm_packages


def test_failure_of_a_required_command_ends_the_setup(machine):
    machine.failing = {INSTALL}
    result = invoke("--yes")
    assert (result.exit_code, machine.commands) == (1, list(PACKAGES_MISSING.commands))
    assert "apt-get install -y bubblewrap" in result.stderr


def test_missing_optional_parts_do_not_fail_the_setup(machine):
    machine.failing, machine.npm_error = {GVISOR}, SetupError("The npm packages could not be fetched: offline")
    result = invoke("--yes")
    assert result.exit_code == 0
    assert "the runtime is bubblewrap" in result.stderr
    assert "could not be fetched: offline" in result.stderr


def test_complete_machine_needs_no_commands(machine):
    machine.plan, machine.has_npm_packages = NOTHING_MISSING, True
    result = invoke()
    assert (result.exit_code, result.stdout, machine.commands) == (0, "", [])


@pytest.mark.parametrize("options", [(), ("--yes",), ("--print",)])
def test_packages_are_listed_on_an_unknown_distribution(machine, options):
    machine.plan = SetupPlan(("bubblewrap",), ())
    result = invoke(*options)
    assert (result.exit_code, machine.commands) == (1, [])
    assert "Missing system packages: bubblewrap" in result.stderr
