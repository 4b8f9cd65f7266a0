"""`repository.patch` must be base64 data of limited size."""

import base64

import pytest

from sandbox.model.manifest.field_formats import GIT_PATCH, GIT_PATCH_BYTES_MAX, RangeMessage


def encoded(size):
    return base64.b64encode(b"x" * size).decode()


def test_patch_up_to_the_limit_is_accepted():
    assert GIT_PATCH.find_error(encoded(1)) is None
    assert GIT_PATCH.find_error(encoded(GIT_PATCH_BYTES_MAX)) is None


def test_patch_over_the_limit_is_out_of_range():
    error = GIT_PATCH.find_error(encoded(GIT_PATCH_BYTES_MAX + 1))
    assert (isinstance(error, RangeMessage), error) == (True, "must be at most 512 KiB before base64")


@pytest.mark.parametrize("text", ["diff --git a/x b/x\n", "e", "ZGlm\nZg==", "äöü=", "ZGlm*g=="])
def test_patch_that_is_not_base64_is_an_error(text):
    assert GIT_PATCH.find_error(text) == "must be the base64-encoded output of git diff --binary"


@pytest.mark.parametrize("text", ["", "ICAK"])
def test_empty_patch_is_an_error(text):
    assert "omit it" in GIT_PATCH.find_error(text)
