"""The list of hosts."""

from datetime import UTC, datetime

import pytest

from doubles.example_requests import Example
from doubles.fake_token_store import FakeTokenStore
from sandbox.api.routes.server import HOST_TASK_IDS_MAX
from sandbox.interfaces.placement import HostState, HostStatus
from sandbox.interfaces.server_services import HostWithTasks

EXAMPLES = (
    Example("list_hosts"),
    Example("begin_host_drain", {"host": "build-1"}),
    Example("undo_host_drain", {"host": "build-1"}),
)
HOSTS_PATH = "/api/v1/hosts"


def test_machine_without_a_cluster_is_listed_with_its_capacity(api):
    assert api.get(HOSTS_PATH).json() == {
        "hosts": [
            {
                "name": "build-1",
                "state": "ready",
                "reason": "",
                "cpus": 8,
                "memory_bytes": 32 * 1024**3,
                "running": 0,
                "task_ids": [],
                "last_contact_at": None,
                "version": "0.1.0",
                "draining_since": None,
            }
        ]
    }


def test_hosts_of_a_cluster_have_the_time_of_the_last_contact(api, tasks):
    at = datetime(2026, 1, 29, 10, 10, 15, tzinfo=UTC)
    reason = "No worker on the host is responding."
    lost = HostStatus("node-7", HostState.UNREACHABLE, reason, last_contact_at=at)
    tasks.hosts = [HostWithTasks(lost, ["task-1"])]
    [host] = api.get(HOSTS_PATH).json()["hosts"]
    assert (host["name"], host["state"], host["reason"]) == ("node-7", "unreachable", reason)
    assert (host["running"], host["task_ids"], host["last_contact_at"]) == (1, ["task-1"], "2026-01-29T10:10:15.000Z")
    assert (host["cpus"], host["memory_bytes"], host["version"]) == (None, None, None)


def test_number_of_task_ids_is_limited(api, tasks):
    ids = [f"task-{number:03}" for number in range(HOST_TASK_IDS_MAX + 5)]
    tasks.hosts = [HostWithTasks(tasks.hosts[0].status, ids)]
    [host] = api.get(HOSTS_PATH).json()["hosts"]
    assert (host["running"], host["task_ids"]) == (len(ids), ids[:HOST_TASK_IDS_MAX])


def test_viewers_can_list_hosts_but_anonymous_callers_cannot(api_with_tokens):
    api = api_with_tokens(FakeTokenStore(vera="viewer"))
    assert api.get(HOSTS_PATH).status_code == 401
    assert api.get(HOSTS_PATH, headers={"authorization": "Bearer vera"}).status_code == 200


def test_drain_of_a_host_can_be_started_and_undone(api):
    drain = f"{HOSTS_PATH}/build-1/drain"
    assert api.post(drain).json()["draining_since"] == "2026-01-29T10:10:15.000Z"
    assert api.get(HOSTS_PATH).json()["hosts"][0]["draining_since"] == "2026-01-29T10:10:15.000Z"
    assert api.delete(drain).json() == api.get(HOSTS_PATH).json()["hosts"][0]
    assert api.get(HOSTS_PATH).json()["hosts"][0]["draining_since"] is None


@pytest.mark.parametrize("name", ["build-2", "..%2F..", "%0a", "a" * 300])
def test_unknown_host_is_not_drained(api, name):
    for change in (api.post, api.delete):
        response = change(f"{HOSTS_PATH}/{name}/drain")
        assert response.status_code == 404
        assert response.json()["error"] in {"host_not_found", "not_found"}
    assert api.post(f"{HOSTS_PATH}/build-2/drain").json()["error"] == "host_not_found"
    assert api.get(HOSTS_PATH).json()["hosts"][0]["draining_since"] is None


def test_only_operators_may_drain_hosts(api_with_tokens):
    api = api_with_tokens(FakeTokenStore(vera="viewer", olga="operator"))
    drain = f"{HOSTS_PATH}/build-1/drain"
    for change in (api.post, api.delete):
        assert change(drain).status_code == 401
        assert change(drain, headers={"authorization": "Bearer vera"}).status_code == 403
        assert change(drain, headers={"authorization": "Bearer olga"}).status_code == 200
