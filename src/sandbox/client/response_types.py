"""Response types of the API: TypedDicts with the keys that clients may rely on, under the client's names.

`sandbox.model.wire` declares these types and describes each key; events have the same names there. A newer server
may send additional keys. Reading a key that an older server omits raises UnexpectedResponseError. Times are RFC 3339 in
UTC.
"""

from sandbox.model.wire import event_bodies, server_and_error_bodies, task_bodies

State = task_bodies.State

Submitted = task_bodies.SubmittedBody
Checked = task_bodies.DryRunBody
ResolvedManifest = task_bodies.ResolvedManifestBody
Links = task_bodies.LinksBody

Task = task_bodies.TaskBody
TaskSummary = task_bodies.TaskItemBody
TaskPage = task_bodies.TaskListBody
Attempt = task_bodies.AttemptBody
Failure = task_bodies.FailureBody
Remedy = task_bodies.RemedyBody
Progress = task_bodies.ProgressBody
Vm = task_bodies.TaskVmBody

Cancellation = task_bodies.CancelledBody
Release = task_bodies.ReleasedBody
Deletion = task_bodies.DeletedBody
Artifact = task_bodies.ArtifactBody
ArtifactList = task_bodies.ArtifactListBody

Health = server_and_error_bodies.HealthBody
Runtime = server_and_error_bodies.RuntimeBody
Occupancy = server_and_error_bodies.OccupancyBody
Host = server_and_error_bodies.HostBody
HostList = server_and_error_bodies.HostListBody
Draining = server_and_error_bodies.DrainBody
Pruned = server_and_error_bodies.PrunedBody
PrunedTask = server_and_error_bodies.PrunedTaskBody
UnexaminedTask = server_and_error_bodies.UnexaminedTaskBody

FieldError = server_and_error_bodies.FieldErrorBody
ExistingTask = server_and_error_bodies.ExistingTaskBody

FileEdit = event_bodies.FileEditBody
Metrics = event_bodies.MetricsBody
