"""The client returns the bodies that the API declares, under its own names."""

from typing import is_typeddict

import pytest

import sandbox.client
from sandbox.client import responses
from sandbox.model.wire import bodies

NAMES = {
    "Artifact": "ArtifactBody",
    "ArtifactList": "ArtifactListBody",
    "Attempt": "AttemptBody",
    "Cancellation": "CancelledBody",
    "Checked": "DryRunBody",
    "Definition": "DefinitionBody",
    "Draining": "DrainBody",
    "ExistingTask": "ExistingTaskBody",
    "Failure": "FailureBody",
    "Health": "HealthBody",
    "Links": "LinksBody",
    "Mistake": "DetailBody",
    "Occupancy": "OccupancyBody",
    "Progress": "ProgressBody",
    "Pruned": "PrunedBody",
    "PrunedTask": "PrunedTaskBody",
    "Release": "ReleasedBody",
    "Runtime": "RuntimeBody",
    "Submitted": "SubmittedBody",
    "Task": "TaskBody",
    "TaskPage": "TaskListBody",
    "TaskSummary": "TaskItemBody",
    "Vm": "VmBody",
}


@pytest.mark.parametrize(("name", "body"), NAMES.items())
def test_names_of_the_client_stay(name, body):
    assert getattr(responses, name) is getattr(bodies, body)
    assert getattr(sandbox.client, name, getattr(bodies, body)) is getattr(bodies, body)


def test_all_types_are_listed_here():
    assert {name for name, kind in vars(responses).items() if is_typeddict(kind)} == set(NAMES)
