"""The times at which a sandbox is sampled."""

from sandbox.model.fixed_limits import METRICS_INTERVAL_SECONDS_MAX
from sandbox.runner.steps.run import metrics_interval_seconds


def sample_times(seconds: float) -> list[float]:
    times = [0.0]
    while (at := times[-1] + metrics_interval_seconds(times[-1])) <= seconds:
        times.append(at)
    return times


def test_short_tasks_have_enough_samples_for_a_chart():
    assert len(sample_times(2)) == 5
    assert len(sample_times(10)) >= 10


def test_long_tasks_are_sampled_at_the_maximum_interval():
    times = sample_times(3600)
    assert times[-1] - times[-2] == METRICS_INTERVAL_SECONDS_MAX
    assert len(times) < 3600 / METRICS_INTERVAL_SECONDS_MAX + 15
