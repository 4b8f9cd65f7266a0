"""`sandbox doctor` reports which limits the disks of tasks enforce."""

import pytest

from sandbox.bootstrap.doctor import host_checks
from sandbox.bootstrap.settings.schema import ServerSection, ServerSettings


@pytest.fixture
def check_disks(monkeypatch, tmp_path):
    """Return a function that runs the check with these properties of the host."""

    def run(reason, *, can_share_preallocations):
        async def find_reason(_):
            return reason

        monkeypatch.setattr(host_checks, "loop_unavailable_reason", find_reason)
        monkeypatch.setattr(host_checks, "can_share_preallocations", lambda: can_share_preallocations)
        monkeypatch.setattr(host_checks, "choose_run_dir", lambda _: tmp_path)
        findings = host_checks._check_disks(ServerSettings(server=ServerSection(data_dir=tmp_path)))
        return [(finding.name, finding.ok, finding.blocks_tasks) for finding in findings]

    return run


def test_read_only_file_system_settings_are_reported(check_disks):
    assert check_disks(None, can_share_preallocations=False) == [("disks", True, True), ("limits", False, False)]


def test_nothing_is_reported_if_disks_enforce_every_limit(check_disks):
    assert check_disks(None, can_share_preallocations=True) == [("disks", True, True)]


def test_only_the_missing_loop_devices_are_reported(check_disks):
    assert check_disks("only root can mount", can_share_preallocations=False) == [("disks", False, False)]
