"""A runner's CPU budget: work waits until the CPU debt is repaid, and priority work waits less."""

import pytest

from sandbox.model.fixed_limits import RUNNER_CPU_BURST_SECONDS, RUNNER_CPU_CORES, RUNNER_CPU_DEBT_SECONDS_MAX
from sandbox.primitives.runner_cpu_throttle import CpuBudget

BURST, CORES = RUNNER_CPU_BURST_SECONDS, RUNNER_CPU_CORES


def test_work_within_the_burst_does_not_wait():
    budget = CpuBudget(100.0, 7.0)
    budget.update(100.0, 7.0 + BURST)
    assert budget.wait_seconds() == 0


def test_debt_beyond_the_burst_delays_work_at_the_rate():
    budget = CpuBudget(100.0, 7.0)
    budget.update(100.0, 7.0 + BURST + 0.1)
    assert budget.wait_seconds() == pytest.approx(0.1 / CORES)
    budget.update(100.0 + 0.1 / CORES, 7.0 + BURST + 0.1)
    assert budget.wait_seconds() == pytest.approx(0, abs=1e-9)


def test_priority_work_continues_while_other_work_waits():
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


def test_greedy_work_is_limited_to_rate_and_burst():
    budget, now, cpu_seconds = CpuBudget(0.0, 0.0), 0.0, 0.0
    while now < 600:
        if budget.wait_seconds() == 0:
            cpu_seconds += 0.003
        now += 0.003
        budget.update(now, cpu_seconds)
    assert cpu_seconds == pytest.approx(600 * CORES + BURST, rel=0.01)
    assert cpu_seconds / 600 < 0.21


def test_idle_time_accumulates_at_most_one_burst():
    budget = CpuBudget(0.0, 0.0)
    budget.update(10_000.0, 0.0)
    budget.update(10_000.0, BURST + 0.5)
    assert budget.wait_seconds() == pytest.approx(0.5 / CORES)


def test_debt_is_bounded():
    budget = CpuBudget(0.0, 0.0)
    budget.update(100.0, 500.0)
    assert budget.wait_seconds() == pytest.approx(RUNNER_CPU_DEBT_SECONDS_MAX / CORES)
