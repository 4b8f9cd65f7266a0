"""The CPU budget of a runner for the work that its sandbox causes: a token bucket of CPU seconds."""

from sandbox.model.limits import RUNNER_CPU_BURST_SECONDS, RUNNER_CPU_CORES, RUNNER_CPU_DEBT_SECONDS_MAX


class CpuBudget:
    """Refills over time, and is drained by all CPU time of the process. Starts full.

    Work of a higher priority may continue while the bucket is in debt; all other work waits until the debt is paid.
    """

    def __init__(self, monotonic: float, cpu_seconds: float) -> None:
        self._level_seconds = RUNNER_CPU_BURST_SECONDS
        self._monotonic = monotonic
        self._cpu_seconds = cpu_seconds

    def update(self, monotonic: float, cpu_seconds: float) -> None:
        """Account for the time and the CPU seconds of the process since the last update."""
        gained = (monotonic - self._monotonic) * RUNNER_CPU_CORES
        level = min(self._level_seconds + gained, RUNNER_CPU_BURST_SECONDS) - (cpu_seconds - self._cpu_seconds)
        self._level_seconds = max(level, -RUNNER_CPU_DEBT_SECONDS_MAX)
        self._monotonic, self._cpu_seconds = monotonic, cpu_seconds

    def wait_seconds(self, debt_seconds: float = 0.0) -> float:
        """Seconds until work that is allowed this much debt may continue; 0 if it may now."""
        return max(0.0, -debt_seconds - self._level_seconds) / RUNNER_CPU_CORES
