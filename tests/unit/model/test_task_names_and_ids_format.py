"""Recognition of generated ids."""

import pytest

from sandbox.model.task_names_and_ids import is_generated_id, is_generated_id_prefix


@pytest.mark.parametrize(
    ("text", "is_prefix", "is_complete"),
    [
        ("2", True, False),
        ("21d64869", True, False),
        ("21d64869-6bb9-4f0e-8f0e-0123456789a", True, False),
        ("21d64869-6bb9-4f0e-8f0e-0123456789ab", False, True),
        ("21d64869-6bb9-4f0e-8f0e-0123456789abc", False, False),
        ("21d648696", False, False),
        ("21D64869", False, False),
        ("fix-tests", False, False),
        ("", False, False),
    ],
)
def test_beginning_of_a_generated_id_is_recognized(text, is_prefix, is_complete):
    assert (is_generated_id_prefix(text), is_generated_id(text)) == (is_prefix, is_complete)
