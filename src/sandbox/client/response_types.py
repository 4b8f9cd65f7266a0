"""Response types of the API: TypedDicts with the keys that clients may rely on, under the client's names.

`sandbox.model.wire` declares these types and describes each key; events have the same names there. A newer server
may send additional keys. Reading a key that an older server omits raises UnexpectedResponseError. Times are RFC 3339 in
UTC.
"""

from sandbox.model.wire import bodies, event_bodies, server_bodies

State = bodies.State

Submitted = bodies.SubmittedBody
Checked = bodies.DryRunBody
ResolvedManifest = bodies.ResolvedManifestBody
Links = bodies.LinksBody

Task = bodies.TaskBody
TaskSummary = bodies.TaskItemBody
TaskPage = bodies.TaskListBody
Attempt = bodies.AttemptBody
Failure = bodies.FailureBody
Remedy = bodies.RemedyBody
Progress = bodies.ProgressBody
Vm = bodies.TaskVmBody

Cancellation = bodies.CancelledBody
Release = bodies.ReleasedBody
Deletion = bodies.DeletedBody
Artifact = bodies.ArtifactBody
ArtifactList = bodies.ArtifactListBody

Health = server_bodies.HealthBody
Runtime = server_bodies.RuntimeBody
Occupancy = server_bodies.OccupancyBody
Host = server_bodies.HostBody
HostList = server_bodies.HostListBody
Draining = server_bodies.DrainBody
Pruned = server_bodies.PrunedBody
PrunedTask = server_bodies.PrunedTaskBody
UnexaminedTask = server_bodies.UnexaminedTaskBody

FieldError = bodies.FieldErrorBody
ExistingTask = bodies.ExistingTaskBody

FileEdit = event_bodies.FileEditBody
Metrics = event_bodies.MetricsBody
