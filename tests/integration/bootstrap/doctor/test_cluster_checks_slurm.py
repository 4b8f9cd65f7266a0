"""`sandbox doctor` checks the server's machine and the hosts of a Slurm cluster."""

import base64
import contextlib
import socket
import ssl
import threading
from dataclasses import replace

import pytest

from doubles.image_archives import minimal_root, oci_archive
from sandbox.bootstrap.cluster_placement import load_or_create_certificate
from sandbox.bootstrap.doctor.cluster_checks import check_server_address, check_slurm, check_worker_host
from sandbox.bootstrap.doctor.host_checks import run_checks
from sandbox.bootstrap.settings.schema import ClusterSection, ServerSection, ServerSettings, SlurmSection
from sandbox.images.image_builder import import_image
from sandbox.images.image_store import ImageStore
from sandbox.placements.cluster.hosts import SeenHost, SeenHosts

pytestmark = pytest.mark.usefixtures("without_runtime_checks")

TWO_HOSTS = "n1|idle|4|8000|all*|none\nn2|down*|4|8000|all*|Not responding\nn1|idle|4|8000|small|none\n"
CONFIGURATION = """\
KillWait                = 30 sec
ProctrackType           = proctrack/linuxproc
TaskPlugin              = task/affinity

Cgroup Support Configuration:
CgroupPlugin            = disabled
"""


class FakeSlurm:
    """Scripts that replace Slurm's commands."""

    def __init__(self, directory):
        self.directory = directory
        for name in ("sbatch", "squeue", "scancel"):
            self.define(name, "slurm-wlm 24.11.5")
        self.define("sinfo", TWO_HOSTS)
        self.define("scontrol", CONFIGURATION)

    def define(self, name, output, code=0):
        path = self.directory / name
        (self.directory / f"{name}.output").write_text(output)
        stream = "" if code == 0 else " >&2"
        path.write_text(f"#!/bin/sh\n/usr/bin/cat {path}.output{stream}\nexit {code}\n")
        path.chmod(0o755)

    def settings(self, host="192.0.2.1", **slurm):
        section = SlurmSection(commands=str(self.directory), data_dir=str(self.directory / "worker"), **slurm)
        cluster = ClusterSection(engine="slurm", host=host, slurm=section)
        return ServerSettings(server=ServerSection(data_dir=self.directory / "data"), cluster=cluster)


@pytest.fixture
def slurm(tmp_path):
    return FakeSlurm(tmp_path)


def problems(findings):
    return [finding for finding in findings if not finding.ok]


def test_usable_cluster_has_only_hints(slurm):
    findings = check_slurm(slurm.settings())
    assert not any(finding.blocks_tasks for finding in problems(findings))
    messages = [finding.message for finding in findings]
    assert any(message.startswith("slurm-wlm 24.11.5; the user ") for message in messages)
    assert "1 of 2 hosts in the default partition are available: n1" in messages
    assert "unavailable hosts: n2 (down*, Not responding)" in messages
    tested = "ProctrackType=proctrack/linuxproc, TaskPlugin=task/affinity, CgroupPlugin=disabled; if Slurm kills"
    assert any(message.startswith(tested) for message in messages)
    assert "workers connect to 192.0.2.1:8724" in messages


def test_hosts_of_the_selected_partition_are_checked(slurm):
    slurm.define("sinfo", "n1|idle|4|8000|small|none\n")
    messages = [finding.message for finding in check_slurm(slurm.settings(partition="small"))]
    assert "1 of 1 hosts in the partition small are available: n1" in messages


@pytest.mark.parametrize(
    "state", ["idle", "mixed", "mixed-", "planned", "allocated", "allocated+", "completing", "idle~", "idle#", "idle-~"]
)
def test_host_in_a_healthy_state_is_usable(slurm, state):
    """The suffix of a state stands for completing jobs, a reservation by the backfill scheduler, or power saving."""
    slurm.define("sinfo", f"n1|{state}|16|64000|all*|none\n")
    assert [finding.message for finding in problems(check_slurm(slurm.settings()))] == []


@pytest.mark.parametrize("state", ["idle*", "idle-*", "idle$", "idle@", "down", "down~", "drained", "inval"])
def test_cluster_without_a_usable_host_cannot_run_tasks(slurm, state):
    slurm.define("sinfo", f"n1|{state}|4|8000|all*|none\n")
    (problem,) = [finding for finding in problems(check_slurm(slurm.settings())) if finding.blocks_tasks]
    assert problem.message == f"no host in the default partition is available: n1 ({state})"


def test_hosts_that_are_too_small_are_reported(slurm):
    slurm.define("sinfo", "n1|idle|2|8000|all*|none\n")
    assert any("no host has 4 CPUs" in finding.message for finding in problems(check_slurm(slurm.settings())))


@pytest.mark.parametrize(
    ("name", "output", "code", "message"),
    [
        ("sinfo", "Unable to contact slurm controller", 1, "sinfo fails: Unable to contact slurm controller; start"),
        ("scontrol", "", 1, "scontrol fails: exit code 1; start"),
        ("sinfo", "something else", 0, "sinfo printed output in an unknown format: something else"),
    ],
)
def test_failing_command_is_reported(slurm, name, output, code, message):
    slurm.define(name, output, code)
    (finding,) = [one for one in run_checks(slurm.settings()) if one.name == "slurm"]
    assert (finding.ok, finding.blocks_tasks) == (False, True)
    assert finding.message.startswith(message)


def test_missing_command_is_reported(slurm):
    (slurm.directory / "scancel").unlink()
    (finding,) = [one for one in run_checks(slurm.settings()) if one.name == "slurm"]
    assert "scancel is not in" in finding.message
    assert "cluster.slurm.commands" in finding.message


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "0.0.0.0", "::"])
def test_address_that_other_hosts_cannot_reach_is_reported(slurm, host):
    assert any(f"cannot connect to {host}:8724" in one.message for one in problems(check_slurm(slurm.settings(host))))


def test_loopback_address_suffices_for_one_machine(slurm):
    slurm.define("sinfo", f"{socket.gethostname().partition('.')[0]}|idle|4|8000|all*|none\n")
    findings = check_slurm(slurm.settings("127.0.0.1"))
    assert any(one.ok and one.message == "workers connect to 127.0.0.1:8724" for one in findings)


def test_configuration_without_control_groups_and_plugins_is_described(slurm):
    """The output of Slurm 24.11 with `CgroupPlugin=disabled`."""
    slurm.define("scontrol", "ProctrackType           = proctrack/linuxproc\nTaskPlugin              = (null)\n")
    messages = [finding.message for finding in check_slurm(slurm.settings())]
    described = "ProctrackType=proctrack/linuxproc, TaskPlugin=none, CgroupPlugin=disabled"
    assert any(message.startswith(described) for message in messages)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("KillWait = 5 sec", "KillWait=5 s is too short"),
        ("ProctrackType = proctrack/cgroup", "has not been tested with Slurm's cgroup plugins"),
        ("ProctrackType = proctrack/pgid", "has not been tested with proctrack/pgid"),
        ("TaskPlugin = task/cgroup,task/affinity", "has not been tested with Slurm's cgroup plugins"),
    ],
)
def test_unsuitable_configuration_is_a_hint(slurm, line, message):
    slurm.define("scontrol", f"{CONFIGURATION}{line}\n")
    (problem,) = [one for one in problems(check_slurm(slurm.settings())) if message in one.message]
    assert not problem.blocks_tasks
    assert "slurm.conf" in problem.remedy


def test_recommended_configuration_has_no_hints(slurm):
    slurm.define("sinfo", "n1|idle|16|64000|all*|none\n")
    assert problems(check_slurm(slurm.settings())) == []


def test_key_of_the_hosts_is_read(slurm, worker_server):
    path, settings = slurm.directory / "host.key", slurm.settings()
    settings = replace(settings, cluster=replace(settings.cluster, host_key_file=str(path)))
    server = f"127.0.0.1:{worker_server[0]}"

    def keys():
        findings = [*check_slurm(settings), *check_worker_host(settings, server)]
        return [(one.ok, one.blocks_tasks) for one in findings if one.name == "host key"]

    assert keys() == [(False, True), (False, True)]
    path.write_bytes(base64.b64encode(b"k" * 32))
    path.chmod(0o600)
    assert keys() == [(True, True), (True, True)]


def test_slurm_is_not_checked_for_other_engines(slurm):
    settings = ServerSettings(server=ServerSection(data_dir=slurm.directory / "data"))
    assert check_slurm(settings) == []


@pytest.fixture
def worker_server(tmp_path):
    """A TLS server with a certificate for workers: its port, and the fingerprint."""
    certificate, fingerprint = load_or_create_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept():
            connection, _ = listening.accept()
            # The client closes the connection as soon as it has the certificate.
            with connection, contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True) as tls:
                tls.recv(1)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield listening.getsockname()[1], fingerprint
        thread.join(10)


def test_host_reports_the_certificate_of_its_server(slurm, worker_server):
    port, fingerprint = worker_server
    findings = check_worker_host(slurm.settings(), f"127.0.0.1:{port}")
    assert findings[0].ok
    assert findings[0].message == f"127.0.0.1:{port} responds; its certificate has the fingerprint {fingerprint}"
    assert not any(finding.blocks_tasks for finding in problems(findings))


def test_server_that_does_not_respond_is_reported():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    finding = check_server_address("127.0.0.1", port)
    assert (finding.ok, finding.blocks_tasks) == (False, True)
    assert f"127.0.0.1:{port} does not accept workers: " in finding.message


@pytest.mark.parametrize("address", ["", "a b", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536", "::1"])
def test_invalid_address_is_reported(address):
    finding = check_server_address(address, 8724)
    assert not finding.ok
    assert "is not HOST or HOST:PORT" in finding.message


def test_host_checks_the_directory_of_its_workers_and_needs_no_model_key(slurm, monkeypatch, worker_server):
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    findings = run_checks(slurm.settings(), f"127.0.0.1:{worker_server[0]}")
    assert not any(finding.name == "model" for finding in findings)
    (directory,) = [finding for finding in findings if finding.name == "data directory"]
    assert str(slurm.directory / "worker") in directory.message


def add_host(slurm, name, packages):
    directory = slurm.directory / "data" / "cluster"
    directory.mkdir(parents=True, exist_ok=True)
    seen = SeenHosts(directory / "hosts.json")
    seen.add(SeenHost(name, 1.0, packages_digest=packages))
    seen.save()


def package_problems(slurm):
    return [one for one in problems(check_slurm(slurm.settings())) if "packages" in one.message]


def test_hosts_with_different_packages_are_reported_unless_all_profiles_have_images(slurm, tmp_path):
    add_host(slurm, "n1", "sha256:1")
    add_host(slurm, "n2", "sha256:1")
    add_host(slurm, "removed", "sha256:2")
    assert package_problems(slurm) == []
    add_host(slurm, "n2", "sha256:2")
    [finding] = package_problems(slurm)
    expected = "the hosts have different packages (n1; n2), and agentic-dev, basic use the host's own /usr"
    assert (finding.message, finding.blocks_tasks) == (expected, False)
    assert finding.remedy == "Build the images here, for example: sandbox profile build agentic-dev"
    archive = oci_archive(tmp_path / "image.tar", minimal_root(is_truncated=True))
    for name in ("agentic-dev", "basic"):
        import_image(ImageStore(slurm.directory / "data", name), archive)
    assert package_problems(slurm) == []


def test_host_that_did_not_report_its_packages_is_not_compared(slurm):
    add_host(slurm, "n1", "sha256:1")
    add_host(slurm, "n2", "")
    assert package_problems(slurm) == []
