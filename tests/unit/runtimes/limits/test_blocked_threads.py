"""A sandbox's threads are interrupted when the machine's open objects have grown far above their lowest count."""

import itertools
from collections.abc import Collection
from pathlib import Path

import pytest

from sandbox.runtimes.limits.blocked_threads import BlockedThreadInterrupter, count_machine_files


@pytest.mark.parametrize(("text", "count"), [("1216\t0\t9223372036854775807\n", 1216), ("", None), ("x\n", None)])
def test_machine_files_are_read_from_file_nr(tmp_path: Path, text: str, count: int | None):
    (tmp_path / "file-nr").write_text(text)
    assert count_machine_files(tmp_path / "file-nr") == count


def test_machine_files_are_unknown_without_the_file(tmp_path: Path):
    assert count_machine_files(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("counts", "interruptions"),
    [
        ([50, 150], 0),
        ([50, 151], 1),
        ([150, 50, 150, 151], 1),  # growth is counted from the lowest count
        ([50, 151, 151, 251], 1),  # objects left after an interruption are not the sandbox's
        ([50, 151, 252], 2),
        ([None, 500, 600], 0),
        ([50, None, 151], 1),
    ],
)
def test_threads_are_interrupted_after_growth(counts: list[int | None], interruptions: int):
    machine, interrupted = {"objects": counts[0]}, list[Collection[int]]()
    interrupter = BlockedThreadInterrupter(
        lambda: machine["objects"], 100, interrupted.append, itertools.count().__next__
    )
    for machine["objects"] in counts[1:]:
        interrupter.interrupt_if_grown([7])
    assert interrupted == [[7]] * interruptions


def test_growth_is_counted_from_the_objects_left_after_an_interruption():
    machine = {"objects": 0}
    interrupter = BlockedThreadInterrupter(
        lambda: machine["objects"], 100, lambda _: machine.update(objects=10), itertools.count().__next__
    )
    for objects in (101, 110, 111):
        machine["objects"] = objects
        interrupter.interrupt_if_grown([])
        assert machine["objects"] == (110 if objects == 110 else 10)


def test_objects_are_counted_twice_a_second():
    times = [0.0]
    counts: list[float] = []
    interrupter = BlockedThreadInterrupter(
        lambda: counts.append(times[-1]) or 1, 100, lambda _: None, lambda: times[-1]
    )
    for seconds in (0.1, 0.4, 0.5, 0.6, 1.1):
        times.append(seconds)
        interrupter.interrupt_if_grown([])
    assert counts == [0.0, 0.5, 1.1]
