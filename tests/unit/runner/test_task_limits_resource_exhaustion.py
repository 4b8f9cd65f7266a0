"""Resource exhaustion is reported once, and becomes the reason for an agent failure that has no other reason."""

import asyncio

import pytest

from sandbox.interfaces.agent import AgentOutcome
from sandbox.interfaces.disks import DiskUsage
from sandbox.interfaces.runtime import Stats
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.manifest.schema import Vm
from sandbox.runner.task_limits import ExhaustionDetector

KILLED = Failure(FailureCode.AGENT_FAILED, "Claude Code was killed by signal 9.")
OUTCOME_WITHOUT_RESULT = AgentOutcome(None, KILLED)
"""The outcome of an agent that died without output."""
NORMAL_STATS = Stats(1.0, 1, 1)


class ScriptedDisk:
    """A disk with scripted usage."""

    enforces_size = True

    def __init__(self):
        self.is_full, self.is_lost = False, False

    async def measure_and_trim(self):
        if self.is_lost:
            raise OSError("gone")
        return DiskUsage(100 if self.is_full else 50, 100, self.is_full)


class ExhaustionScenario:
    def __init__(self):
        self.disk, self.events = ScriptedDisk(), []
        self.detector = ExhaustionDetector(Vm(disk="1G", memory="2G"), self.disk, self.events.append)

    def check_disk(self):
        asyncio.run(self.detector.check_disk())

    @property
    def codes(self):
        return [event.error for event in self.events]


@pytest.fixture
def scenario():
    return ExhaustionScenario()


def test_nothing_is_reported_while_resources_are_sufficient(scenario):
    scenario.detector.check_stats(NORMAL_STATS)
    scenario.check_disk()
    assert scenario.events == []
    assert scenario.detector.disk_usage == DiskUsage(50, 100, False)
    assert scenario.detector.explain_failure(OUTCOME_WITHOUT_RESULT, "Claude Code") is KILLED
    assert scenario.detector.explain_failure(AgentOutcome(None, None), "Claude Code") is None


def test_full_disk_is_reported_once_and_explains_the_failure(scenario):
    scenario.disk.is_full = True
    scenario.check_disk()
    scenario.check_disk()
    assert scenario.codes == ["disk_full"]
    failure = scenario.detector.explain_failure(OUTCOME_WITHOUT_RESULT, "Claude Code")
    assert failure.code == "disk_full"
    assert "vm.disk is 1G" in failure.message
    assert KILLED.message in failure.message


@pytest.mark.parametrize("code", [FailureCode.TIMEOUT, FailureCode.OUT_OF_MEMORY, FailureCode.BUDGET_EXCEEDED])
def test_specific_failure_is_not_replaced(scenario, code):
    scenario.disk.is_full = True
    scenario.check_disk()
    assert scenario.detector.explain_failure(AgentOutcome(None, Failure(code, "known")), "Claude Code").code == code
    assert scenario.detector.explain_failure(AgentOutcome(None, None), "Claude Code") is None


def test_fork_failures_are_reported_once(scenario):
    scenario.detector.check_stats(Stats(1.0, 1, 512, fork_failures=9))
    scenario.detector.check_stats(Stats(1.0, 1, 512, fork_failures=10))
    assert scenario.codes == ["process_limit"]
    assert scenario.detector.explain_failure(OUTCOME_WITHOUT_RESULT, "Claude Code").code == "process_limit"


def explained_code(scenario, message, result):
    return scenario.detector.explain_failure(
        AgentOutcome(result, Failure(FailureCode.AGENT_FAILED, message)), "Claude Code"
    ).code


@pytest.mark.parametrize("message", ["Claude Code did not finish in time; raise claude.max_turns.", "API Error: 401"])
def test_agent_error_is_not_attributed_to_earlier_resource_exhaustion(scenario, message):
    scenario.disk.is_full = True
    scenario.check_disk()
    scenario.detector.check_stats(Stats(1.0, 1, 512, fork_failures=9))
    assert scenario.codes == ["disk_full", "process_limit"]
    assert explained_code(scenario, message, {"is_error": True}) == "agent_failed"
    assert explained_code(scenario, "Claude Code exited with code 1.", {"is_error": False}) == "disk_full"


def test_agent_error_that_names_an_exhausted_resource_is_attributed_to_it(scenario):
    disk_error, fork_error = "ENOSPC: no space left on device, write", "spawn /bin/bash EAGAIN"
    assert explained_code(scenario, disk_error, {"is_error": True}) == "agent_failed"
    scenario.disk.is_full = True
    scenario.check_disk()
    assert explained_code(scenario, disk_error, {"is_error": True}) == "disk_full"
    assert explained_code(scenario, fork_error, {"is_error": True}) == "agent_failed"
    scenario.detector.check_stats(Stats(1.0, 1, 512, fork_failures=9))
    assert explained_code(scenario, fork_error, {"is_error": True}) == "process_limit"


def test_disk_that_is_no_longer_full_does_not_explain_the_failure(scenario):
    scenario.disk.is_full = True
    scenario.check_disk()
    scenario.disk.is_full = False
    scenario.check_disk()
    assert scenario.codes == ["disk_full"]
    assert scenario.detector.explain_failure(OUTCOME_WITHOUT_RESULT, "Claude Code") is KILLED


def test_oom_kill_is_reported_while_the_agent_runs(scenario):
    scenario.detector.check_stats(Stats(1.0, 1, 1, oom_kills=1))
    assert scenario.codes == ["out_of_memory"]
    assert "vm.memory" in scenario.events[0].message


def test_unreadable_disk_is_reported_and_the_last_usage_is_kept(scenario):
    scenario.check_disk()
    scenario.disk.is_lost = True
    scenario.check_disk()
    assert scenario.codes == ["internal_error"]
    assert scenario.detector.disk_usage.used_bytes == 50
