"""`sandbox doctor` checks the access to Kubernetes, and its nodes."""

from contextlib import closing

import pytest

from doubles.kubernetes.api_server import KubernetesApi
from sandbox.bootstrap.doctor.cluster_checks import check_kubernetes
from sandbox.bootstrap.doctor.host_checks import run_checks
from sandbox.bootstrap.settings.load import ConfigurationError
from sandbox.bootstrap.settings.schema import ClusterSection, KubernetesSection, ServerSection, ServerSettings
from sandbox.interfaces.cluster_engine import EngineUnavailableError

IMAGE = "registry.example/sandbox@sha256:0123"


@pytest.fixture
def api(tmp_path):
    with closing(KubernetesApi(tmp_path / "kubernetes")) as api:
        api.cluster.add_node("n1", cpu="8", memory="16384Mi", disk="100Gi")
        yield api


@pytest.fixture
def make_settings(api, tmp_path):
    def make(host="192.0.2.1", host_key_file=None, **changes):
        fields = {"image": IMAGE, "server": api.url, "token_file": str(api.token_file), "ca_file": str(api.ca_file)}
        section = KubernetesSection(**(fields | changes))
        cluster = ClusterSection(engine="kubernetes", host=host, kubernetes=section, host_key_file=host_key_file)
        return ServerSettings(server=ServerSection(data_dir=tmp_path / "data"), cluster=cluster)

    return make


def problems(findings):
    return {finding.message: finding.blocks_tasks for finding in findings if not finding.ok}


def test_usable_cluster_has_no_problems(make_settings):
    findings = check_kubernetes(make_settings())
    assert problems(findings) == {}
    messages = [finding.message for finding in findings]
    assert "the API server responds: v1.32.0" in messages
    assert "1 of 1 nodes start workers: n1" in messages
    assert "workers connect to 192.0.2.1:8724" in messages


def test_missing_rights_are_listed_with_the_remedy(api, make_settings):
    api.denied |= {("patch", "pods"), ("list", "nodes")}
    findings = check_kubernetes(make_settings())
    [message] = problems(findings)
    assert message.startswith("the server may not patch pods, list nodes;")
    assert "kubectl apply -f packaging/kubernetes/sandbox.yaml" in [finding.remedy for finding in findings]


def test_missing_namespace_is_found(api, make_settings):
    api.namespaces.clear()
    [message] = problems(check_kubernetes(make_settings()))
    assert message == "missing in Kubernetes: namespace sandbox"


def test_nodes_that_start_no_workers_are_listed(api, make_settings):
    api.cluster.add_node("n2")
    api.cluster.nodes["n2"]["spec"]["unschedulable"] = True
    assert problems(check_kubernetes(make_settings())) == {
        "these start no workers: n2: The node is cordoned (kubectl cordon).": False
    }
    api.cluster.nodes["n1"]["spec"]["unschedulable"] = True
    [(message, blocks_tasks)] = problems(check_kubernetes(make_settings())).items()
    assert message.startswith("no node starts workers: n1: The node is cordoned")
    assert blocks_tasks


def test_small_nodes_and_images_without_a_digest_are_hints(api, make_settings):
    api.cluster.nodes.clear()
    api.cluster.add_node("n1", cpu="1")
    found = problems(check_kubernetes(make_settings(image="sandbox:1")))
    assert list(found.values()) == [False, False]
    assert any("no node has 4 CPUs" in message for message in found)
    assert "sandbox:1 has no digest, so nodes may have different images" in found


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "::1"])
def test_address_that_pods_cannot_reach_is_a_problem(make_settings, host):
    assert problems(check_kubernetes(make_settings(host=host))) == {
        f"workers in Pods cannot connect to {host}:8724": True
    }


def test_settings_that_cannot_work_are_errors(make_settings):
    with pytest.raises(ConfigurationError, match=r"kubernetes\.image is not set"):
        check_kubernetes(make_settings(image=None))
    with pytest.raises(ConfigurationError, match=r"Remove cluster\.host_key_file"):
        check_kubernetes(make_settings(host_key_file="/etc/key"))
    with pytest.raises(EngineUnavailableError, match="cannot be read"):
        check_kubernetes(make_settings(token_file="/nonexistent"))


@pytest.mark.usefixtures("without_runtime_checks")
def test_doctor_shows_why_kubernetes_cannot_be_used(api, make_settings):
    api.server_tokens.clear()
    [finding] = [finding for finding in run_checks(make_settings()) if finding.name == "kubernetes"]
    assert not finding.ok
    assert finding.blocks_tasks
    assert "rejects the token" in finding.message
