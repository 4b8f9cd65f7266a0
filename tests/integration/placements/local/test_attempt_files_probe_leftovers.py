"""Only the leftovers of dead probes are removed."""

import asyncio

import pytest

from doubles.fake_leftovers import FakeLeftoverSource
from sandbox.disks.commands import remove_trees
from sandbox.interfaces.task_file_layout import AttemptLayout, probe_directory
from sandbox.placements.local.attempt_files import ProbeCleanup, probe_lock


def test_leftovers_of_a_dead_probe_are_removed_and_those_of_a_live_probe_are_kept(tmp_path):
    leftovers, directory = FakeLeftoverSource(), probe_directory(tmp_path, "aaaaaaaaaaaa")
    AttemptLayout(directory).disk.mkdir(parents=True)
    leftovers.attempts = {"aaaaaaaaaaaa", "bbbbbbbbbbbb"}
    probes = ProbeCleanup(tmp_path, [leftovers], remove_trees)
    with probe_lock(tmp_path), probe_lock(tmp_path):
        asyncio.run(probes.sweep())
        assert directory.exists()
    asyncio.run(probes.sweep())
    assert (directory.exists(), leftovers.attempts) == (False, {"bbbbbbbbbbbb"})
    asyncio.run(ProbeCleanup(tmp_path / "none", [leftovers], remove_trees).sweep())


def test_failing_removal_of_one_probe_does_not_block_others(tmp_path):
    leftovers, probe_ids = FakeLeftoverSource(), [letter * 12 for letter in "abc"]
    for probe_id in probe_ids:
        AttemptLayout(probe_directory(tmp_path, probe_id)).disk.mkdir(parents=True)
    leftovers.attempts, leftovers.stuck = set(probe_ids), {probe_ids[0], probe_ids[1]}
    probes = ProbeCleanup(tmp_path, [leftovers], remove_trees)
    with pytest.raises(OSError, match=r"a{12}: It does not end") as raised:
        asyncio.run(probes.sweep())
    assert f"{probe_ids[1]}: It does not end" in str(raised.value)
    assert leftovers.attempts == leftovers.stuck
    assert [probe_directory(tmp_path, probe_id).exists() for probe_id in probe_ids] == [True, True, False]
    leftovers.stuck = set()
    asyncio.run(probes.sweep())
    assert leftovers.attempts == set()
