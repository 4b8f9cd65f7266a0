"""A gateway in a separate process: `gateway_process.py DESCRIPTORS RULES`.

DESCRIPTORS: comma-separated listeners for the model, the proxy, DNS over UDP and DNS over TCP, then pairs
PORT=DESCRIPTOR. RULES: JSON. Prints a line before it starts to serve.
"""

import asyncio
import socket
import sys

import msgspec

from sandbox.agents.claude_code.messages_api.dialect import MessagesApi
from sandbox.gateway.server import SocketGatewayFactory
from sandbox.interfaces.gateway import GatewayRules, ModelUpstream
from sandbox.interfaces.runtime import Listeners


async def main() -> None:
    model, proxy, dns_udp, dns_tcp, *pairs = sys.argv[1].split(",")
    transparent = {int(port): adopt(number) for port, _, number in (pair.partition("=") for pair in pairs)}
    listeners = Listeners(adopt(model), adopt(proxy), adopt(dns_udp), adopt(dns_tcp), transparent)
    rules = msgspec.json.decode(sys.argv[2], type=GatewayRules)
    upstream = ModelUpstream("http://127.0.0.1:9", api_key="sk-the-servers-own")
    gateway = SocketGatewayFactory(MessagesApi()).create(upstream, "task-key-of-this-task", lambda _: None, rules)
    print("serves", flush=True)
    await gateway.serve(listeners)


def adopt(number: str) -> socket.socket:
    return socket.socket(fileno=int(number))


if __name__ == "__main__":
    asyncio.run(main())
