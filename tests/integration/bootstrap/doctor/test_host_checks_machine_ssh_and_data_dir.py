"""`sandbox doctor` reports a missing ssh client and an unusable data directory."""

import pytest

from sandbox.bootstrap.doctor.host_checks import run_checks
from sandbox.bootstrap.settings.schema import ServerSection, ServerSettings

pytestmark = pytest.mark.usefixtures("without_runtime_checks")


def find_finding(name, data_dir):
    settings = ServerSettings(server=ServerSection(data_dir=data_dir))
    (finding,) = [one for one in run_checks(settings) if one.name == name]
    return finding


def test_missing_ssh_client_is_reported(monkeypatch, tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    missing = find_finding("ssh", tmp_path / "data")
    assert (missing.ok, missing.blocks_tasks, missing.remedy) == (False, False, "apt-get install openssh-client")
    (programs / "ssh").touch(mode=0o755)
    installed = find_finding("ssh", tmp_path / "data")
    assert (installed.ok, installed.message) == (True, str(programs / "ssh"))


def test_data_directory_whose_parent_is_a_file_is_reported(tmp_path):
    (tmp_path / "foreign.txt").touch()
    finding = find_finding("data directory", tmp_path / "foreign.txt" / "data")
    assert (finding.ok, finding.blocks_tasks) == (False, True)
    assert f"{tmp_path / 'foreign.txt'} is not a directory that this user may write to" in finding.message
