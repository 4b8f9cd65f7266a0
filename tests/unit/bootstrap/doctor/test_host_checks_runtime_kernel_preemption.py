"""`sandbox doctor` reports a kernel on which one system call from a sandbox can monopolize a CPU."""

import gzip

import pytest

from sandbox.bootstrap.doctor import host_checks
from sandbox.interfaces.runtime import RuntimeProbe

BUBBLEWRAP = RuntimeProbe("bubblewrap", is_available=True, tier="namespaces", strength=10)
GVISOR = RuntimeProbe("gvisor", is_available=True, tier="gvisor", strength=20)
BROKEN = RuntimeProbe("bubblewrap", is_available=False, tier="namespaces", strength=10, remedy="no")

WITHOUT_PREEMPTION = "CONFIG_PREEMPT_DYNAMIC=y\nCONFIG_PREEMPT_NONE=y\n# CONFIG_PREEMPT is not set\n"
WITH_PREEMPTION = "CONFIG_PREEMPT_DYNAMIC=y\n# CONFIG_PREEMPT_NONE is not set\nCONFIG_PREEMPT=y\n"
VOLUNTARY = "# CONFIG_PREEMPT_NONE is not set\nCONFIG_PREEMPT_VOLUNTARY=y\n"
LAZY = "# CONFIG_PREEMPT_NONE is not set\nCONFIG_PREEMPT_LAZY=y\n"


@pytest.fixture
def set_kernel(tmp_path, monkeypatch):
    """Return a function that sets the kernel's command line and configuration. None makes one unreadable."""
    command_line, config = tmp_path / "cmdline", tmp_path / "config.gz"
    monkeypatch.setattr(host_checks, "_KERNEL_COMMAND_LINE", command_line)
    monkeypatch.setattr(host_checks, "_KERNEL_CONFIG", config)
    monkeypatch.setattr(host_checks.os, "uname", lambda: type("Names", (), {"release": "0-absent"}))

    def set_files(parameters, text):
        command_line.write_text(f"root=/dev/vda {parameters}\n")
        config.unlink(missing_ok=True)
        if text is not None:
            config.write_bytes(gzip.compress(text.encode()))

    return set_files


@pytest.mark.parametrize(
    ("parameters", "config"),
    [("", WITHOUT_PREEMPTION), ("", VOLUNTARY), ("preempt=none", WITH_PREEMPTION), ("preempt=none quiet", None)],
)
def test_kernel_without_preemption_is_reported_with_the_remedy(set_kernel, parameters, config):
    set_kernel(parameters, config)
    (finding,) = host_checks.check_preemption(BUBBLEWRAP)
    assert (finding.ok, finding.blocks_tasks) == (False, False)
    assert "one system call of a task on bubblewrap can occupy a CPU" in finding.message
    assert "preempt=full" in finding.remedy


@pytest.mark.parametrize(
    ("parameters", "config"),
    [
        ("", WITH_PREEMPTION),
        ("", LAZY),
        ("preempt=full", WITHOUT_PREEMPTION),
        ("preempt=none preempt=full", WITHOUT_PREEMPTION),
        ("rcupreempt=none", None),
    ],
)
def test_kernel_with_preemption_or_an_unknown_mode_is_not_reported(set_kernel, parameters, config):
    set_kernel(parameters, config)
    assert not host_checks.check_preemption(BUBBLEWRAP)


def test_runtimes_with_a_separate_kernel_and_unavailable_runtimes_are_not_reported(set_kernel):
    set_kernel("", WITHOUT_PREEMPTION)
    assert not host_checks.check_preemption(GVISOR)
    assert not host_checks.check_preemption(BROKEN)
