"""The search domains of the server's machine do not apply to allowed hosts, whereas its /etc/hosts does.

Otherwise, an allowed name that does not exist would lead to a host in a search domain. A DNS server runs with
`resolv.conf` and `hosts` in separate namespaces. Its zones contain only `model`, `real` and every name in the search
domain `corp.example.net`.
"""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = r"""
import asyncio, json, socket, threading
import dns.message, dns.rrset
from sandbox.gateway.egress.connection import AddressDeniedError, EgressHostUnreachableError, PublicDialer
from sandbox.gateway.egress.policy import is_global
from sandbox.gateway.tcp_connections import OutboundConnections

NAMES = {"real.example.org.": "8.8.4.4", "pinned.example.org.": "8.8.4.7", "model.corp.example.net.": "8.8.4.6"}
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.1", 53))

def serve():
    while True:
        query, client = server.recvfrom(4096)
        response = dns.message.make_response(dns.message.from_wire(query))
        question = response.question[0]
        name = question.name.to_text().lower()
        address = NAMES.get(name, "8.8.4.9" if name.endswith(".corp.example.net.") else None)
        if address is None:
            response.set_rcode(3)
        elif question.rdtype == 1:
            response.answer.append(dns.rrset.from_text(question.name, 0, "IN", "A", address))
        server.sendto(response.to_wire(), client)

threading.Thread(target=serve, daemon=True).start()

class Connections(OutboundConnections):
    async def open(self, host, port, **_):
        raise ConnectionRefusedError(dialed.append(host))

dialed, found = [], {}

async def main():
    hosts = ("real", "absent", "pinned", "alias", "also-the-model")
    for name in (*(f"{host}.example.org" for host in hosts), "real.example.org.", "model.corp.example.net"):
        dialed.clear()
        try:
            await PublicDialer("model", is_global, set(), Connections()).dial(name, 443)
        except (AddressDeniedError, EgressHostUnreachableError) as error:
            found[name] = dialed[0] if dialed else str(error)
    print(json.dumps(found))

asyncio.run(main())
"""
HOSTS = """\
127.0.0.1 localhost
not-an-address pinned.example.org
9.9.9.9 Pinned.example.org alias.example.org # other.example.org
8.8.4.6 also-the-model.example.org
"""
RESOLVER = "search corp.example.net\nnameserver 127.0.0.1\noptions timeout:2 attempts:2\n"


@pytest.fixture(scope="module")
def dialed_addresses(tmp_path_factory):
    """The address that is dialed for each name, or why none is dialed."""
    directory = tmp_path_factory.mktemp("resolver")
    mounts = []
    for name, text in (("hosts", HOSTS), ("resolv.conf", RESOLVER)):
        (directory / name).write_text(text)
        mounts.append(f"mount --bind {directory / name} /etc/{name}")
    script = " && ".join((*mounts, "ip link set lo up", 'exec "$@"'))
    unshare = ["unshare", "--net", "--mount", *(["--user", "--map-root-user"] if os.geteuid() else [])]
    command = [*unshare, "sh", "-c", script, "sh", sys.executable, "-c", PROGRAM]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_name_that_does_not_exist_is_not_searched_in_other_domains(dialed_addresses):
    assert dialed_addresses["absent.example.org"] == "absent.example.org does not resolve."


def test_names_that_exist_are_resolved(dialed_addresses):
    assert dialed_addresses["real.example.org"] == dialed_addresses["real.example.org."] == "8.8.4.4"


def test_hosts_file_takes_precedence(dialed_addresses):
    assert dialed_addresses["pinned.example.org"] == dialed_addresses["alias.example.org"] == "9.9.9.9"


def test_name_of_the_model_may_be_in_a_search_domain(dialed_addresses):
    """The operator chooses the name of the model's host."""
    for name in ("also-the-model.example.org", "model.corp.example.net"):
        assert "is the model's" in dialed_addresses[name]
