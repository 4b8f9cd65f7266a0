"""`sandbox doctor` says where one task can hold every file that the machine may have open."""

import resource

import pytest

from sandbox.bootstrap.doctor import findings
from sandbox.interfaces.runtime import RuntimeProbe

A_SYSTEMD_MACHINE, A_SMALL_ONE = 2**63 - 1, 800_000
NAMESPACES = RuntimeProbe("bubblewrap", is_available=True, tier="namespaces", strength=10)
GVISOR = RuntimeProbe("gvisor", is_available=True, tier="gvisor", strength=20)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Say how many files it may have open."""
    monkeypatch.setattr(findings, "_SYSCTL_ROOT", tmp_path)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 524_288))
    for name in ("fs", "vm"):
        (tmp_path / name).mkdir()
    (tmp_path / "vm" / "max_map_count").write_text("65530\n")
    return lambda files: (tmp_path / "fs" / "file-max").write_text(f"{files}\n")


def test_a_small_table_is_told_with_the_command_that_mends_it(machine):
    machine(A_SMALL_ONE)
    (finding,) = findings.check_open_files(NAMESPACES)
    assert (finding.ok, finding.is_needed) == (False, False)
    assert "one task on bubblewrap can hold all 800000 files" in finding.message
    assert "sysctl -w fs.file-max=9223372036854775807" in finding.mend


def test_files_that_are_mapped_and_closed_count_too(machine):
    machine(512 * 16384 + 1)
    assert findings.check_open_files(NAMESPACES)
    machine(512 * (16384 + 65530) + 1)
    assert not findings.check_open_files(NAMESPACES)


def test_a_kernel_of_its_own_holds_as_many_as_one_process_of_the_host_may(machine):
    machine(A_SMALL_ONE)
    assert not findings.check_open_files(GVISOR)
    machine(100_000)
    assert "gvisor" in findings.check_open_files(GVISOR)[0].message


def test_nothing_is_told_where_there_is_no_bound_or_no_sandbox(machine):
    machine(A_SYSTEMD_MACHINE)
    assert not findings.check_open_files(NAMESPACES)
    machine(A_SMALL_ONE)
    assert not findings.check_open_files(
        RuntimeProbe("bubblewrap", is_available=False, tier="namespaces", strength=10, remedy="no")
    )
