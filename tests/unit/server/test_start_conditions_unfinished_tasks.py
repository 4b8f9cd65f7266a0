"""The limit on the manifests of unfinished tasks bounds the memory that they use."""

import json
import tracemalloc

import pytest

from doubles.manifests import parse_manifest
from sandbox.interfaces.server_services import UnavailableError
from sandbox.model import fixed_limits
from sandbox.server.start_conditions import UnfinishedTaskLimit


def manifest_text(arguments):
    servers = {"a": {"command": "x", "args": arguments}}
    claude = {"prompt": "Fix it.", "mcp_config": {"mcpServers": servers}}
    repository = {"url": "https://git.example/r.git", "branch": "main"}
    fields = {"version": "1", "kind": "Task", "metadata": {"name": "n"}, "repository": repository, "claude": claude}
    return json.dumps(fields).encode()


@pytest.mark.parametrize("arguments", [[f"{number:x}" for number in range(19_000)], ["x" * 200_000]], ids=len)
def test_memory_of_accepted_manifests_is_at_most_twice_the_limit(arguments, monkeypatch):
    monkeypatch.setattr(fixed_limits, "UNFINISHED_MANIFEST_BYTES_MAX", 4_000_000)
    limit, text, manifests = UnfinishedTaskLimit(1000), manifest_text(arguments), []
    parse_manifest(text, is_json=True)
    tracemalloc.start()
    try:
        while len(manifests) < 1000:
            manifest = parse_manifest(text, is_json=True)
            try:
                with limit.reserved(manifest):
                    manifests.append(manifest)
            except UnavailableError:
                break
            limit.add(f"task-{len(manifests)}", manifest)
        used_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 1 < len(manifests) < 1000
    assert used_bytes < 2 * 4_000_000
