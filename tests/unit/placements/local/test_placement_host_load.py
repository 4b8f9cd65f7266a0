"""The load of this machine."""

from sandbox.bootstrap.local_host import measure_host_load, read_memory_available_bytes


def test_load_of_this_machine_is_plausible():
    first, second = measure_host_load(), measure_host_load()
    assert 0 < first.cpu_busy_ticks < first.cpu_total_ticks
    assert second.cpu_total_ticks >= first.cpu_total_ticks
    assert 0 < first.memory_available_bytes < first.memory_total_bytes


def test_available_memory_of_this_machine_is_plausible():
    assert 2**20 < read_memory_available_bytes() < 2**50
