"""Limits of overrides. Their syntax is tested in tests/unit/cli/test_submission_overrides.py."""

import pytest

from sandbox.model.fixed_limits import MANIFEST_DEPTH_MAX
from sandbox.model.manifest.overrides import OverrideError, parse_override


@pytest.mark.parametrize("path", [".".join("a" * (MANIFEST_DEPTH_MAX + 1)), "a" + "[0]" * 100_000])
def test_path_that_is_too_deep_is_rejected(path):
    with pytest.raises(OverrideError, match="more than 64 steps") as raised:
        parse_override(f"{path}=1")
    assert len(str(raised.value)) < 300


def test_path_of_the_maximum_depth_is_accepted():
    assert len(parse_override(".".join("a" * MANIFEST_DEPTH_MAX) + "=1").path) == MANIFEST_DEPTH_MAX


def test_error_message_contains_the_override():
    with pytest.raises(OverrideError, match=r"--set a\[1\]=2: the next index"):
        parse_override("a[1]=2", "--set a[1]=2").apply({})
