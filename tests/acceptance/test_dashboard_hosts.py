"""The page that lists the hosts of a cluster, in a real browser."""

import socket
import time
from datetime import UTC, datetime

import msgspec
import pytest

from doubles.browser import accessibility_violations
from doubles.deployment import Deployment
from sandbox.bootstrap.worker import host_name
from sandbox.model.resources import Resources
from sandbox.placements.cluster.host_drains import HostDrains
from sandbox.placements.cluster.hosts import SeenHost, SeenHosts
from sandbox.placements.cluster.job_state import JobStore, StoredJob

LONG_NAME = "build-host-with-a-long-name.rack-12.cluster.example.org"


@pytest.fixture(scope="module")
def server_url(tmp_path_factory):
    """A server that has seen three hosts, none of which the engine lists. One host is being drained.

    The worker on another of the three hosts has claimed a task and is not responding.
    """
    deployment = Deployment(tmp_path_factory.mktemp("hosts"))
    directory = deployment.data_dir / "cluster"
    directory.mkdir(mode=0o700, parents=True)
    deployment.data_dir.chmod(0o700)
    seen = SeenHosts(directory / "hosts.json")
    for name in ("node-1", "node-2", LONG_NAME):
        seen.add(SeenHost(name, time.time() - 3600, "0.1.0", 16, 64 * 1024**3))
    seen.save()
    HostDrains(directory / "drained.json").start("node-1", datetime.now(UTC))
    job = StoredJob("task-1", "a" * 12, Resources(1, 2**30, 2**30), 600.0, ("a" * 12,))
    JobStore(directory / "jobs").save(msgspec.structs.replace(job, nonce_hash=bytes(32), host="node-2", boot_id="b"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    deployment.model_url = "http://127.0.0.1:9"  # not used
    deployment.start_server(SANDBOX_CLUSTER_ENGINE="processes", SANDBOX_CLUSTER_PORT=str(port))
    yield deployment.server.ready_message["http"]
    deployment.close()


def test_server_page_links_to_the_list_of_hosts(server_url, browser):
    page = browser.open(f"{server_url}/server")
    page.locator("#host-count a").click()
    page.get_by_role("heading", name="Hosts").wait_for()
    rows = page.locator(".hosts tbody tr")
    names, own = rows.locator("th").all_inner_texts(), host_name({})
    assert names == sorted({LONG_NAME, "node-1", "node-2", own})
    pills = {name: rows.nth(index).locator(".pill").all_inner_texts() for index, name in enumerate(names)}
    expected = {LONG_NAME: ["not ready"], "node-1": ["not ready", "drained"], "node-2": ["unreachable"], own: ["idle"]}
    assert pills == expected
    assert rows.nth(names.index(LONG_NAME)).locator("time").first.inner_text() == "1 h ago"
    assert page.get_by_role("link", name="Server", exact=True).get_attribute("aria-current") == "page"
    assert accessibility_violations(page) == []
    browser.assert_no_errors(server_url)
