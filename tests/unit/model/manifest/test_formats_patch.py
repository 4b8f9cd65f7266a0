"""`repository.patch` is base64 within bounds, or a mistake."""

import base64

import pytest

from sandbox.model.manifest.formats import GIT_PATCH, GIT_PATCH_BYTES_MAX, RangeMessage


def encoded(size):
    return base64.b64encode(b"x" * size).decode()


def test_a_patch_up_to_its_bound_is_taken():
    assert GIT_PATCH.find_error(encoded(1)) is None
    assert GIT_PATCH.find_error(encoded(GIT_PATCH_BYTES_MAX)) is None


def test_a_larger_one_is_out_of_range():
    complaint = GIT_PATCH.find_error(encoded(GIT_PATCH_BYTES_MAX + 1))
    assert (isinstance(complaint, RangeMessage), complaint) == (True, "must be at most 512 KiB before base64")


@pytest.mark.parametrize("text", ["diff --git a/x b/x\n", "e", "ZGlm\nZg==", "äöü=", "ZGlm*g=="])
def test_what_is_not_base64_is_a_mistake(text):
    assert GIT_PATCH.find_error(text) == "must be base64 of what git diff --binary writes"


@pytest.mark.parametrize("text", ["", "ICAK"])
def test_an_empty_one_is_to_be_left_out(text):
    assert "leave it out" in GIT_PATCH.find_error(text)
