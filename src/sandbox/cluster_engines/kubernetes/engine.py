"""Submits, cancels and looks up Jobs through the API server of Kubernetes, and checks the identities of workers."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from sandbox.cluster_engines import check_job_name
from sandbox.cluster_engines.kubernetes.api import (
    MERGE_PATCH,
    AccessReview,
    ApiAddress,
    ApiClient,
    ApiError,
    ApiJob,
    ApiNode,
    ApiPod,
    ObjectList,
    TokenReview,
    VersionInfo,
    one_line,
    unavailable,
)
from sandbox.cluster_engines.kubernetes.worker_job import (
    INSTANCE_LABEL,
    JOB_LABEL,
    WorkerPodSettings,
    pod_phase,
    server_selector,
    summarize_jobs,
    worker_job,
)
from sandbox.interfaces.cluster_engine import (
    IDENTITY_TOKEN_CHARACTERS_MAX,
    IDENTITY_TOKEN_PATTERN,
    EngineHost,
    EngineRejectedError,
    EngineUnavailableError,
    JobPhase,
    JobRequest,
    JobStatus,
    WorkerRejectedError,
)
from sandbox.model.resources import Resources, pareto_frontier

CALL_TIMEOUT_SECONDS = 50.0
"""Time limit for one call of the engine, which may send several requests."""

VERIFY_TIMEOUT_SECONDS = 15.0
"""Time limit for checking a token. A worker waits a little longer for the answer to its claim."""

HOSTS_MAX_AGE_SECONDS = 30.0
"""How long the nodes may be reused for checking whether a job fits on one of them."""

CONCURRENT_REVIEWS_MAX = 4
"""Maximum number of tokens that are checked at the same time. Anyone who can reach the server can send tokens."""

_REJECTED_CODES = frozenset({400, 403, 404, 413, 422})
"""HTTP statuses after which the same Job would be refused again. 403 includes an exceeded quota."""

_TRANSIENT_TAINTS = ("node.kubernetes.io/", "node.cloudprovider.kubernetes.io/")
"""The prefixes of taints that show a state of a node. Other taints reserve the node for other Pods."""

_POD_UID = "authentication.kubernetes.io/pod-uid"
_TOKEN = re.compile(IDENTITY_TOKEN_PATTERN)
_ADVICE = "check the Role and the ClusterRole of the server with 'sandbox doctor'"


class Permission(NamedTuple):
    """A permission that the server needs. is_namespaced: needed only in the namespace of the workers."""

    verb: str
    group: str
    resource: str
    is_namespaced: bool

    def __str__(self) -> str:
        return f"{self.verb} {self.resource}"


PERMISSIONS = (
    *(Permission(verb, "batch", "jobs", is_namespaced=True) for verb in ("create", "get", "list", "patch")),
    *(Permission(verb, "", "pods", is_namespaced=True) for verb in ("list", "patch")),
    *(Permission("get", "", name, is_namespaced=True) for name in ("namespaces", "serviceaccounts")),
    Permission("list", "", "nodes", is_namespaced=False),
    Permission("create", "authentication.k8s.io", "tokenreviews", is_namespaced=False),
)
"""All permissions that the engine needs."""


class KubernetesEngine:
    """Implements `interfaces.cluster_engine.Engine` and `WorkerVerifier` for the Jobs of one server in a namespace."""

    def __init__(self, address: ApiAddress, namespace: str, settings: WorkerPodSettings) -> None:
        self._api = ApiClient(address)
        self._namespace = namespace
        self._settings = settings
        self._jobs_path = f"/apis/batch/v1/namespaces/{namespace}/jobs"
        self._pods_path = f"/api/v1/namespaces/{namespace}/pods"
        self._reviews = asyncio.Semaphore(CONCURRENT_REVIEWS_MAX)
        self._known_hosts: tuple[float, Sequence[EngineHost]] | None = None

    async def submit(self, request: JobRequest) -> None:
        """Create the Job. Its name is unique in the namespace. Implements `Engine.submit`."""
        check_job_name(request.name)
        async with _call_timeout(CALL_TIMEOUT_SECONDS):
            excluded = await self._check_hosts(request)
            body = worker_job(request, self._settings, excluded)
            try:
                await self._api.send("POST", self._jobs_path, ApiJob, body=body)
            except ApiError as error:
                if error.status == 409:
                    await self._check_owner(request.name)
                elif error.status in _REJECTED_CODES:
                    message = f"Kubernetes refuses the job: {error}. Change the request or [cluster.kubernetes]."
                    raise EngineRejectedError(message) from error
                else:
                    raise

    async def _check_owner(self, name: str) -> None:
        """Raise EngineRejectedError if the Job with this name belongs to another server."""
        job = await self._find_job(name)
        if job is not None and not self._is_own(job):
            message = f"The namespace {self._namespace} has a Job {name} that does not belong to this server."
            raise EngineRejectedError(f"{message} Delete that Job, or let each server use its own namespace.")

    async def _find_job(self, name: str) -> ApiJob | None:
        try:
            return await self._api.send("GET", f"{self._jobs_path}/{name}", ApiJob)
        except ApiError as error:
            if error.status != 404:
                raise
        return None

    def _is_own(self, job: ApiJob) -> bool:
        return job.metadata.labels.get(INSTANCE_LABEL) == self._settings.owner

    async def _check_hosts(self, request: JobRequest) -> Sequence[str]:
        """Check that a node can run the job, because Kubernetes would not. Return the excluded hosts that exist.

        Raises EngineRejectedError.
        """
        hosts = await self._recent_hosts()
        names = {host.name for host in hosts}
        excluded = sorted(names & {*request.excluded_hosts})
        if len(excluded) == len(names):
            raise EngineRejectedError("No host is left for the job: all nodes are excluded.")
        largest = pareto_frontier(host.resources for host in hosts if host.name not in excluded)
        if not any(request.resources.fits_in(each) for each in largest):
            shortfall = ", ".join(request.resources.describe_shortfall(largest[0], "on the node with the most CPUs"))
            raise EngineRejectedError(f"No node is large enough for the job: {shortfall}. Lower the request.")
        return excluded

    async def _recent_hosts(self) -> Sequence[EngineHost]:
        if self._known_hosts is None or time.monotonic() - self._known_hosts[0] > HOSTS_MAX_AGE_SECONDS:
            await self._list_hosts()
        assert self._known_hosts is not None
        return self._known_hosts[1]

    async def cancel(self, name: str) -> None:
        """End the worker's Pod through its node. If no Pod is on a node, fail the Job. Implements `Engine.cancel`.

        Nothing is deleted: the Job keeps the name in use, and the Pod keeps the proof that the worker has ended.
        """
        check_job_name(name)
        async with _call_timeout(CALL_TIMEOUT_SECONDS):
            pods = [pod for pod in await self._pods_of(name) if pod_phase(pod) is not JobPhase.WAITING]
            for pod in pods:
                if pod_phase(pod) is not JobPhase.ENDED:
                    await self._set_deadline(f"{self._pods_path}/{pod.metadata.name}", pod, 1)
            if not pods and (job := await self._find_job(name)) is not None and self._is_own(job):
                await self._set_deadline(f"{self._jobs_path}/{name}", job, 0)

    async def _set_deadline(self, path: str, target: ApiPod | ApiJob, seconds: int) -> None:
        """Set an earlier deadline for an object, unless the object is gone.

        If another object now has the name, Kubernetes refuses the change, because the uid differs. Raises ApiError.
        """
        changes = {"metadata": {"uid": target.metadata.uid}, "spec": {"activeDeadlineSeconds": seconds}}
        try:
            await self._api.send("PATCH", path, type(target), body=changes, content_type=MERGE_PATCH)
        except ApiError as error:
            if error.status != 404:
                raise

    async def reconcile_jobs(self, names: Collection[str]) -> Mapping[str, JobStatus]:
        """List this server's Jobs, then its Pods. Implements `Engine.reconcile_jobs`."""
        for name in names:
            check_job_name(name)
        if not names:
            return {}
        selector = server_selector(self._settings.owner)
        async with _call_timeout(CALL_TIMEOUT_SECONDS):
            jobs = await self._api.list_all(self._jobs_path, ObjectList[ApiJob], selector)
            pods = await self._api.list_all(self._pods_path, ObjectList[ApiPod], selector)
        return summarize_jobs(names, jobs, pods)

    async def _pods_of(self, name: str) -> Sequence[ApiPod]:
        selector = f"{server_selector(self._settings.owner)},{JOB_LABEL}={name}"
        pods = await self._api.list_all(self._pods_path, ObjectList[ApiPod], selector)
        return [pod for pod in pods if pod.job == name]

    async def maximal_host_sizes(self) -> Sequence[Resources]:
        """Return the sizes of the largest nodes. Implements `Engine.maximal_host_sizes`."""
        return pareto_frontier(host.resources for host in await self.hosts())

    async def hosts(self) -> Sequence[EngineHost]:
        """List the nodes that may run workers. Implements `Engine.hosts`."""
        async with _call_timeout(CALL_TIMEOUT_SECONDS):
            return await self._list_hosts()

    async def _list_hosts(self) -> Sequence[EngineHost]:
        selector = ",".join(f"{name}={value}" for name, value in self._settings.node_selector.items())
        nodes = await self._api.list_all("/api/v1/nodes", ObjectList[ApiNode], selector)
        try:
            hosts = [
                EngineHost(node.metadata.name, node.resources(), _describe_problem(node))
                for node in sorted(nodes, key=lambda node: node.metadata.name)
                if not self._is_tainted(node)
            ]
        except ValueError as error:
            raise unavailable(f"a node reports a quantity in an unknown format: {one_line(str(error))}") from error
        if not hosts:
            raise EngineUnavailableError(
                "Kubernetes has no nodes for workers; set cluster.kubernetes.node_selector and tolerations."
            )
        self._known_hosts = time.monotonic(), hosts
        return hosts

    def _is_tainted(self, node: ApiNode) -> bool:
        """Return whether a taint permanently keeps workers off a node."""
        return any(
            taint.effect in {"NoSchedule", "NoExecute"}
            and not taint.key.startswith(_TRANSIENT_TAINTS)
            and taint.key not in self._settings.tolerations
            for taint in node.spec.taints or ()
        )

    async def verify(self, name: str, host: str, token: str) -> None:
        """Let Kubernetes check the token, then compare its Pod with the job and the host.

        Implements `WorkerVerifier.verify`.
        """
        check_job_name(name)
        if len(token) > IDENTITY_TOKEN_CHARACTERS_MAX or not _TOKEN.fullmatch(token):
            raise WorkerRejectedError("The worker has no service account token.")
        async with _call_timeout(VERIFY_TIMEOUT_SECONDS), self._reviews:
            uid = await self._review(token)
            pods = await self._pods_of(name)
        pod = next((pod for pod in pods if pod.metadata.uid == uid), None)
        if pod is None:
            raise WorkerRejectedError(f"The service account token does not belong to a Pod of the job {name}.")
        if pod.spec.node_name != host:
            raise WorkerRejectedError(f"Kubernetes reports that the Pod of the job {name} is not on the node {host}.")

    async def _review(self, token: str) -> str:
        """Return the uid of the Pod to which a token was issued. Raises WorkerRejectedError."""
        audience = self._settings.audience
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [audience]},
        }
        path = "/apis/authentication.k8s.io/v1/tokenreviews"
        review = (await self._api.send("POST", path, TokenReview, body=body)).status
        if not review.authenticated or audience not in review.audiences:
            raise WorkerRejectedError("The worker's service account token is not valid for this server.")
        account = f"system:serviceaccount:{self._namespace}:{self._settings.service_account}"
        if review.user.username != account:
            raise WorkerRejectedError(f"The worker's token does not belong to the service account {account}.")
        uids = review.user.extra.get(_POD_UID, ())
        if len(uids) != 1:
            raise WorkerRejectedError("The worker's service account token is not bound to a Pod.")
        return uids[0]

    async def version(self) -> str:
        """Return the version of the API server. Raises EngineUnavailableError."""
        async with _call_timeout(CALL_TIMEOUT_SECONDS):
            return one_line((await self._api.send("GET", "/version", VersionInfo)).git_version)

    async def missing_permissions(self) -> Sequence[Permission]:
        """Return the permissions that the server lacks. Raises EngineUnavailableError."""
        async with _call_timeout(CALL_TIMEOUT_SECONDS):
            return [each for each in PERMISSIONS if not await self._is_allowed(each)]

    async def _is_allowed(self, permission: Permission) -> bool:
        attributes = {"verb": permission.verb, "group": permission.group, "resource": permission.resource}
        if permission.is_namespaced:
            attributes["namespace"] = self._namespace
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        }
        path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
        return (await self._api.send("POST", path, AccessReview, body=body)).status.allowed

    async def missing_objects(self) -> Sequence[str]:
        """Return which of the objects that the settings name do not exist. Raises EngineUnavailableError."""
        namespace = f"/api/v1/namespaces/{self._namespace}"
        account = self._settings.service_account
        objects = {
            namespace: f"namespace {self._namespace}",
            f"{namespace}/serviceaccounts/{account}": f"service account {account}",
        }
        missing = []
        async with _call_timeout(CALL_TIMEOUT_SECONDS):
            for path, description in objects.items():
                try:
                    await self._api.send("GET", path, dict[str, Any])
                except ApiError as error:
                    if error.status != 404:
                        raise
                    missing.append(description)
        return missing


def _describe_problem(node: ApiNode) -> str:
    """Return why Kubernetes starts no Pods on a node now; empty if it does."""
    if node.status.find("Ready") is None:
        ready = next((each for each in node.status.conditions or () if each.type == "Ready"), None)
        detail = "" if ready is None else one_line(ready.message or ready.reason)
        return f"Kubernetes reports that the node is not ready ({detail})." if detail else "The node is not ready."
    if node.spec.unschedulable:
        return "The node is cordoned (kubectl cordon)."
    taints = [taint.key for taint in node.spec.taints or () if taint.key.startswith(_TRANSIENT_TAINTS)]
    return f"The node has the taint {one_line(taints[0])}." if taints else ""


@asynccontextmanager
async def _call_timeout(seconds: float) -> AsyncIterator[None]:
    """Limit the time, and translate refused requests and the timeout to EngineUnavailableError."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except ApiError as error:
        advice = f"; {_ADVICE}" if error.status == 403 else ""
        raise EngineUnavailableError(f"Kubernetes refused a request: {error}{advice}.") from error
    except TimeoutError as error:
        raise unavailable(f"no result within {seconds:g} s") from error
