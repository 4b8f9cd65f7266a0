"""The client's response types have the same fields as the server's schemas."""

from typing import get_type_hints

import pytest

from sandbox.api import schemas
from sandbox.client import responses

PAIRS = [
    (responses.Links, schemas.LinksBody),
    (responses.Submitted, schemas.SubmittedBody),
    (responses.Checked, schemas.DryRunBody),
    (responses.Failure, schemas.FailureBody),
    (responses.Vm, schemas.VmBody),
    (responses.Progress, schemas.ProgressBody),
    (responses.Attempt, schemas.AttemptBody),
    (responses.Definition, schemas.DefinitionBody),
    (responses.TaskSummary, schemas.TaskItemBody),
    (responses.Task, schemas.TaskBody),
    (responses.TaskPage, schemas.TaskListBody),
    (responses.Cancellation, schemas.CancelledBody),
    (responses.Release, schemas.ReleasedBody),
    (responses.PrunedTask, schemas.PrunedTaskBody),
    (responses.Pruned, schemas.PrunedBody),
    (responses.Artifact, schemas.ArtifactBody),
    (responses.ArtifactList, schemas.ArtifactListBody),
    (responses.Runtime, schemas.RuntimeBody),
    (responses.Occupancy, schemas.OccupancyBody),
    (responses.Health, schemas.HealthBody),
    (responses.Draining, schemas.DrainBody),
    (responses.Mistake, schemas.DetailBody),
    (responses.ExistingTask, schemas.ExistingTaskBody),
]


@pytest.mark.parametrize(("response_type", "body"), PAIRS, ids=lambda pair: pair.__name__)
def test_client_and_server_types_have_the_same_fields(response_type, body):
    assert set(get_type_hints(response_type)) == set(body.model_fields)
