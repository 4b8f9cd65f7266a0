"""Tasks that have failed, and left the files of their sandbox."""

from doubles.manifests import manifest
from doubles.server_components import TO_RUNNING
from sandbox.interfaces.task_file_layout import TaskLayout
from sandbox.model.events import AgentExited, TaskFinished
from sandbox.model.failure import Failure, FailureCode

FAILED = (AgentExited(1, None, Failure(FailureCode.AGENT_FAILED, "It failed.")), TaskFinished())


def attempt_layout(components, order):
    return TaskLayout(components.data_dir, order.task_id).attempt(order.attempt_id)


async def fail(components, service, task_id, failure_action="preserve"):
    """Fail a task and leave the files of its sandbox, as a runner does."""
    await service.submit(manifest(task_id, lifecycle={"failure_action": failure_action}))
    await components.wait_for_launch(task_id)
    components.placement.record(task_id, *TO_RUNNING, *FAILED)
    await service.wait(task_id, 10)
    preserved = attempt_layout(components, components.placement.orders[-1])
    deep = preserved.workspace / "a" / "b"
    deep.mkdir(parents=True)
    (deep / "file").write_text("x")
    (deep / "link").symlink_to("/etc")
    (deep / "closed").mkdir(mode=0o500)
    preserved.host_git_directory.mkdir()
    preserved.handle.write_text("{}")
    preserved.runner_log.write_text("log")
    return preserved
