"""A gateway with a fake remote host: a table resolves its name, and a handler serves its connections on loopback."""

import asyncio
import socket
from contextlib import asynccontextmanager, suppress

from doubles.served_gateway import served_gateway
from sandbox.gateway.egress import connection
from sandbox.gateway.tcp_connections import Stream
from sandbox.interfaces.gateway import GatewayRules
from sandbox.model.egress import EgressRule, EgressRules

HOST = "files.example.org"
RULES = GatewayRules(egress=EgressRules((EgressRule(HOST),)))
MODEL = "http://127.0.0.9:9"


def client_hello(name: str, *, has_ech: bool = False, extra_extensions: bytes = b"") -> bytes:
    """Return a minimal ClientHello.

    has_ech: whether to include an encrypted inner ClientHello. extra_extensions: extensions to append.
    """
    names = b"\0" + len(name).to_bytes(2) + name.encode()
    extension = b"\0\0" + (len(names) + 2).to_bytes(2) + len(names).to_bytes(2) + names
    extension += b"\xfe\x0d\0\4\0\1\2\3" if has_ech else b""
    extension += extra_extensions
    body = b"\3\3" + bytes(32) + b"\0" + b"\0\2\x13\1" + b"\1\0" + len(extension).to_bytes(2) + extension
    message = b"\1" + len(body).to_bytes(3) + body
    return b"\x16\3\1" + len(message).to_bytes(2) + message


@asynccontextmanager
async def gateway_with_egress_host(handler, monkeypatch, addresses=("8.8.4.4",), names=None, rules=RULES, model=MODEL):
    """Yield a gateway that resolves HOST to `addresses`, and other names according to `names`.

    handler: serves the connections to the host.
    """
    writers, tasks = [], set()

    async def run_handler(reader, writer):
        writers.append(writer)
        tasks.add(asyncio.current_task())
        with suppress(ConnectionError):
            await handler(reader, writer)

    server = await asyncio.start_server(run_handler, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]

    addresses_by_name = {HOST: addresses, **(names or {})}

    def resolve(host, *_, **__):
        addresses_found = addresses_by_name.get(host.removesuffix("."), ())
        if not addresses_found:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, 0)) for address in addresses_found]

    dialed_addresses = []

    async def connect(_connections, host, _, allowed):
        dialed_addresses.extend(map(str, allowed))
        return Stream(*await asyncio.open_connection("127.0.0.1", port))

    monkeypatch.setattr(connection.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(connection, "_connect", connect)
    async with served_gateway(model, rules) as served:
        served.dialed_addresses, served.addresses_by_name = dialed_addresses, addresses_by_name
        try:
            yield served
        finally:
            server.close()
            for writer in writers:
                writer.transport.abort()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def tunnel(served, first=b"", host=HOST, port=443):
    client = await served.connect(served.listeners.proxy.getsockname()[1])
    client.writer.write(f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode() + first)
    return client
