"""`sandbox doctor` says what is missing for repositories by ssh, and which data directory cannot be one."""

import pytest

from sandbox.bootstrap.doctor.examination import run_checks
from sandbox.bootstrap.settings.schema import ServerSection, ServerSettings

pytestmark = pytest.mark.usefixtures("without_sandboxes")


def found(name, data_dir):
    settings = ServerSettings(server=ServerSection(data_dir=data_dir))
    (finding,) = [one for one in run_checks(settings) if one.name == name]
    return finding


def test_what_is_missing_for_repositories_by_ssh(monkeypatch, tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    missing = found("ssh", tmp_path / "data")
    assert (missing.ok, missing.is_needed, missing.mend) == (False, False, "apt-get install openssh-client")
    (programs / "ssh").touch(mode=0o755)
    there = found("ssh", tmp_path / "data")
    assert (there.ok, there.message) == (True, str(programs / "ssh"))


def test_a_data_directory_below_a_file_cannot_be_one(tmp_path):
    (tmp_path / "somebodys.txt").touch()
    finding = found("data directory", tmp_path / "somebodys.txt" / "data")
    assert (finding.ok, finding.is_needed) == (False, True)
    assert f"{tmp_path / 'somebodys.txt'} is no directory that this user may write to" in finding.message
