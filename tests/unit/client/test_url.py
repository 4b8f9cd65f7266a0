"""Names are encoded as one URL path segment."""

import pytest

from sandbox.client import InvalidParameterError, TaskNotFoundError
from sandbox.client.url import task_path


def test_name_is_encoded_as_one_segment():
    assert task_path("fix-42", "artifacts", "out/a b.txt") == "/tasks/fix-42/artifacts/out%2Fa%20b.txt"


def test_dot_segments_are_encoded():
    assert task_path("..", "artifacts", ".") == "/tasks/%2E%2E/artifacts/%2E"


@pytest.mark.parametrize("task_id", ["fix-42/vm", "/", "fix-42/"])
def test_task_id_with_slash_is_rejected(task_id):
    with pytest.raises(TaskNotFoundError, match="no id has a slash"):
        task_path(task_id)


def test_empty_task_id_is_rejected():
    with pytest.raises(InvalidParameterError, match="must not be empty"):
        task_path("", "logs")
