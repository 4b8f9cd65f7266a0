"""The client's types have every field that the server answers with, and no other."""

from typing import get_type_hints

import pytest

from sandbox.api import bodies
from sandbox.client import answers

PAIRS = [
    (answers.Links, bodies.LinksBody),
    (answers.Submitted, bodies.SubmittedBody),
    (answers.Checked, bodies.DryRunBody),
    (answers.Failure, bodies.FailureBody),
    (answers.Vm, bodies.VmBody),
    (answers.Progress, bodies.ProgressBody),
    (answers.Attempt, bodies.AttemptBody),
    (answers.Definition, bodies.DefinitionBody),
    (answers.TaskSummary, bodies.TaskItemBody),
    (answers.Task, bodies.TaskBody),
    (answers.TaskPage, bodies.TaskListBody),
    (answers.Cancellation, bodies.CancelledBody),
    (answers.Release, bodies.ReleasedBody),
    (answers.PrunedTask, bodies.PrunedTaskBody),
    (answers.Pruned, bodies.PrunedBody),
    (answers.Artifact, bodies.ArtifactBody),
    (answers.ArtifactList, bodies.ArtifactListBody),
    (answers.Runtime, bodies.RuntimeBody),
    (answers.Occupancy, bodies.OccupancyBody),
    (answers.Health, bodies.HealthBody),
    (answers.Draining, bodies.DrainBody),
    (answers.Mistake, bodies.DetailBody),
    (answers.ExistingTask, bodies.ExistingTaskBody),
]


@pytest.mark.parametrize(("typed", "body"), PAIRS, ids=lambda pair: pair.__name__)
def test_an_answer_has_the_same_fields_for_server_and_client(typed, body):
    assert set(get_type_hints(typed)) == set(body.model_fields)
