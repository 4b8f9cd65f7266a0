"""What the suites over every runtime share."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sandbox.contracts.runtime import Probe, Runtime
from sandbox.runtimes.bubblewrap import BubblewrapRuntime
from sandbox.runtimes.gvisor import GvisorRuntime
from sandbox.runtimes.qemu import QemuRuntime

RUNTIMES: dict[str, Callable[[Path], Runtime]] = {
    "bubblewrap": BubblewrapRuntime,
    "gvisor": GvisorRuntime,
    "qemu": QemuRuntime,
}
_found: dict[str, Probe] = {}

_IN_A_GUEST = {
    "test_output_and_exit_code_come_back",
    "test_environment_is_what_was_given_and_nothing_of_the_host",
    "test_megabytes_of_output_come_through",
    "test_workspace_home_and_tmp_are_writable_and_survive_on_the_disk",
    "test_a_signal_reaches_the_command_and_not_its_children",
    "test_kill_ends_what_hides_from_it",
    "test_another_process_can_destroy_a_living_sandbox",
    "test_everything_inside_dies_within_a_second_when_its_creator_is_killed",
    "test_memory_over_the_limit_is_told_as_such",
    "test_processes_over_the_limit_cannot_be_made",
    "test_figures_tell_what_it_uses",
    "test_the_image_is_read_only_and_the_places_of_work_are_not",
    "test_a_hard_link_cannot_be_made_to_the_image_and_can_within_the_workspace",
    "test_the_commands_output_cannot_be_opened_by_another_process_and_can_be_inherited",
    "test_a_program_that_is_laid_in_unreadable_hides_its_memory_from_its_children",
    "test_privileged_calls_are_refused",
    "test_no_privilege_is_held_or_can_be_gained",
    "test_there_is_no_route_out_and_the_gateways_addresses_arrive_as_they_are",
    "test_what_is_typed_is_shown_and_answered",
    "test_it_begins_with_its_size_and_follows_changes",
    "test_it_is_confined_as_the_command_is",
    "test_a_process_holds_thousands_of_files_open_and_not_any_number",
}
"""What is asked of qemu too. Without KVM a guest boots for seconds; SANDBOX_TESTS_QEMU=whole asks it everything."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes too long in a guest."""
    if os.environ.get("SANDBOX_TESTS_QEMU") == "whole":
        return
    left_out = [item for item in items if _is_in_a_guest(item) and item.originalname not in _IN_A_GUEST]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _is_in_a_guest(item: pytest.Item) -> bool:
    if Path(__file__).parent not in item.path.parents:
        return False
    return isinstance(item, pytest.Function) and item.name.partition("[")[2].startswith("qemu")


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest, tmp_path: Path) -> Runtime:
    """Each runtime in turn; skipped where it does not work."""
    runtime = RUNTIMES[request.param](tmp_path / "run")
    if request.param not in _found:
        _found[request.param] = asyncio.run(runtime.probe())
    if not _found[request.param].works:
        pytest.skip(f"{request.param} does not work here: {_found[request.param].mend}")
    return runtime


@pytest.fixture
def limits(runtime: Runtime) -> frozenset[str]:
    """The limits that hold here."""
    return _found[runtime.name].limits


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A private directory: nobody but its owner can walk to it."""
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    disk = private / "disk"
    disk.mkdir()
    return disk
