"""The list of hosts."""

from datetime import UTC, datetime

from doubles.example_requests import Example
from doubles.fake_token_store import FakeTokenStore
from sandbox.api.routes.admin import HOST_TASK_IDS_MAX
from sandbox.interfaces.placement import HostState, HostStatus
from sandbox.interfaces.tasks import HostWithTasks

EXAMPLES = (Example("list_hosts"),)
HOSTS = "/api/v1/hosts"


def test_machine_without_a_cluster_is_listed_with_its_capacity(api):
    assert api.get(HOSTS).json() == {
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
            }
        ]
    }


def test_hosts_of_a_cluster_have_the_time_of_the_last_contact(api, tasks):
    at = datetime(2026, 1, 29, 10, 10, 15, tzinfo=UTC)
    reason = "No worker on the host is responding."
    lost = HostStatus("node-7", HostState.UNREACHABLE, reason, last_contact_at=at)
    tasks.hosts = [HostWithTasks(lost, ["task-1"])]
    [host] = api.get(HOSTS).json()["hosts"]
    assert (host["name"], host["state"], host["reason"]) == ("node-7", "unreachable", reason)
    assert (host["running"], host["task_ids"], host["last_contact_at"]) == (1, ["task-1"], "2026-01-29T10:10:15.000Z")
    assert (host["cpus"], host["memory_bytes"], host["version"]) == (None, None, None)


def test_number_of_task_ids_is_limited(api, tasks):
    ids = [f"task-{number:03}" for number in range(HOST_TASK_IDS_MAX + 5)]
    tasks.hosts = [HostWithTasks(tasks.hosts[0].status, ids)]
    [host] = api.get(HOSTS).json()["hosts"]
    assert (host["running"], host["task_ids"]) == (len(ids), ids[:HOST_TASK_IDS_MAX])


def test_viewers_may_list_hosts_and_others_may_not(api_with_tokens):
    api = api_with_tokens(FakeTokenStore(vera="viewer"))
    assert api.get(HOSTS).status_code == 401
    assert api.get(HOSTS, headers={"authorization": "Bearer vera"}).status_code == 200
