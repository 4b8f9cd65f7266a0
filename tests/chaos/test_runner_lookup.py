"""A runner that is closing files is still found by its lock. Otherwise, a round would not wait for the runner."""

import pytest

from doubles import runner_processes


@pytest.mark.parametrize(("target", "is_open"), [("lock", True), ("other", False)])
def test_closed_descriptors_do_not_hide_an_open_lock(tmp_path, target, is_open):
    """A descriptor that was closed after it was listed looks like a dangling link."""
    for name in ("lock", "other"):
        (tmp_path / name).touch()
    descriptors = tmp_path / "fd"
    descriptors.mkdir()
    for number in range(40):
        (descriptors / str(number)).symlink_to(tmp_path / "closed" if number != 20 else tmp_path / target)
    assert any(runner_processes._has_open(tmp_path, (tmp_path / "lock").stat())) is is_open
