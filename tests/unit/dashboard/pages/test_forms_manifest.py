"""The manifests that the submit form and the task's pages contain."""

import asyncio

from doubles.fake_access import FakeAccess
from doubles.fake_tasks import manifest
from sandbox.model.manifest.schema import Secret


def test_task_can_be_run_again(pages):
    pages.tasks.add("task-001")
    page = pages.get("/submit?from=task-001")
    assert "Run again: My Task" in page.text
    assert "Your instructions here" in page.text


def test_secret_sources_are_shown_to_operators_only(pages_with_tokens):
    pages = pages_with_tokens(FakeAccess(ann="operator", bob="viewer"))
    secret = Secret(name="GITHUB_TOKEN", source="vault", key="teams/platform#token")
    asyncio.run(pages.tasks.submit(manifest("task-001").replace(secrets=(secret,))))
    for path in ("/tasks/task-001", "/submit?from=task-001", "/tasks/task-001/proof"):
        for name, is_visible in (("ann", True), ("bob", False)):
            text = pages.get(path, authorization=f"Bearer {name}").text
            assert "- name: GITHUB_TOKEN" in text
            assert ("vault" in text, "teams/platform#token" in text) == (is_visible, is_visible), (path, name)
