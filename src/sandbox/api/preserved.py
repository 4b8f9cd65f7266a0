"""What is kept of a failed task's sandbox."""

from fastapi import FastAPI

from sandbox.api import paths
from sandbox.api.answer import Json
from sandbox.api.context import Asked
from sandbox.api.openapi import answers, problems


def add_preserved_routes(app: FastAPI) -> None:
    """Put the routes of this module on the app."""
    app.delete(paths.VM, responses=answers("ReleasedBody") | problems(404, 503))(release_sandbox)


async def release_sandbox(asked: Asked, task_id: paths.TaskId) -> Json:
    """Release the preserved sandbox of a task, and the disk that it takes."""
    await asked.tasks.release(task_id)
    answer = {"success": True, "task_id": task_id, "message": f"The preserved sandbox of task {task_id} is released."}
    return Json(answer)
