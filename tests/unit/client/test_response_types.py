"""The client returns the bodies that the API declares, and exports their types under client-specific names."""

from typing import is_typeddict

import pytest

import sandbox.client
from sandbox.client import response_types
from sandbox.model.wire import event_bodies, server_and_error_bodies, task_bodies

NAMES = {
    "Artifact": "ArtifactBody",
    "ArtifactList": "ArtifactListBody",
    "Attempt": "AttemptBody",
    "Cancellation": "CancelledBody",
    "Checked": "DryRunBody",
    "ResolvedManifest": "ResolvedManifestBody",
    "Draining": "DrainBody",
    "Host": "HostBody",
    "HostList": "HostListBody",
    "ExistingTask": "ExistingTaskBody",
    "Failure": "FailureBody",
    "FieldError": "FieldErrorBody",
    "FileEdit": "FileEditBody",
    "Health": "HealthBody",
    "Links": "LinksBody",
    "Deletion": "DeletedBody",
    "Metrics": "MetricsBody",
    "Occupancy": "OccupancyBody",
    "Progress": "ProgressBody",
    "Pruned": "PrunedBody",
    "PrunedTask": "PrunedTaskBody",
    "UnexaminedTask": "UnexaminedTaskBody",
    "Release": "ReleasedBody",
    "Remedy": "RemedyBody",
    "Runtime": "RuntimeBody",
    "Submitted": "SubmittedBody",
    "Task": "TaskBody",
    "TaskPage": "TaskListBody",
    "TaskSummary": "TaskItemBody",
    "Vm": "TaskVmBody",
}


@pytest.mark.parametrize(("name", "body"), NAMES.items())
def test_public_type_name_is_unchanged(name, body):
    declared = (vars(task_bodies) | vars(server_and_error_bodies) | vars(event_bodies))[body]
    assert getattr(response_types, name) is declared
    assert getattr(sandbox.client, name, declared) is declared


def test_every_public_type_is_listed():
    assert {name for name, kind in vars(response_types).items() if is_typeddict(kind)} == set(NAMES)
