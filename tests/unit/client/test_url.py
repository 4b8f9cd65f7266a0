"""What is asked for stands in the address as one name, and is no other address."""

import pytest

from sandbox.client import InvalidParameterError, TaskNotFoundError
from sandbox.client.url import task_path


def test_a_name_is_one_part_of_the_address():
    assert task_path("fix-42", "artifacts", "out/a b.txt") == "/tasks/fix-42/artifacts/out%2Fa%20b.txt"


def test_names_of_dots_do_not_lead_up():
    assert task_path("..", "artifacts", ".") == "/tasks/%2E%2E/artifacts/%2E"


@pytest.mark.parametrize("task_id", ["fix-42/vm", "/", "fix-42/"])
def test_no_task_has_a_slash_in_its_id(task_id):
    with pytest.raises(TaskNotFoundError, match="no id has a slash"):
        task_path(task_id)


def test_an_id_that_was_left_out_is_no_address():
    with pytest.raises(InvalidParameterError, match="must not be empty"):
        task_path("", "logs")
