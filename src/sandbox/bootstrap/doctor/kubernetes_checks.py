"""Checks of `sandbox doctor` for the engine `kubernetes`: API server, permissions, and nodes."""

import asyncio
import os
from collections.abc import Sequence

from sandbox.bootstrap.cluster_placement import choose_proof_method, create_kubernetes_engine
from sandbox.bootstrap.doctor import Finding, is_local_address
from sandbox.bootstrap.settings.schema import ClusterSection, ServerSettings
from sandbox.cluster_engines.kubernetes.engine import KubernetesEngine
from sandbox.interfaces.cluster_engine import EngineHost
from sandbox.model.manifest.schema import Vm

MANIFESTS = "packaging/kubernetes/sandbox.yaml"
"""The file with the objects that the engine needs."""

_NO_FINGERPRINT = "0" * 64
"""The checks create no Jobs, so they need no certificate."""


def check_kubernetes(settings: ServerSettings) -> list[Finding]:
    """Check what a server with these settings needs from Kubernetes.

    Raises EngineUnavailableError, ConfigurationError.
    """
    cluster = settings.cluster
    engine = create_kubernetes_engine(cluster.kubernetes, _NO_FINGERPRINT, os.environ)
    choose_proof_method(cluster, engine, _NO_FINGERPRINT)
    return [
        *asyncio.run(_check_api(engine, cluster)),
        _check_image(cluster.kubernetes.image or ""),
        _check_host(cluster),
    ]


async def _check_api(engine: KubernetesEngine, cluster: ClusterSection) -> Sequence[Finding]:
    namespace = cluster.kubernetes.namespace
    findings = [Finding("kubernetes", True, f"the API server responds: {await engine.version()}")]
    if permissions := await engine.missing_permissions():
        names = ", ".join(str(each) for each in permissions)
        message = f"the server may not {names}; permissions for jobs and pods are in the namespace {namespace}"
        return [*findings, Finding("kubernetes", False, message, f"kubectl apply -f {MANIFESTS}")]
    findings.append(Finding("kubernetes", True, "the server has all required permissions"))
    if missing := await engine.missing_objects():
        message = f"missing in Kubernetes: {', '.join(missing)}"
        return [*findings, Finding("kubernetes", False, message, f"kubectl apply -f {MANIFESTS}")]
    findings.append(Finding("kubernetes", True, f"the namespace {namespace} and the service account exist"))
    return [*findings, *_check_nodes(await engine.hosts())]


def _check_nodes(hosts: Sequence[EngineHost]) -> list[Finding]:
    usable = [host for host in hosts if not host.problem]
    problems = "; ".join(f"{host.name}: {host.problem}" for host in hosts if host.problem)
    remedy = "Check the nodes with: kubectl describe node NAME"
    if not usable:
        return [Finding("hosts", False, f"no node starts workers: {problems}", remedy)]
    names = ", ".join(host.name for host in usable)
    findings = [Finding("hosts", True, f"{len(usable)} of {len(hosts)} nodes start workers: {names}")]
    if problems:
        findings.append(Finding("hosts", False, f"these start no workers: {problems}", remedy, blocks_tasks=False))
    default = Vm()
    if not any(
        host.resources.cpus >= default.cpus and host.resources.memory_bytes >= default.memory_bytes for host in usable
    ):
        message = f"no node has {default.cpus} CPUs and the memory for a task without vm in its manifest"
        remedy = "Lower vm.cpus or vm.memory in manifests, or add larger nodes."
        findings.append(Finding("hosts", False, message, remedy, blocks_tasks=False))
    return findings


def _check_image(image: str) -> Finding:
    if "@sha256:" in image:
        return Finding("image", True, f"workers use {image}")
    message = f"{image} has no digest, so nodes may have different images"
    return Finding("image", False, message, "Set cluster.kubernetes.image to NAME@sha256:DIGEST.", blocks_tasks=False)


def _check_host(cluster: ClusterSection) -> Finding:
    if not is_local_address(cluster.host):
        return Finding("cluster", True, f"workers connect to {cluster.host}:{cluster.port}")
    message = f"workers in Pods cannot connect to {cluster.host}:{cluster.port}"
    return Finding("cluster", False, message, "Set cluster.host to an address of this server that Pods can reach.")
