"""Measures the latency that the gateway adds to a model request, and its memory: `python bench/gateway_latency.py`.

The model is a script on loopback that responds immediately. Prints the median and the 95th percentile of 100 small
requests, made directly and through the gateway, over persistent and new connections, with and without a persistent
upstream connection. Then prints the same for requests as large as those that Claude Code sends at the start of its work
(90 KB) and later (1 MB). The gateway parses and rewrites these requests, or forwards them unchanged if the rules allow
it.
"""

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

REQUESTS = 100
"""Two series stay below the burst of new connections to the model, after which the gateway delays them."""
SMALL = b'{"model":"claude-haiku-4-5","max_tokens":1,"messages":[]}'
RESPONSE = b'{"type":"message","model":"claude-haiku-4-5","usage":{"input_tokens":10,"output_tokens":5}}'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(RESPONSE)


async def main() -> None:
    """Run all measurements."""
    before = rss_kilobytes()
    import sandbox.gateway.server  # noqa: F401 - measured here

    print(f"importing the gateway (after asyncio and msgspec): {rss_kilobytes() - before} KiB")
    from doubles.scripted_upstream import scripted_upstream
    from doubles.served_gateway import served_gateway

    async def respond(_request: object, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + RESPONSE)

    async def respond_and_close(request: object, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + RESPONSE)
        await writer.drain()
        writer.close()

    from sandbox.interfaces.gateway import GatewayRules
    from sandbox.model.egress import EgressRules

    for script, label in ((respond, "upstream kept"), (respond_and_close, "upstream dialed each time")):
        async with scripted_upstream(script) as upstream, served_gateway(upstream.base_url) as served:
            if script is respond:
                print_result("direct, kept connection", await time_kept_connection(upstream.port, served.port))
            print_result("direct, new connection", await time_new_connections(upstream.port, served.port))
            print_result(f"gateway, kept connection, {label}", await time_kept_connection(served.port, served.port))
            print_result(f"gateway, new connection, {label}", await time_new_connections(served.port, served.port))

    for rules, label in ((GatewayRules(), "read"), (GatewayRules(egress=EgressRules(is_unrestricted=True)), "unread")):
        async with scripted_upstream(respond) as upstream, served_gateway(upstream.base_url, rules) as served:
            for messages in (20, 400):
                body = conversation(messages)
                kilobytes = f"{len(body) // 1000} KB"
                if label == "read":
                    print_result(f"direct, {kilobytes}", await time_kept_connection(upstream.port, served.port, body))
                print_result(
                    f"gateway, {kilobytes}, {label}", await time_kept_connection(served.port, served.port, body)
                )


def conversation(messages: int) -> bytes:
    """Create a request with `messages` messages of code and text."""
    line = "if (value[index] === other) { return {name: 'x', list: [1, 2, 3]}; } // as in the line above, and so on\n"
    tools = [{"name": f"Tool{n}", "description": line * 15, "input_schema": {"type": "object"}} for n in range(25)]
    result = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": line * 22}]}
    turns = [{"role": "user", "content": [result]}] * messages
    return json.dumps({"model": "claude-haiku-4-5", "max_tokens": 1, "tools": tools, "messages": turns}).encode()


async def time_kept_connection(port: int, host_port: int, body: bytes = SMALL) -> list[float]:
    """Return the duration of sequential requests on one connection, in milliseconds."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    times = [await timed(lambda: send(reader, writer, host_port, body)) for _ in range(REQUESTS)]
    writer.close()
    return times


async def time_new_connections(port: int, host_port: int) -> list[float]:
    """Return the duration of requests, each on a new connection, in milliseconds."""

    async def once() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await send(reader, writer, host_port)
        writer.close()

    return [await timed(once) for _ in range(REQUESTS)]


async def send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host_port: int, body: bytes = SMALL) -> None:
    """Send one request and read its response."""
    writer.write(
        b"POST /v1/messages?beta=true HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nx-api-key: task-key-of-this-task\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (host_port, len(body), body)
    )
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200 "):
        raise RuntimeError(head.decode())
    await reader.readexactly(len(RESPONSE))


async def timed(act: Callable[[], Awaitable[None]]) -> float:
    """Return the duration of `act` in milliseconds."""
    began = time.perf_counter()
    await act()
    return (time.perf_counter() - began) * 1000


def print_result(what: str, milliseconds: list[float]) -> None:
    """Print one line."""
    median, late = statistics.median(milliseconds), statistics.quantiles(milliseconds, n=20)[-1]
    print(f"{what:<60} median {median:6.3f} ms   95% {late:6.3f} ms")


def rss_kilobytes() -> int:
    """Return the resident memory of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1])


if __name__ == "__main__":
    import msgspec  # noqa: F401 - the runner has imported it anyway

    asyncio.run(main())
