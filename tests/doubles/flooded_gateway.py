"""A gateway that runs in a separate process, and resolves HOST to a loopback address.

Usage: `flooded_gateway.py MODEL_PORT HOST_PORT SPENT FACTOR`. SPENT seconds of its CPU budget count as used, and its
CPU time is multiplied by FACTOR. Prints a JSON line with its ports when it starts to serve, and another one with a
report when its standard input ends.
"""

import asyncio
import json
import sys
import time
from itertools import count
from pathlib import Path

from doubles.egress_host import HOST
from doubles.loopback_listeners import loopback_listeners
from doubles.served_gateway import GATEWAY_KEY, SERVER_KEY
from sandbox.agents.claude_code.messages_api.dialect import MessagesApi
from sandbox.gateway.egress import connection
from sandbox.gateway.server import SocketGatewayFactory
from sandbox.interfaces.gateway import GatewayRules, ModelUpstream
from sandbox.model.egress import EgressRule, EgressRules
from sandbox.primitives.runner_cpu_throttle import CpuThrottle

MODEL_ADDRESS = "127.0.0.9"


async def main() -> None:
    model_port, host_port = map(int, sys.argv[1:3])
    throttle = throttle_with_debt(*map(float, sys.argv[3:]))
    connection._resolve = lambda host, **_: {MODEL_ADDRESS if host == MODEL_ADDRESS else "127.0.0.1"}
    upstream = ModelUpstream(f"http://{MODEL_ADDRESS}:{model_port}", api_key=SERVER_KEY)
    rules = GatewayRules(egress=EgressRules((EgressRule(HOST, (80, 443, host_port)),), has_outbound_mode=True))
    events: list[str] = []
    with loopback_listeners() as listeners:
        gateway = SocketGatewayFactory(MessagesApi(), address_policy=lambda _: True, throttle=throttle).create(
            upstream, GATEWAY_KEY, lambda event: events.append(type(event).__name__), rules
        )
        serving = asyncio.ensure_future(gateway.serve(listeners))
        ports = {
            "model": listeners.model.getsockname()[1],
            "proxy": listeners.proxy.getsockname()[1],
            "dns_udp": listeners.dns_udp.getsockname()[1],
            "dns_tcp": listeners.dns_tcp.getsockname()[1],
            "transparent_80": listeners.transparent[80].getsockname()[1],
            "transparent_443": listeners.transparent[443].getsockname()[1],
            "host": host_port,
        }
        print(json.dumps(ports), flush=True)
        await asyncio.to_thread(sys.stdin.read)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        summary = {"events": len(events), "denials": gateway.denied_count, "peak_memory_bytes": peak_memory_bytes()}
        print(json.dumps(summary), flush=True)


def peak_memory_bytes() -> int:
    """Return the peak memory of this program. (`ru_maxrss` would include the memory of the process before exec.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def throttle_with_debt(spent_seconds: float, cpu_time_factor: float) -> CpuThrottle:
    reads = count()
    return CpuThrottle(
        cpu_seconds=lambda: cpu_time_factor * time.process_time() + (spent_seconds if next(reads) else 0.0)
    )


if __name__ == "__main__":
    asyncio.run(main())
