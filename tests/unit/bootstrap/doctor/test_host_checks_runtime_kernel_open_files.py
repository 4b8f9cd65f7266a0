"""`sandbox doctor` warns if one task can exhaust the machine's open-file limit."""

import resource

import pytest

from sandbox.bootstrap.doctor import host_checks
from sandbox.interfaces.runtime import RuntimeProbe
from sandbox.runtimes.programs.inherited_limits import HOST_PROGRAM_FILES_MAX

SYSTEMD_FILE_MAX, SMALL_FILE_MAX = 2**63 - 1, 800_000
BUBBLEWRAP = RuntimeProbe("bubblewrap", is_available=True, tier="namespaces", strength=10)
GVISOR = RuntimeProbe("gvisor", is_available=True, tier="gvisor", strength=20)


@pytest.fixture
def set_file_max(tmp_path, monkeypatch):
    """Return a function that sets the machine's open-file limit."""
    monkeypatch.setattr(host_checks, "_SYSCTL_ROOT", tmp_path)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 524_288))
    for name in ("fs", "vm"):
        (tmp_path / name).mkdir()
    (tmp_path / "vm" / "max_map_count").write_text("65530\n")
    return lambda files: (tmp_path / "fs" / "file-max").write_text(f"{files}\n")


def test_small_limit_is_reported_with_the_fix(set_file_max):
    set_file_max(SMALL_FILE_MAX)
    (finding,) = host_checks.check_open_files(BUBBLEWRAP)
    assert (finding.ok, finding.blocks_tasks) == (False, False)
    assert "one task on bubblewrap can open all 800000 files" in finding.message
    assert "sysctl -w fs.file-max=9223372036854775807" in finding.remedy


def test_mapped_files_are_counted_even_if_closed(set_file_max):
    set_file_max(512 * 16384 + 1)
    assert host_checks.check_open_files(BUBBLEWRAP)
    set_file_max(512 * (16384 + 65530) + 1)
    assert not host_checks.check_open_files(BUBBLEWRAP)


def test_gvisor_counts_as_one_process_in_the_open_file_check(set_file_max):
    set_file_max(SMALL_FILE_MAX)
    assert not host_checks.check_open_files(GVISOR)
    set_file_max(100_000)
    assert "gvisor" in host_checks.check_open_files(GVISOR)[0].message


def test_nothing_is_reported_without_a_limit_or_without_a_sandbox(set_file_max):
    set_file_max(SYSTEMD_FILE_MAX)
    assert not host_checks.check_open_files(BUBBLEWRAP)
    set_file_max(SMALL_FILE_MAX)
    assert not host_checks.check_open_files(
        RuntimeProbe("bubblewrap", is_available=False, tier="namespaces", strength=10, remedy="no")
    )


def test_unlimited_open_file_limit_of_the_server_does_not_apply_to_gvisor(set_file_max, monkeypatch):
    set_file_max(2 * HOST_PROGRAM_FILES_MAX)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, resource.RLIM_INFINITY))
    assert not host_checks.check_open_files(GVISOR)
    set_file_max(HOST_PROGRAM_FILES_MAX)
    assert host_checks.check_open_files(GVISOR)
