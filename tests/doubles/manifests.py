"""Manifests for tests."""

from sandbox.model.manifest.schema import Claude, Lifecycle, Manifest, Metadata, Repository, Secret, Vm


def manifest(task_id="task-1", *, name="A task", **parts):
    """The minimal manifest; parts such as `vm` and `lifecycle` are dictionaries."""
    return Manifest(
        version="1",
        kind="Task",
        metadata=Metadata(name=name, id=task_id, labels=parts.get("labels", {})),
        repository=Repository(url="https://example.org/r.git", branch="main"),
        claude=Claude(prompt="Do it.", **parts.get("claude", {})),
        vm=Vm(**parts.get("vm", {})),
        secrets=tuple(Secret(name=name, source="env", key=name) for name in parts.get("manifest_secrets", ())),
        lifecycle=Lifecycle(**parts.get("lifecycle", {})),
    )
