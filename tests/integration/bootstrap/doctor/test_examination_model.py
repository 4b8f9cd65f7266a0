"""`sandbox doctor` says that no task can ask a model at an address that is none."""

import pytest

from sandbox.bootstrap.doctor.examination import run_checks
from sandbox.bootstrap.settings.schema import ServerSection, ServerSettings

pytestmark = pytest.mark.usefixtures("without_sandboxes")


@pytest.mark.parametrize(
    ("base_url", "is_fine", "told"),
    [
        ("https://x:99999", False, "ANTHROPIC_BASE_URL has a host or a port that cannot be."),
        ("http://127.0.0.1:8131", True, "requests go to http://127.0.0.1:8131"),
    ],
)
def test_an_address_is_looked_at(monkeypatch, tmp_path, base_url, is_fine, told):
    monkeypatch.setenv("ANTHROPIC_BASE_URL", base_url)
    monkeypatch.setenv("ANTHROPIC_API_KEY", "k")
    settings = ServerSettings(server=ServerSection(data_dir=tmp_path / "data"))
    (finding,) = [one for one in run_checks(settings) if one.name == "model"]
    assert (finding.ok, finding.message) == (is_fine, told)
    assert finding.is_needed
