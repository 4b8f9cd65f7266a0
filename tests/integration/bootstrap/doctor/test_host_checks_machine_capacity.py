"""`sandbox doctor` compares the default VM size with the machine's capacity."""

import pytest

from sandbox.bootstrap.doctor.host_checks import run_checks
from sandbox.bootstrap.settings.schema import OvercommitSection, ServerSection, ServerSettings

pytestmark = pytest.mark.usefixtures("without_runtime_checks")


@pytest.mark.parametrize(("factor", "is_ok"), [(1000.0, True), (0.1, False)])
def test_capacity_finding_compares_defaults_with_the_machine(tmp_path, monkeypatch, factor, is_ok):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    settings = ServerSettings(
        server=ServerSection(data_dir=tmp_path / "data"),
        capacity=OvercommitSection(cpus=factor, memory=1000, disk=1000),
    )
    (finding,) = [one for one in run_checks(settings) if one.name == "capacity"]
    assert finding.ok == is_ok
    assert ("1000 CPUs, " if is_ok else "requests 4 CPUs (0 in all)") in finding.message
    assert is_ok or "capacity settings" in finding.remedy
    assert not finding.blocks_tasks or is_ok
