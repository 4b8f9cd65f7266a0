"""A runner's CPU budget: what was spent is waited for, and what has priority waits less."""

import pytest

from sandbox.model.limits import RUNNER_CPU_BURST_SECONDS, RUNNER_CPU_CORES, RUNNER_CPU_DEBT_SECONDS_MAX
from sandbox.system.cpu_throttle import CpuBudget

BURST, CORES = RUNNER_CPU_BURST_SECONDS, RUNNER_CPU_CORES


def test_a_burst_is_spent_without_waiting():
    budget = CpuBudget(100.0, 7.0)
    budget.update(100.0, 7.0 + BURST)
    assert budget.wait_seconds() == 0


def test_what_is_spent_beyond_the_burst_is_waited_for_at_the_rate():
    budget = CpuBudget(100.0, 7.0)
    budget.update(100.0, 7.0 + BURST + 0.1)
    assert budget.wait_seconds() == pytest.approx(0.1 / CORES)
    budget.update(100.0 + 0.1 / CORES, 7.0 + BURST + 0.1)
    assert budget.wait_seconds() == pytest.approx(0, abs=1e-9)


def test_work_with_priority_goes_on_while_the_rest_waits():
    budget = CpuBudget(0.0, 0.0)
    budget.update(0.0, BURST + 1.0)
    assert budget.wait_seconds() == pytest.approx(1.0 / CORES)
    assert budget.wait_seconds(1.0) == 0
    assert budget.wait_seconds(0.5) == pytest.approx(0.5 / CORES)


def test_work_at_the_rate_never_waits():
    budget, cpu_seconds = CpuBudget(0.0, 0.0), 0.0
    for second in range(1, 10_000):
        cpu_seconds += CORES
        budget.update(float(second), cpu_seconds)
        assert budget.wait_seconds() == 0


def test_who_always_works_when_it_may_has_no_more_than_rate_and_burst():
    budget, now, cpu_seconds = CpuBudget(0.0, 0.0), 0.0, 0.0
    while now < 600:
        if budget.wait_seconds() == 0:
            cpu_seconds += 0.003
        now += 0.003
        budget.update(now, cpu_seconds)
    assert cpu_seconds == pytest.approx(600 * CORES + BURST, rel=0.01)
    assert cpu_seconds / 600 < 0.21


def test_idle_time_saves_up_one_burst_and_no_more():
    budget = CpuBudget(0.0, 0.0)
    budget.update(10_000.0, 0.0)
    budget.update(10_000.0, BURST + 0.5)
    assert budget.wait_seconds() == pytest.approx(0.5 / CORES)


def test_what_a_runner_spends_on_its_own_work_keeps_its_sandbox_waiting_for_a_bounded_time():
    budget = CpuBudget(0.0, 0.0)
    budget.update(100.0, 500.0)
    assert budget.wait_seconds() == pytest.approx(RUNNER_CPU_DEBT_SECONDS_MAX / CORES)
