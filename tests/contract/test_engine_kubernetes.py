"""Failures of Kubernetes: nodes are lost, Pods are deleted, the API server is slow, broken or hostile."""

import asyncio
import gzip
import json
import socket
import time

import pytest

from doubles.engine_harnesses import GIB, MIB, SMALL, status_of, wait_for_end, wait_for_phase, wait_until
from doubles.kubernetes.api_server import SERVER_TOKEN, CannedResponse
from doubles.kubernetes.schemas import validate_job
from sandbox.cluster_engines.kubernetes import api as kubernetes_api
from sandbox.cluster_engines.kubernetes import engine as kubernetes_engine
from sandbox.cluster_engines.kubernetes.engine import CONCURRENT_REVIEWS_MAX, PERMISSIONS
from sandbox.interfaces.cluster_engine import (
    EngineRejectedError,
    EngineUnavailableError,
    JobPhase,
    JobRequest,
    WorkerRejectedError,
    job_name,
)
from sandbox.interfaces.task_file_layout import new_attempt_id
from sandbox.model.resources import Resources

LIST_JOBS, LIST_PODS = "GET /apis/batch/v1/namespaces/sandbox/jobs", "GET /api/v1/namespaces/sandbox/pods"
CREATE_JOB = "POST /apis/batch/v1/namespaces/sandbox/jobs"
HOSTILE_BODIES = {
    "empty": b"",
    "not JSON": b"<html>login</html>",
    "not UTF-8": b'{"items": [{"metadata": {"name": "a", "uid": "\xff"}}]}',
    "number": b"7",
    "list": b"[]",
    "no items": b"{}",
    "items of another type": b'{"items": {"a": 1}}',
    "object without metadata": b'{"items": [{}]}',
    "name is a number": b'{"items": [{"metadata": {"name": 7, "uid": "u"}}]}',
    "name is a path": b'{"items": [{"metadata": {"name": "../secrets/x", "uid": "u"}}]}',
    "name with a newline": b'{"items": [{"metadata": {"name": "a\\n", "uid": "u"}}]}',
    "node is a path": b'{"items": [{"metadata": {"name": "a", "uid": "u"}, "spec": {"nodeName": "../n"}}]}',
    "conditions are text": b'{"items": [{"metadata": {"name": "a", "uid": "u"}, "status": {"conditions": "x"}}]}',
    "too deep": b'{"items": ' + b"[" * 100_000,
    "token is a number": b'{"items": [], "metadata": {"continue": 7}}',
    "token is too long": b'{"items": [], "metadata": {"continue": "' + b"x" * 10_000 + b'"}}',
}


@pytest.fixture
def harness(kubernetes_harness):
    return kubernetes_harness


@pytest.fixture
def api(harness):
    return harness.api


@pytest.fixture
def cluster(harness):
    return harness.cluster


@pytest.fixture
async def running_job(engine, create_job):
    """A job whose worker is running."""
    job = create_job("wait")
    await engine.submit(job.request)
    await job.wait_for_heartbeat()
    await wait_for_phase(engine, job, JobPhase.RUNNING)
    return job


def pod_of(cluster, job):
    [pod] = [each for each in cluster.pods.values() if each["metadata"]["labels"]["sandbox-job"] == job.name]
    return pod


def container_of(cluster, job):
    return cluster.containers[pod_of(cluster, job)["metadata"]["uid"]]


class TestLostWorkers:
    async def test_worker_on_a_lost_node_is_unreachable(self, cluster, engine, running_job):
        cluster.lose_node("n1")
        status = await status_of(engine, running_job)
        assert (status.phase, status.host) == (JobPhase.UNREACHABLE, "n1")
        assert "DeletionByTaintManager" in status.reason
        assert "n1 has not confirmed" in status.reason
        assert await running_job.is_alive()
        cluster.return_node("n1")
        await wait_until(lambda: running_job.activity.read("term"))

    async def test_pod_that_was_removed_by_force_does_not_prove_the_end(self, cluster, engine, running_job):
        """`kubectl delete pod --force` removes the Pod, and its Job fails, although the worker is running."""
        cluster.lose_node("n1")
        with cluster.lock:
            del cluster.pods[pod_of(cluster, running_job)["metadata"]["name"]]
        status = await wait_for_phase(engine, running_job, JobPhase.UNREACHABLE)
        assert "no node has confirmed" in status.reason
        assert await running_job.is_alive()

    async def test_pod_that_the_control_plane_sets_to_failed_does_not_prove_the_end(self, cluster, engine, running_job):
        cluster.lose_node("n1")
        with cluster.lock:
            pod_of(cluster, running_job)["status"]["phase"] = "Failed"
        status = await status_of(engine, running_job)
        assert status.phase is JobPhase.UNREACHABLE
        assert await running_job.is_alive()

    async def test_container_that_the_node_cannot_find_does_not_prove_the_end(self, cluster, engine, running_job):
        with cluster.lock:
            cluster.unresponsive.add("n1")
            [status] = pod_of(cluster, running_job)["status"]["containerStatuses"]
            status["state"] = {"terminated": {"exitCode": 137, "reason": "ContainerStatusUnknown"}}
        assert (await status_of(engine, running_job)).phase is JobPhase.UNREACHABLE

    async def test_evicted_worker_gets_the_signal_and_is_not_started_again(self, cluster, engine, running_job):
        cluster.delete_pod(pod_of(cluster, running_job)["metadata"]["name"])
        status = await status_of(engine, running_job)
        assert status.phase is not JobPhase.RUNNING or status.is_ending
        await wait_for_phase(engine, running_job, JobPhase.ENDED, JobPhase.UNREACHABLE)
        await wait_until(lambda: running_job.activity.read("term"))
        assert len(running_job.starts()) == 1

    async def test_reason_shows_that_memory_was_exhausted(self, cluster, engine, running_job):
        container_of(cluster, running_job).kill("OOMKilled")
        status = await wait_for_end(engine, running_job)
        assert status.reason == "The worker was ended by signal 9 on n1 (OOMKilled)."

    async def test_time_limit_is_enforced_by_the_node(self, cluster, engine, create_job):
        job = create_job("stubborn")
        await engine.submit(job.request)
        await job.wait_for_heartbeat()
        assert pod_of(cluster, job)["spec"]["activeDeadlineSeconds"] == 600 + 600
        container_of(cluster, job).started_at -= 1200
        status = await wait_for_end(engine, job)
        assert "DeadlineExceeded" in status.reason
        assert job.activity.read("term")
        assert status.host == "n1"


class TestWaitingJobs:
    async def test_reason_is_that_of_the_scheduler(self, engine, running_job, harness, create_job):
        job = create_job("wait", resources=harness.whole_host)
        await engine.submit(job.request)
        await wait_until(
            lambda: (
                "Insufficient cpu"
                in pod_of(harness.cluster, job)["status"].get("conditions", [{}])[0].get("message", "")
            )
        )
        status = await status_of(engine, job)
        assert status.phase is JobPhase.WAITING
        assert status.reason.startswith("The Pod is waiting for a node (0/1 nodes are available: 1 Insufficient cpu")

    async def test_hostile_reason_is_shown_on_one_printable_line(self, cluster, engine, create_job):
        cluster.paused = True
        job = create_job("wait")
        await engine.submit(job.request)
        with cluster.lock:
            cluster._create_pod(cluster.jobs[job.name])
            message = "\x1b[31m\n\u202e" + "x" * 10_000
            pod_of(cluster, job)["status"]["conditions"] = [
                {"type": "PodScheduled", "status": "False", "message": message}
            ]
        reason = (await status_of(engine, job)).reason
        assert len(reason) < 400
        assert reason.isprintable()

    async def test_image_that_cannot_be_pulled_is_reported(self, cluster, harness, create_job):
        cluster.missing_images.add("missing:1")
        engine, job = harness.create_engine(image="missing:1"), create_job("wait")
        await engine.submit(job.request)
        await wait_until(lambda: cluster.pods and pod_of(cluster, job)["status"].get("containerStatuses"))
        status = await status_of(engine, job)
        assert (status.phase, status.host) == (JobPhase.RUNNING, "n1")
        assert 'ImagePullBackOff: Back-off pulling image "missing:1"' in status.reason
        await engine.cancel(job.name)

    async def test_job_without_a_pod_waits(self, cluster, engine, create_job):
        cluster.paused = True
        job = create_job("wait")
        await engine.submit(job.request)
        status = await status_of(engine, job)
        assert status.phase is JobPhase.WAITING
        assert f"kubectl describe job {job.name}" in status.reason

    async def test_job_cancelled_before_it_has_a_pod_never_starts(self, cluster, engine, create_job):
        cluster.paused = True
        job = create_job("wait")
        await engine.submit(job.request)
        await engine.cancel(job.name)
        cluster.paused = False
        assert (await wait_for_end(engine, job)).host == ""
        await engine.submit(job.request)
        assert (await status_of(engine, job)).phase is JobPhase.ENDED
        assert job.starts() == []

    async def test_pod_that_is_started_while_the_job_is_cancelled_ends(self, api, engine, running_job):
        """The engine does not see the Pod yet. The reported end then has no host."""
        api.canned[LIST_PODS] = [CannedResponse(body=b'{"items": []}')]
        await engine.cancel(running_job.name)
        await wait_until(lambda: running_job.activity.read("term"))
        status = await wait_for_phase(engine, running_job, JobPhase.ENDED)
        assert not status.host or not await running_job.is_alive()
        assert len(running_job.starts()) == 1

    async def test_cancellation_does_not_affect_a_pod_that_was_replaced(self, api, engine, running_job, cluster):
        stale = json.loads(json.dumps(pod_of(cluster, running_job)))
        stale["metadata"]["uid"] = "another"
        api.canned[LIST_PODS] = [CannedResponse(body=json.dumps({"items": [stale]}).encode())]
        with pytest.raises(EngineUnavailableError, match="Precondition failed"):
            await engine.cancel(running_job.name)
        assert await running_job.is_alive()


class TestApiServer:
    async def test_stopped_api_server_is_reported_as_unavailable(self, api, harness, create_job):
        job = create_job("wait")
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        api.url = f"https://127.0.0.1:{port}"
        engine = harness.create_engine()
        for call in (
            engine.submit(job.request),
            engine.cancel(job.name),
            engine.reconcile_jobs([job.name]),
            engine.hosts(),
            engine.maximal_host_sizes(),
            engine.verify(job.name, "n1", "a.b.c"),
        ):
            with pytest.raises(EngineUnavailableError, match="kubectl cluster-info"):
                await call

    async def test_lost_response_to_a_submission_starts_one_worker(self, api, harness, create_job):
        """A crash between the submission and its record also leads to a second submission."""
        job = create_job("wait")
        api.canned[CREATE_JOB] = [
            CannedResponse(code=504, is_performed=True),
            CannedResponse(code=500, is_performed=True),
        ]
        for _ in range(2):
            with pytest.raises(EngineUnavailableError):
                await harness.create_engine().submit(job.request)
        engine = harness.create_engine()
        await engine.submit(job.request)
        await job.wait_for_heartbeat()
        await engine.submit(job.request)
        assert len(job.starts()) == 1
        assert list(api.cluster.jobs) == [job.name]

    async def test_cancelled_submission_may_take_effect_and_can_be_repeated(self, api, engine, create_job):
        job = create_job("wait")
        api.canned[CREATE_JOB] = [CannedResponse(delay_seconds=1.0, is_performed=True)]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await engine.submit(job.request)
        await engine.submit(job.request)
        await job.wait_for_heartbeat()
        assert len(job.starts()) == 1

    @pytest.mark.parametrize("body", HOSTILE_BODIES.values(), ids=HOSTILE_BODIES)
    async def test_invalid_response_is_an_error(self, api, engine, running_job, body):
        api.canned[LIST_PODS] = [CannedResponse(body=body)]
        with pytest.raises(EngineUnavailableError, match="unknown format") as raised:
            await engine.reconcile_jobs([running_job.name])
        assert len(raised.value.message) < 600
        assert raised.value.message.isprintable()
        assert (await status_of(engine, running_job)).phase is JobPhase.RUNNING

    @pytest.mark.parametrize("items", [b"null", b"[]"])
    async def test_empty_list_is_valid(self, api, engine, running_job, items):
        body = b'{"kind": "PodList", "items": %s, "added": {"by": "a later version"}}' % items
        api.canned[LIST_PODS] = [CannedResponse(body=body)]
        assert (await status_of(engine, running_job)).phase is JobPhase.WAITING

    async def test_large_response_is_not_read(self, api, engine, running_job, monkeypatch):
        monkeypatch.setattr(kubernetes_api, "RESPONSE_BYTES_MAX", 1000)
        api.canned[LIST_JOBS] = [CannedResponse(body=b" " * 1001)]
        with pytest.raises(EngineUnavailableError, match="more than 1000 bytes"):
            await engine.reconcile_jobs([running_job.name])

    async def test_compressed_response_is_not_expanded(self, api, engine, running_job):
        body = gzip.compress(b'{"items": []}' + b" " * 100)
        api.canned[LIST_JOBS] = [CannedResponse(body=body, headers=[("Content-Encoding", "gzip")])]
        with pytest.raises(EngineUnavailableError, match="unknown format"):
            await engine.reconcile_jobs([running_job.name])

    @pytest.mark.parametrize(
        "headers",
        [
            [("Content-Length", "999")],
            [("Transfer-Encoding", "chunked")],
            [("X", "x" * 200_000)],
            [(f"X-{number}", "x" * 1000) for number in range(200)],
        ],
        ids=["two lengths", "chunked and a length", "long header", "many headers"],
    )
    async def test_response_that_is_not_valid_http_is_an_error(self, api, engine, running_job, headers):
        api.canned[LIST_JOBS] = [CannedResponse(body=b"x", headers=headers)]
        with pytest.raises(EngineUnavailableError):
            await engine.reconcile_jobs([running_job.name])
        assert (await status_of(engine, running_job)).phase is JobPhase.RUNNING

    async def test_endless_list_is_an_error(self, api, engine, running_job, monkeypatch):
        monkeypatch.setattr(kubernetes_api, "PAGES_MAX", 5)
        page = CannedResponse(body=b'{"items": [], "metadata": {"continue": "again"}}')
        api.canned[LIST_JOBS] = [page] * 10
        with pytest.raises(EngineUnavailableError, match="objects"):
            await engine.reconcile_jobs([running_job.name])
        assert len(api.canned[LIST_JOBS]) == 5
        monkeypatch.setattr(kubernetes_api, "ITEMS_MAX", 2)
        api.canned[LIST_JOBS] = [
            CannedResponse(body=b'{"items": [%s]}' % b",".join([b'{"metadata": {"name": "a", "uid": "u"}}'] * 3))
        ]
        with pytest.raises(EngineUnavailableError, match="more than 2 objects"):
            await engine.reconcile_jobs([running_job.name])

    async def test_list_that_expired_between_two_pages_is_read_again(self, api, engine, running_job, create_job):
        others = [create_job("exit", "0") for _ in range(3)]
        for job in others:
            await engine.submit(job.request)
        expired = b'{"kind": "Status", "reason": "Expired", "message": "The continue parameter is too old"}'
        first = CannedResponse(body=b'{"items": [], "metadata": {"continue": "2"}}')
        api.canned[LIST_JOBS] = [first, CannedResponse(code=410, body=expired)]
        assert (await status_of(engine, running_job)).phase is JobPhase.RUNNING
        api.canned[LIST_JOBS] = [CannedResponse(code=410, body=expired)] * 2
        with pytest.raises(EngineUnavailableError, match="too old"):
            await engine.reconcile_jobs([running_job.name])

    async def test_redirect_is_not_followed(self, api, engine, running_job):
        api.canned[LIST_JOBS] = [CannedResponse(code=302, headers=[("Location", f"{api.url}/version")])]
        with pytest.raises(EngineUnavailableError, match="HTTP status 302"):
            await engine.reconcile_jobs([running_job.name])
        assert "GET /version" not in api.requests

    async def test_slow_api_server_is_reported_as_unavailable_in_time(self, api, engine, running_job, monkeypatch):
        monkeypatch.setattr(kubernetes_api, "REQUEST_TIMEOUT_SECONDS", 0.3)
        api.canned[LIST_JOBS] = [CannedResponse(delay_seconds=2.0)]
        started_at = time.monotonic()
        with pytest.raises(EngineUnavailableError, match=r"no response within 0\.3 s"):
            await engine.reconcile_jobs([running_job.name])
        assert time.monotonic() - started_at < 1.9

    @pytest.mark.parametrize(("retry_after", "seconds"), [("7", 7), ("999999", 30), ("Wed, 21 Oct 2026", 1), ("-5", 1)])
    async def test_no_request_is_sent_during_a_pause_that_the_api_server_requested(
        self, api, engine, running_job, monkeypatch, retry_after, seconds
    ):
        api.canned[LIST_JOBS] = [CannedResponse(code=429, headers=[("Retry-After", retry_after)])]
        with pytest.raises(EngineUnavailableError, match="HTTP status 429"):
            await engine.reconcile_jobs([running_job.name])
        count, now = len(api.requests), time.monotonic()
        with pytest.raises(EngineUnavailableError, match="requested a pause"):
            await engine.reconcile_jobs([running_job.name])
        assert len(api.requests) == count
        monkeypatch.setattr(kubernetes_api.time, "monotonic", lambda: now + seconds + 0.1)
        assert (await status_of(engine, running_job)).phase is JobPhase.RUNNING

    async def test_replaced_token_is_read_again(self, api, engine, running_job):
        api.server_tokens.clear()
        api.server_tokens.add("next-token")
        with pytest.raises(EngineUnavailableError, match=f"rejects the token in {api.token_file}"):
            await engine.reconcile_jobs([running_job.name])
        api.token_file.write_text("next-token")
        assert (await status_of(engine, running_job)).phase is JobPhase.RUNNING

    async def test_token_is_read_at_intervals(self, api, engine, running_job, monkeypatch):
        api.token_file.write_text("next-token")
        assert (await status_of(engine, running_job)).phase is JobPhase.RUNNING
        api.server_tokens.add("next-token")
        api.server_tokens.discard(SERVER_TOKEN)
        monkeypatch.setattr(kubernetes_api, "CREDENTIALS_RELOAD_SECONDS", 0.0)
        count = len(api.requests)
        assert (await status_of(engine, running_job)).phase is JobPhase.RUNNING
        assert len(api.requests) == count + 2

    @pytest.mark.parametrize("content", [b"", b"a b", b"a\nb", b"\xff", b"x" * 70_000])
    async def test_invalid_token_is_not_sent(self, api, harness, content):
        api.token_file.write_bytes(content)
        with pytest.raises(EngineUnavailableError, match="contains no token"):
            await harness.create_engine().hosts()
        assert api.requests == []

    @pytest.mark.parametrize("name", ["token_file", "ca_file"])
    async def test_missing_files_are_named(self, api, harness, tmp_path, name):
        setattr(api, name, tmp_path / "missing")
        with pytest.raises(EngineUnavailableError, match="missing, cannot be read: No such file"):
            await harness.create_engine().hosts()
        setattr(api, name, tmp_path)
        with pytest.raises(EngineUnavailableError, match="cannot be read"):
            await harness.create_engine().hosts()

    @pytest.mark.parametrize(
        "content", ["", "no certificate", "-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----"]
    )
    async def test_api_server_is_not_trusted_without_its_certificate(self, api, harness, tmp_path, content):
        api.ca_file = tmp_path / "other.crt"
        api.ca_file.write_text(content)
        with pytest.raises(EngineUnavailableError, match="contains no certificates"):
            await harness.create_engine().hosts()

    async def test_certificate_for_another_name_is_not_trusted(self, api, harness):
        api.url = api.url.replace("127.0.0.1", "localhost")
        with pytest.raises(EngineUnavailableError, match=r"(?i)certificate|hostname"):
            await harness.create_engine().hosts()
        assert api.requests == []

    async def test_another_certificate_is_not_trusted(self, api, harness, tmp_path):
        from doubles.kubernetes.api_server import create_certificate

        (tmp_path / "other").mkdir()
        api.ca_file, _ = create_certificate(tmp_path / "other")
        with pytest.raises(EngineUnavailableError, match=r"(?i)certificate"):
            await harness.create_engine().hosts()
        assert api.requests == []


class TestPermissions:
    async def test_missing_permissions_are_listed(self, api, engine):
        assert await engine.missing_permissions() == []
        api.denied |= {("patch", "pods"), ("create", "tokenreviews")}
        assert [str(each) for each in await engine.missing_permissions()] == ["patch pods", "create tokenreviews"]
        assert {str(each) for each in PERMISSIONS} >= {"create jobs", "list nodes"}

    async def test_missing_objects_are_listed(self, api, engine):
        assert await engine.missing_objects() == []
        api.namespaces.clear()
        api.accounts.clear()
        assert await engine.missing_objects() == ["namespace sandbox", "service account sandbox-worker"]

    async def test_denied_requests_name_the_remedy(self, api, engine, running_job, create_job):
        api.denied |= {("list", "pods"), ("create", "jobs")}
        with pytest.raises(EngineUnavailableError, match=r'cannot list resource "pods".*sandbox doctor'):
            await engine.reconcile_jobs([running_job.name])
        with pytest.raises(EngineRejectedError, match='cannot create resource "jobs"'):
            await engine.submit(create_job("wait").request)

    async def test_job_in_a_missing_namespace_is_rejected(self, api, engine, create_job):
        api.namespaces.clear()
        with pytest.raises(EngineRejectedError, match='namespaces "sandbox" not found'):
            await engine.submit(create_job("wait").request)


class TestTwoServers:
    async def test_servers_see_only_their_own_jobs(self, harness, running_job):
        other = harness.create_engine(owner="server-2")
        assert (await status_of(other, running_job)).phase is JobPhase.UNKNOWN

    async def test_job_of_another_server_is_not_taken_over(self, harness, running_job):
        other = harness.create_engine(owner="server-2")
        with pytest.raises(EngineRejectedError, match="does not belong to this server"):
            await other.submit(running_job.request)
        assert len(running_job.starts()) == 1

    async def test_job_of_another_server_is_not_cancelled(self, cluster, harness, running_job, create_job):
        cluster.paused = True
        waiting = create_job("wait")
        await harness.create_engine().submit(waiting.request)
        other = harness.create_engine(owner="server-2")
        for job in (running_job, waiting):
            await other.cancel(job.name)
        cluster.paused = False
        await waiting.wait_for_heartbeat()
        assert await running_job.is_alive()

    async def test_two_engines_of_one_server_submit_a_job_once(self, harness, create_job):
        job = create_job("wait")
        engines = [harness.create_engine() for _ in range(4)]
        await asyncio.gather(*(engine.submit(job.request) for engine in engines))
        await job.wait_for_heartbeat()
        assert len(job.starts()) == 1


async def test_deleted_objects_are_not_an_error(api, engine, running_job, create_job):
    """Kubernetes removes ended Jobs and Pods at any time."""
    body = b'{"kind": "Status", "reason": "NotFound", "message": "not found"}'
    path = "/api/v1/namespaces/sandbox/pods/.*"
    api.canned[f"PATCH {path}"] = [CannedResponse(code=404, body=body)]
    await engine.cancel(running_job.name)
    job = create_job("wait")
    api.canned[CREATE_JOB] = [CannedResponse(code=409, body=b'{"reason": "AlreadyExists"}')]
    await engine.submit(job.request)
    assert (await status_of(engine, job)).phase is JobPhase.UNKNOWN
    await engine.submit(job.request)
    await job.wait_for_heartbeat()


class TestHosts:
    async def test_nodes_have_their_size_and_state(self, cluster, engine):
        cluster.add_node("n2", cpu="3920m", memory="2048Mi")
        cluster.add_node("windows", labels={"kubernetes.io/os": "windows"})
        cluster.add_node("control-plane", taints=[("node-role.kubernetes.io/control-plane", "NoSchedule")])
        cluster.add_node("busy", taints=[("node.kubernetes.io/memory-pressure", "NoSchedule")])
        with cluster.lock:
            cluster.nodes["n2"]["spec"]["unschedulable"] = True
        cluster.lose_node("n1")
        hosts = {host.name: host for host in await engine.hosts()}
        assert list(hosts) == ["busy", "n1", "n2"]
        assert hosts["n2"].resources == Resources(3, 2048 * MIB, 10 * GIB)
        assert hosts["n2"].problem == "The node is cordoned (kubectl cordon)."
        assert hosts["busy"].problem == "The node has the taint node.kubernetes.io/memory-pressure."
        assert "not ready (Kubelet stopped posting status)" in hosts["n1"].problem
        assert await engine.maximal_host_sizes() == [
            Resources(4, 1000 * MIB, 10 * GIB),
            Resources(3, 2048 * MIB, 10 * GIB),
        ]

    async def test_workers_run_on_selected_nodes_whose_taints_they_tolerate(self, cluster, harness, create_job):
        cluster.add_node("n2", labels={"pool": "agents"}, taints=[("agents", "NoSchedule")])
        selected = {"pool": "agents"}
        with pytest.raises(EngineUnavailableError, match="node_selector"):
            await harness.create_engine(node_selector=selected).hosts()
        engine = harness.create_engine(node_selector=selected, tolerations=("agents",))
        assert [host.name for host in await engine.hosts()] == ["n2"]
        job = create_job("wait")
        await engine.submit(job.request)
        await job.wait_for_heartbeat()
        assert (await status_of(engine, job)).host == "n2"

    async def test_jobs_start_on_nodes_that_are_not_excluded(self, cluster, engine, create_job):
        for name in ("n2", "ip-10-0-0-3.internal"):
            cluster.add_node(name)
        jobs = [create_job("wait", excluded_hosts=("n1", "n2", "NO_HOST\n")) for _ in range(3)]
        for job in jobs:
            await engine.submit(job.request)
            await job.wait_for_heartbeat()
            assert (await status_of(engine, job)).host == "ip-10-0-0-3.internal"
        with pytest.raises(EngineRejectedError, match="No host is left"):
            await engine.submit(create_job("wait", excluded_hosts=tuple(cluster.nodes)).request)

    @pytest.mark.parametrize("quantity", ["", "x", "1e999", "-1", "1" * 50, "1Zi", "٣"])
    async def test_unknown_quantity_is_an_error(self, cluster, engine, quantity):
        cluster.nodes["n1"]["status"]["allocatable"]["memory"] = quantity
        with pytest.raises(EngineUnavailableError, match="quantity in an unknown format"):
            await engine.hosts()


class TestIdentity:
    AUDIENCE = "audience-of-server-1"

    async def test_worker_of_the_job_is_accepted(self, api, cluster, engine, running_job):
        await engine.verify(running_job.name, "n1", api.issue_token(pod_of(cluster, running_job), self.AUDIENCE))

    async def test_token_that_proves_nothing_is_rejected(self, api, cluster, harness, engine, running_job, create_job):
        other = create_job("wait")
        await engine.submit(other.request)
        await other.wait_for_heartbeat()
        pod, uid = pod_of(cluster, running_job), "authentication.kubernetes.io/pod-uid"
        valid = api.issue_token(pod, self.AUDIENCE)
        for name, host, token in (
            (running_job.name, "n1", valid[:-2] + "xx"),
            (running_job.name, "n1", api.issue_token(pod, "audience-of-server-2")),
            (running_job.name, "n1", api.issue_token(pod, self.AUDIENCE, account="default")),
            (running_job.name, "n1", api.issue_token(pod_of(cluster, other), self.AUDIENCE)),
            (running_job.name, "n1", api.issue_token(pod, self.AUDIENCE, **{uid: []})),
            (running_job.name, "n1", api.issue_token(pod, self.AUDIENCE, **{uid: ["a", "b"]})),
            (running_job.name, "n2", api.issue_token(pod, self.AUDIENCE)),
            (job_name(new_attempt_id()), "n1", api.issue_token(pod, self.AUDIENCE)),
        ):
            with pytest.raises(WorkerRejectedError):
                await engine.verify(name, host, token)
        await engine.verify(running_job.name, "n1", api.issue_token(pod, self.AUDIENCE))

    @pytest.mark.parametrize("token", ["", "a", "a.b", "a.b.c.d", "a.b.c\n", "a.b.ü", "a..c", "a.b." + "c" * 6200])
    async def test_text_that_is_not_a_token_is_not_sent_to_kubernetes(self, api, engine, token):
        with pytest.raises(WorkerRejectedError, match="no service account token"):
            await engine.verify(job_name(new_attempt_id()), "n1", token)
        assert api.requests == []

    async def test_label_of_a_foreign_pod_is_not_sufficient(self, api, cluster, engine, running_job):
        """Users who can create Pods in the namespace can set labels, but the Job must control the Pod."""
        with cluster.lock:
            pod = json.loads(json.dumps(pod_of(cluster, running_job)))
            pod["metadata"] |= {"name": "foreign", "uid": "foreign-uid"}
            pod["metadata"]["ownerReferences"][0]["controller"] = False
            cluster.paused = True
            cluster.pods["foreign"] = pod
        with pytest.raises(WorkerRejectedError, match="does not belong to a Pod of the job"):
            await engine.verify(running_job.name, "n1", api.issue_token(pod, self.AUDIENCE))

    async def test_answer_for_the_audience_of_the_api_server_is_rejected(self, api, engine, running_job):
        """A token authenticator that ignores audiences returns none."""
        status = {"authenticated": True, "user": {"username": "system:serviceaccount:sandbox:sandbox-worker"}}
        path = "POST /apis/authentication.k8s.io/v1/tokenreviews"
        api.canned[path] = [CannedResponse(code=201, body=json.dumps({"status": status}).encode())]
        with pytest.raises(WorkerRejectedError, match="not valid for this server"):
            await engine.verify(running_job.name, "n1", "a.b.c")

    async def test_check_ends_before_the_worker_stops_waiting(self, api, engine, running_job, monkeypatch):
        monkeypatch.setattr(kubernetes_engine, "VERIFY_TIMEOUT_SECONDS", 0.3)
        path = "POST /apis/authentication.k8s.io/v1/tokenreviews"
        api.canned[path] = [CannedResponse(delay_seconds=2.0)] * CONCURRENT_REVIEWS_MAX
        checks = [engine.verify(running_job.name, "n1", "a.b.c") for _ in range(2 * CONCURRENT_REVIEWS_MAX)]
        started_at = time.monotonic()
        results = await asyncio.gather(*checks, return_exceptions=True)
        assert time.monotonic() - started_at < 1.9
        assert {type(result) for result in results} == {EngineUnavailableError}
        with pytest.raises(WorkerRejectedError):
            await engine.verify(running_job.name, "n1", "a.b.c")

    async def test_error_does_not_contain_the_token(self, api, engine, running_job):
        api.denied.add(("create", "tokenreviews"))
        with pytest.raises(EngineUnavailableError) as raised:
            await engine.verify(running_job.name, "n1", "secret.secret.secret")
        assert "secret.secret" not in repr(raised.value)


async def test_submitted_job_is_valid_and_minimal(engine, create_job, cluster):
    job = create_job("wait", environment={"A": "$(HOME)"}, excluded_hosts=("n9",))
    await engine.submit(job.request)
    stored = cluster.jobs[job.name]
    spec = stored["spec"]["template"]["spec"]
    assert (stored["spec"]["backoffLimit"], spec["restartPolicy"]) == (0, "Never")
    assert spec["automountServiceAccountToken"] is False
    assert "affinity" not in spec
    [container] = spec["containers"]
    limits = {"cpu": "1", "memory": str(SMALL.memory_bytes)}
    assert container["resources"] == {"limits": limits, "requests": {**limits, "ephemeral-storage": str(GIB)}}
    await job.wait_for_heartbeat()
    [start] = job.activity.read("start")
    assert start["environment"]["A"] == "$(HOME)"
    assert start["environment"]["SANDBOX_HOST_NAME"] == "n1"
    invalid = json.loads(json.dumps(stored))
    invalid["spec"]["backofLimit"] = 0
    with pytest.raises(AssertionError, match="backofLimit"):
        validate_job(invalid)


@pytest.mark.parametrize(
    "changes",
    [
        {"command": ()},
        {"command": ("relative",)},
        {"command": ("/bin/true", "a\0b")},
        {"environment": {"A": "a\0b"}},
        {"environment": {"A=B": "x"}},
        {"environment": {"SANDBOX_HOST_NAME": "n2"}},
        {"environment": {"SANDBOX_IDENTITY_FILE": "/tmp/x"}},
        {"output_file": "relative"},
    ],
)
async def test_request_that_kubernetes_cannot_represent_is_refused(engine, api, changes):
    fields = {"command": ("/bin/true",), "environment": {}, "resources": SMALL, "time_limit_seconds": 60}
    with pytest.raises(ValueError, match="must"):
        await engine.submit(JobRequest(job_name(new_attempt_id()), **(fields | changes)))
    assert not any(request.startswith("POST") for request in api.requests)
