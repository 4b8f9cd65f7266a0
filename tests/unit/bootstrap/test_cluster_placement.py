"""A server's certificate and engine, and the command and environment of its workers."""

import base64
import hashlib
import socket
import ssl
import stat
import sys
from pathlib import Path

import pytest

from sandbox.agents import registered_agents
from sandbox.bootstrap.cluster_placement import (
    KUBERNETES_WORKER_COMMAND,
    choose_proof_method,
    create_engine,
    create_kubernetes_engine,
    find_clone_credentials,
    load_cluster_key,
    load_or_create_certificate,
    slurm_settings,
    worker_command,
    worker_environment,
)
from sandbox.bootstrap.local_host import AgentsAndCommands, PlacementContext
from sandbox.bootstrap.secret_sources import ClusterKeyError
from sandbox.bootstrap.settings.load import ConfigurationError, load
from sandbox.bootstrap.worker import (
    WorkerUnusableError,
    choose_data_dir,
    host_name,
    read_identity_token,
    take_join_token,
)
from sandbox.cluster_engines.kubernetes.engine import KubernetesEngine
from sandbox.cluster_engines.kubernetes.worker_job import WorkerPodSettings
from sandbox.cluster_engines.slurm.commands import SlurmSettings
from sandbox.cluster_engines.slurm.engine import SlurmEngine
from sandbox.interfaces.worker_messages import NO_JOIN_TOKEN
from sandbox.interfaces.workspace import CredentialQuery, NoCredentialsError


def test_certificate_is_private_and_stays_the_same(tmp_path):
    path, fingerprint = load_or_create_certificate(tmp_path)
    content = path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_or_create_certificate(tmp_path) == (path, fingerprint)
    assert path.read_bytes() == content
    certificate = content.decode().partition("-----BEGIN PRIVATE KEY-----")[0]
    assert fingerprint == hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate)).hexdigest()
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(path)


def test_two_servers_have_different_certificates(tmp_path):
    directories = [tmp_path / name for name in ("a", "b")]
    for directory in directories:
        directory.mkdir()
    assert len({load_or_create_certificate(directory)[1] for directory in directories}) == 2


def make_context(**variables):
    variables = {f"SANDBOX_{name}": value for name, value in variables.items()}
    settings = load({"config": "/dev/null"}, {"SANDBOX_RUNTIME": "bubblewrap", **variables}).settings
    return PlacementContext(Path("/data"), Path("/run"), settings, AgentsAndCommands(registered_agents()), None)


def test_worker_on_another_host_gets_no_paths_of_the_server():
    context = make_context(CLUSTER_ENGINE="slurm")
    server = {"HOME": "/home/ci", "XDG_RUNTIME_DIR": "/run/user/7", "SSL_CERT_FILE": "/data/ca.pem", "VAULT_TOKEN": "v"}
    environment = worker_environment(context, server)
    assert environment["HOME"] == "/home/ci"
    assert environment["SANDBOX_DATA_DIR"] == "/var/lib/sandbox-worker"
    assert not {"XDG_RUNTIME_DIR", "SSL_CERT_FILE", "VAULT_TOKEN"} & set(environment)


def test_slurm_settings_reach_the_engine():
    variables = {"PARTITION": "long", "ACCOUNT": "ai", "OPTIONS": "--exclusive,--nice=5", "COMMANDS": "/opt/bin"}
    context = make_context(
        CLUSTER_ENGINE="slurm", **{f"CLUSTER_SLURM_{name}": each for name, each in variables.items()}
    )
    expected = SlurmSettings("long", "ai", ("--exclusive", "--nice=5"), "/opt/bin")
    assert slurm_settings(context.settings.cluster.slurm) == expected
    assert isinstance(create_engine(context, Path("/data/cluster"), "ab" * 32), SlurmEngine)


def write_key(path, key=bytes(range(32))):
    path.write_bytes(base64.b64encode(key) + b"\n")
    path.chmod(0o600)
    return key


def test_workers_get_the_path_of_the_key_but_not_the_key(tmp_path, caplog):
    path = tmp_path / "host.key"
    key = write_key(path)
    context = make_context(CLUSTER_ENGINE="slurm", CLUSTER_HOST_KEY_FILE=str(path))
    environment = worker_environment(context, {})
    assert environment["SANDBOX_CLUSTER_HOST_KEY_FILE"] == str(path)
    settings = load({"config": "/dev/null"}, environment).settings
    assert settings.cluster.host_key_path == path
    assert load_cluster_key(context.settings.cluster, "ab" * 32) == (key, "ab" * 32)
    assert str(key) not in repr(load_cluster_key(context.settings.cluster, "ab" * 32))
    assert caplog.messages == []


@pytest.mark.parametrize(("engine", "warnings"), [("slurm", 1), ("processes", 0)])
def test_server_warns_if_workers_on_other_hosts_need_no_proof(caplog, engine, warnings):
    context = make_context(CLUSTER_ENGINE=engine)
    assert load_cluster_key(context.settings.cluster, "ab" * 32) is None
    warning = "Workers do not prove that they run on a host of the cluster"
    assert [message.partition(":")[0] for message in caplog.messages] == [warning] * warnings
    assert "SANDBOX_CLUSTER_HOST_KEY_FILE" not in worker_environment(context, {})


def test_server_does_not_start_if_the_configured_key_is_missing(tmp_path):
    context = make_context(CLUSTER_ENGINE="slurm", CLUSTER_HOST_KEY_FILE=str(tmp_path / "missing"))
    with pytest.raises(ClusterKeyError, match="cannot be read: No such file"):
        load_cluster_key(context.settings.cluster, "ab" * 32)


def test_worker_command_runs_the_configured_program():
    section = make_context(CLUSTER_ENGINE="slurm", CLUSTER_SLURM_SANDBOX="/opt/sandbox/bin/sandbox").settings.cluster
    assert worker_command(section) == ("/opt/sandbox/bin/sandbox", "worker")
    assert worker_command(make_context().settings.cluster)[0] == sys.executable


def test_slurm_hosts_use_different_directories():
    assert host_name({}) == socket.gethostname()
    assert choose_data_dir(Path("/data"), {}) == Path("/data")
    assert host_name({"SLURMD_NODENAME": "n1"}) == "n1"
    assert choose_data_dir(Path("/data"), {"SLURMD_NODENAME": "n1"}) == Path("/data/n1")
    for name in ("..", "a/b", "/etc"):
        with pytest.raises(WorkerUnusableError):
            choose_data_dir(Path("/data"), {"SLURMD_NODENAME": name})


KUBERNETES = {"CLUSTER_ENGINE": "kubernetes", "CLUSTER_KUBERNETES_IMAGE": "sandbox:1"}


def test_kubernetes_settings_reach_the_engine():
    variables = {"NAMESPACE": "agents", "SERVER": "https://192.0.2.9", "NODE_SELECTOR": "a=b,c=", "TOLERATIONS": "t"}
    context = make_context(**KUBERNETES, **{f"CLUSTER_KUBERNETES_{name}": each for name, each in variables.items()})
    engine = create_engine(context, Path("/data/cluster"), "ab" * 32)
    assert isinstance(engine, KubernetesEngine)
    expected = WorkerPodSettings(
        "sandbox:1", "sandbox-worker", {"a": "b", "c": ""}, ("t",), "ab" * 20, f"sandbox-{'ab' * 32}"
    )
    assert engine._settings == expected
    assert engine._api._address.server == "https://192.0.2.9"


@pytest.mark.parametrize(
    ("variables", "server"),
    [
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "6443"}, "https://10.0.0.1:6443"),
        ({"KUBERNETES_SERVICE_HOST": "fd00::1"}, "https://[fd00::1]:443"),
    ],
)
def test_server_in_a_pod_finds_the_api_server(variables, server):
    section = make_context(**KUBERNETES).settings.cluster.kubernetes
    assert create_kubernetes_engine(section, "ab" * 32, variables)._api._address.server == server


def test_incomplete_kubernetes_settings_are_errors(monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigurationError, match="does not run in a Pod"):
        create_engine(make_context(**KUBERNETES), Path("/data/cluster"), "ab" * 32)
    with pytest.raises(ConfigurationError, match=r"cluster\.kubernetes\.image is not set"):
        create_engine(make_context(CLUSTER_ENGINE="kubernetes"), Path("/data/cluster"), "ab" * 32)


def test_kubernetes_engine_is_the_proof_method(tmp_path):
    server = {"CLUSTER_KUBERNETES_SERVER": "https://192.0.2.9"}
    context = make_context(**KUBERNETES, **server)
    engine = create_engine(context, tmp_path, "ab" * 32)
    assert choose_proof_method(context.settings.cluster, engine, "ab" * 32) is engine
    section = make_context(**KUBERNETES, **server, CLUSTER_HOST_KEY_FILE="/etc/key").settings.cluster
    with pytest.raises(ConfigurationError, match=r"Remove cluster\.host_key_file"):
        choose_proof_method(section, engine, "ab" * 32)


def test_worker_in_a_pod_gets_nothing_from_the_environment_of_the_server():
    context = make_context(**KUBERNETES)
    environment = worker_environment(context, {"HOME": "/root", "PATH": "/opt/bin", "VAULT_TOKEN": "v"})
    assert not {"HOME", "PATH", "VAULT_TOKEN"} & set(environment)
    assert environment["SANDBOX_DATA_DIR"] == "/var/lib/sandbox-worker"
    assert worker_command(context.settings.cluster) == KUBERNETES_WORKER_COMMAND


def test_worker_in_a_pod_has_no_join_token(tmp_path):
    assert host_name({"SANDBOX_HOST_NAME": "n1"}) == "n1"
    assert take_join_token({"SANDBOX_IDENTITY_FILE": "/x"}) == NO_JOIN_TOKEN
    environment = {"SANDBOX_JOIN_TOKEN": "ab" * 32}
    assert take_join_token(environment) == bytes.fromhex("ab" * 32)
    assert environment == {}
    for token in ("", "ab", "x" * 64):
        with pytest.raises(WorkerUnusableError):
            take_join_token({"SANDBOX_JOIN_TOKEN": token})


def test_identity_token_is_read_from_the_file(tmp_path):
    path = tmp_path / "token"
    path.write_text("a.b-_.c\n")
    assert read_identity_token(path) == "a.b-_.c"
    for content in (b"", b"a.b", b"a.b.c d", b"\xff.b.c", b"a.b." + b"c" * 7000):
        path.write_bytes(content)
        with pytest.raises(WorkerUnusableError, match="no identity token"):
            read_identity_token(path)


def test_environment_of_a_worker_has_no_keys():
    context = make_context()
    server = {"PATH": "/bin", "HOME": "/root", "ANTHROPIC_API_KEY": "k", "VAULT_TOKEN": "v", "SANDBOX_TOKEN": "t"}
    environment = worker_environment(context, server)
    assert environment["PATH"] == "/bin"
    assert environment["SANDBOX_RUNTIME"] == "bubblewrap"
    assert {"k", "v", "t"} & set(environment.values()) == set()


@pytest.mark.parametrize("url", ["https://git.example/demo.git", "https://six.example/demo.git"])
def test_failed_credential_lookup_reveals_no_configured_url(url, tmp_path, monkeypatch, caplog):
    """A configured URL can contain a password. The first URL here is invalid because of its last character."""
    config = tmp_path / "config"
    config.write_text(
        '[url "https://me:let-me-in@git.example\N{ACCOUNT OF}/"]\n\tinsteadOf = https://git.example/\n'
        '[url "https://me:let-me-in@[::1/"]\n\tinsteadOf = https://six.example/\n'
    )
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    with pytest.raises(NoCredentialsError, match="cannot use its git configuration") as caught:
        find_clone_credentials(url, CredentialQuery("https", "git.example"))
    assert "let-me-in" not in f"{caught.value}{caplog.text}"
    assert "a URL is not valid" in caplog.text
