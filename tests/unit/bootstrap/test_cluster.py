"""The certificate of a server for its workers, and what their environment contains."""

import hashlib
import ssl
import stat
from pathlib import Path

from sandbox.agents import registered_agents
from sandbox.bootstrap.cluster import create_certificate, worker_environment
from sandbox.bootstrap.local_host import AgentsAndRunnerCommand, PlacementContext
from sandbox.bootstrap.settings.load import load


def test_certificate_is_private_and_stays_the_same(tmp_path):
    path, fingerprint = create_certificate(tmp_path)
    content = path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert create_certificate(tmp_path) == (path, fingerprint)
    assert path.read_bytes() == content
    certificate = content.decode().partition("-----BEGIN PRIVATE KEY-----")[0]
    assert fingerprint == hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate)).hexdigest()
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(path)


def test_two_servers_have_different_certificates(tmp_path):
    directories = [tmp_path / name for name in ("a", "b")]
    for directory in directories:
        directory.mkdir()
    assert len({create_certificate(directory)[1] for directory in directories}) == 2


def test_environment_of_a_worker_has_no_keys():
    settings = load({"config": "/dev/null"}, {"SANDBOX_RUNTIME": "bubblewrap"}).settings
    context = PlacementContext(Path("/data"), Path("/run"), settings, AgentsAndRunnerCommand(registered_agents()), None)
    server = {"PATH": "/bin", "HOME": "/root", "ANTHROPIC_API_KEY": "k", "VAULT_TOKEN": "v", "SANDBOX_TOKEN": "t"}
    environment = worker_environment(context, server)
    assert environment["PATH"] == "/bin"
    assert environment["SANDBOX_RUNTIME"] == "bubblewrap"
    assert {"k", "v", "t"} & set(environment.values()) == set()
