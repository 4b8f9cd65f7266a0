"""What the tests of the doctor share."""

import pytest

from sandbox.bootstrap.doctor import examination


@pytest.fixture
def without_sandboxes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No runtime is tried: where KVM is there and does not work, finding that out takes ten seconds."""
    monkeypatch.setattr(examination, "check_runtimes", lambda *_: [])
