"""What a sandbox ran out of is told once, and explains an end that the agent does not explain itself."""

import asyncio
from pathlib import Path

import pytest

from sandbox.interfaces.agent import AgentOutcome
from sandbox.interfaces.disks import DiskUsage
from sandbox.interfaces.layout import AttemptLayout
from sandbox.interfaces.runtime import FileUsage, KernelUsage, Stats
from sandbox.model.errors import Failure, FailureCode
from sandbox.model.manifest.schema import Vm
from sandbox.runner.resource_exhaustion import ExhaustionDetector

DIED = Failure(FailureCode.AGENT_FAILED, "Claude Code was ended by signal 9.")
SILENT = AgentOutcome(None, DIED)
"""An agent that died without a word."""
CALM = Stats(1.0, 1, 1)


class ToldDisks:
    """Disks as full as they are told to be."""

    enforces_size = True

    def __init__(self):
        self.is_full, self.is_lost = False, False

    async def usage(self, files):
        if self.is_lost:
            raise OSError("gone")
        return DiskUsage(100 if self.is_full else 50, 100, self.is_full)


class Scene:
    def __init__(self):
        self.disks, self.told = ToldDisks(), []
        files = AttemptLayout(Path("/nowhere"))
        self.shortages = ExhaustionDetector(Vm(disk="1G", memory="2G"), self.disks, files, self.told.append)

    def look(self):
        asyncio.run(self.shortages.check_disk())

    @property
    def codes(self):
        return [event.error for event in self.told]


@pytest.fixture
def scene():
    return Scene()


def test_a_sandbox_with_room_for_everything_is_told_nothing_of(scene):
    scene.shortages.update(CALM)
    scene.look()
    assert scene.told == []
    assert scene.shortages.disk_use == DiskUsage(50, 100, False)
    assert scene.shortages.explain_failure(SILENT) is DIED
    assert scene.shortages.explain_failure(AgentOutcome(None, None)) is None


def test_a_full_disk_is_told_once_and_explains_the_agents_death(scene):
    scene.disks.is_full = True
    scene.look()
    scene.look()
    assert scene.codes == ["disk_full"]
    why = scene.shortages.explain_failure(SILENT)
    assert why.code == "disk_full"
    assert "vm.disk is 1G" in why.message
    assert DIED.message in why.message


@pytest.mark.parametrize("code", [FailureCode.TIMEOUT, FailureCode.OUT_OF_MEMORY, FailureCode.BUDGET_EXCEEDED])
def test_what_has_a_reason_of_its_own_keeps_it(scene, code):
    scene.disks.is_full = True
    scene.look()
    assert scene.shortages.explain_failure(AgentOutcome(None, Failure(code, "known"))).code == code
    assert scene.shortages.explain_failure(AgentOutcome(None, None)) is None


def test_processes_that_could_not_be_born_are_told(scene):
    scene.shortages.update(Stats(1.0, 1, 512, fork_failures=9))
    scene.shortages.update(Stats(1.0, 1, 512, fork_failures=10))
    assert scene.codes == ["process_limit"]
    assert scene.shortages.explain_failure(SILENT).code == "process_limit"


def explained(scene, said, result):
    return scene.shortages.explain_failure(AgentOutcome(result, Failure(FailureCode.AGENT_FAILED, said))).code


@pytest.mark.parametrize(
    "said", ["Claude Code did not finish within its turns; raise claude.max_turns.", "API Error: 401"]
)
def test_an_end_that_the_agent_explains_is_not_put_down_to_what_passed_long_before(scene, said):
    scene.disks.is_full = True
    scene.look()
    scene.shortages.update(Stats(1.0, 1, 512, fork_failures=9))
    assert scene.codes == ["disk_full", "process_limit"]
    assert explained(scene, said, {"is_error": True}) == "agent_failed"
    assert explained(scene, "Claude Code exited with code 1.", {"is_error": False}) == "disk_full"


def test_an_agent_that_names_the_shortage_itself_failed_for_it(scene):
    no_room, no_process = "ENOSPC: no space left on device, write", "spawn /bin/bash EAGAIN"
    assert explained(scene, no_room, {"is_error": True}) == "agent_failed"
    scene.disks.is_full = True
    scene.look()
    assert explained(scene, no_room, {"is_error": True}) == "disk_full"
    assert explained(scene, no_process, {"is_error": True}) == "agent_failed"
    scene.shortages.update(Stats(1.0, 1, 512, fork_failures=9))
    assert explained(scene, no_process, {"is_error": True}) == "process_limit"


def test_a_disk_that_was_full_once_and_has_room_again_explains_nothing(scene):
    scene.disks.is_full = True
    scene.look()
    scene.disks.is_full = False
    scene.look()
    assert scene.codes == ["disk_full"]
    assert scene.shortages.explain_failure(SILENT) is DIED


def test_a_process_that_died_for_memory_is_told_though_the_agent_lives_on(scene):
    scene.shortages.update(Stats(1.0, 1, 1, oom_kills=1))
    assert scene.codes == ["out_of_memory"]
    assert "vm.memory" in scene.told[0].message


def test_a_disk_that_cannot_be_looked_at_is_told_and_the_last_figures_stay(scene):
    scene.look()
    scene.disks.is_lost = True
    scene.look()
    assert scene.codes == ["internal_error"]
    assert scene.shortages.disk_use.used_bytes == 50


class CountedSockets:
    """A sandbox that has so many sockets at each look; the last figures stay."""

    def __init__(self, *uses, files=FileUsage()):  # noqa: B008
        self.uses = list(uses)
        self.files = files

    async def kernel_usage(self):
        return self.uses.pop(0) if len(self.uses) > 1 else self.uses[0]

    async def file_usage(self):
        return self.files


def excess(scene, monkeypatch, *uses):
    monkeypatch.setattr("sandbox.interfaces.kernel_watch.KERNEL_USAGE_CHECK_SECONDS", 0.001)

    async def story():
        async with asyncio.timeout(10):
            return await scene.shortages.watch_kernel_use(CountedSockets(*uses))

    return asyncio.run(story())


def test_more_sockets_than_a_sandbox_may_have_are_a_reason_to_end_it(scene, monkeypatch):
    why = excess(scene, monkeypatch, KernelUsage(10), KernelUsage(8192), KernelUsage(8193))
    assert (why.code, why.message.partition(";")[0]) == (
        "out_of_memory", "The sandbox had 8193 sockets, and the limit is 8192",
    )  # fmt: skip


def test_more_in_buffers_than_may_be_is_one_where_nothing_else_keeps_the_bound(scene, monkeypatch):
    at, over = KernelUsage(10, 64 << 20, 64 << 20), KernelUsage(10, 65 << 20, 64 << 20)
    why = excess(scene, monkeypatch, KernelUsage(10, 1 << 40, None), at, over)
    assert why.code == "out_of_memory"
    assert "held 65 MiB in their buffers, and the limit for its vm.memory is 64 MiB" in why.message


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (FileUsage(131_073), "had 131073 open files, and 131072 is the most"),
        (FileUsage(9000, directories=8193), "more than 8192 open directories"),
        (FileUsage(9000, locks=8193), "more than 8192 locks on files"),
    ],
)
def test_more_open_files_directories_or_locks_are_a_reason_to_end_it(scene, files, told):
    async def story():
        async with asyncio.timeout(10):
            return await scene.shortages.watch_kernel_use(CountedSockets(KernelUsage(), files=files))

    why = asyncio.run(story())
    assert why.code == "out_of_memory"
    assert told in why.message


def test_open_files_within_bounds_are_none(scene):
    for files in (FileUsage(), FileUsage(131_072, directories=8192, locks=8192)):
        assert files.find_violation() == ""


def test_sockets_within_bounds_and_those_that_nobody_counts_are_none(scene, monkeypatch):
    monkeypatch.setattr("sandbox.interfaces.kernel_watch.KERNEL_USAGE_CHECK_SECONDS", 0.001)

    async def story(use):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await scene.shortages.watch_kernel_use(CountedSockets(use))

    for use in (KernelUsage(), KernelUsage(8192, 64 << 20, 64 << 20), KernelUsage(None, 1 << 40, None)):
        asyncio.run(story(use))
