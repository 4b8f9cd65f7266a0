"""How much processor time a runner may spend on what its sandbox makes it do: a token bucket of CPU seconds."""

from sandbox.model.limits import RUNNER_CPU_BURST_SECONDS, RUNNER_CPU_CORES, RUNNER_CPU_DEBT_SECONDS_MAX


class CpuBudget:
    """Filled with time, emptied by whatever the process uses; it begins full.

    Work of a higher priority may go on while the bucket is in debt, and everything else waits until that is paid.
    """

    def __init__(self, monotonic: float, cpu_seconds: float) -> None:
        self._level_seconds = RUNNER_CPU_BURST_SECONDS
        self._monotonic = monotonic
        self._cpu_seconds = cpu_seconds

    def see(self, monotonic: float, cpu_seconds: float) -> None:
        """Take the clocks of a moment: the time, and the CPU seconds that the process has used by then."""
        gained = (monotonic - self._monotonic) * RUNNER_CPU_CORES
        level = min(self._level_seconds + gained, RUNNER_CPU_BURST_SECONDS) - (cpu_seconds - self._cpu_seconds)
        self._level_seconds = max(level, -RUNNER_CPU_DEBT_SECONDS_MAX)
        self._monotonic, self._cpu_seconds = monotonic, cpu_seconds

    def wait_seconds(self, debt_seconds: float = 0.0) -> float:
        """Until work may go on that is allowed so much debt; 0 where it may now."""
        return max(0.0, -debt_seconds - self._level_seconds) / RUNNER_CPU_CORES
