"""Fixtures: artifacts of a task in the fake API."""

import hashlib
import json

import pytest

from doubles.fake_api import ApiResponse, json_response
from doubles.sample_task import TASK_ID


@pytest.fixture
def serve_patch(api):
    """Serve a patch with a base commit from the API."""

    def serve(patch: bytes, base: str | None, *, contains_secret: bool = False, has_tar: bool = False) -> None:
        metadata = json.dumps({"repository": {"base_commit": base}}).encode()
        entries = []
        for name, data in ((f"{TASK_ID}.patch", patch), ("metadata.json", metadata)):
            digest = hashlib.sha256(data).hexdigest()
            path = f"/tasks/{TASK_ID}/artifacts/.sandbox%2F{name}"
            api.on(
                "GET",
                path,
                lambda request, data=data, digest=digest: ApiResponse(200, [data], {"X-Checksum-SHA256": digest}),
            )
            entries.append({"name": name, "path": f".sandbox/{name}", "contains_secret": contains_secret})
        if has_tar:
            name = f"{TASK_ID}.changes.tar"
            entries.append({"name": name, "path": f".sandbox/{name}", "contains_secret": False})
        api.on("GET", f"/tasks/{TASK_ID}/artifacts", json_response({"task_id": TASK_ID, "artifacts": entries}))

    return serve
