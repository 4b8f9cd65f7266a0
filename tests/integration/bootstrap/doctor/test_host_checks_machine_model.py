"""`sandbox doctor` validates the model's base URL."""

import pytest

from sandbox.bootstrap.doctor.host_checks import run_checks
from sandbox.bootstrap.settings.schema import ServerSection, ServerSettings

pytestmark = pytest.mark.usefixtures("without_runtime_checks")


@pytest.mark.parametrize(
    ("base_url", "is_ok", "message"),
    [
        ("https://x:99999", False, "ANTHROPIC_BASE_URL has an invalid host or port."),
        ("http://127.0.0.1:8131", True, "requests go to http://127.0.0.1:8131"),
    ],
)
def test_model_finding_validates_the_base_url(monkeypatch, tmp_path, base_url, is_ok, message):
    monkeypatch.setenv("ANTHROPIC_BASE_URL", base_url)
    monkeypatch.setenv("ANTHROPIC_API_KEY", "k")
    settings = ServerSettings(server=ServerSection(data_dir=tmp_path / "data"))
    (finding,) = [one for one in run_checks(settings) if one.name == "model"]
    assert (finding.ok, finding.message) == (is_ok, message)
    assert finding.blocks_tasks
