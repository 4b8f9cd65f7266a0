"""What the gateway adds to a model request, and what it costs in memory: `python bench/gateway_latency.py`.

The model is a script on loopback that answers at once. Printed: median and 95th percentile of 200 small requests,
made directly and through the gateway, over kept connections and over fresh ones, with and without a kept upstream;
then of requests as large as those of Claude Code at the beginning of its work (90 KB) and late (1 MB), which the
gateway reads and writes anew, and as they are where it need not.
"""

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

REQUESTS = 200
SMALL = b'{"model":"claude-haiku-4-5","max_tokens":1,"messages":[]}'
ANSWER = b'{"type":"message","model":"claude-haiku-4-5","usage":{"input_tokens":10,"output_tokens":5}}'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(ANSWER)


async def main() -> None:
    """Measure one thing after the other."""
    before = rss_kilobytes()
    import sandbox.gateway.server  # noqa: F401 - its cost is what is asked for

    print(f"importing the gateway (asyncio and msgspec before it): {rss_kilobytes() - before} KiB")
    from doubles.scripted_upstream import scripted_upstream
    from doubles.served_gateway import served_gateway

    async def answer(_request: object, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + ANSWER)

    async def answer_and_close(request: object, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + ANSWER)
        await writer.drain()
        writer.close()

    from sandbox.interfaces.gateway import GatewayRules
    from sandbox.model.egress import EgressRules

    for script, told in ((answer, "upstream kept"), (answer_and_close, "upstream dialled each time")):
        async with scripted_upstream(script) as upstream, served_gateway(upstream.base_url) as served:
            if script is answer:
                tell("direct, kept connection", await kept(upstream.port, served.port))
            tell("direct, fresh connection", await fresh(upstream.port, served.port))
            tell(f"gateway, kept connection, {told}", await kept(served.port, served.port))
            tell(f"gateway, fresh connection, {told}", await fresh(served.port, served.port))

    for rules, told in ((GatewayRules(), "read"), (GatewayRules(egress=EgressRules(is_unrestricted=True)), "unread")):
        async with scripted_upstream(answer) as upstream, served_gateway(upstream.base_url, rules) as served:
            for messages in (20, 400):
                body = conversation(messages)
                kilobytes = f"{len(body) // 1000} KB"
                if told == "read":
                    tell(f"direct, {kilobytes}", await kept(upstream.port, served.port, body))
                tell(f"gateway, {kilobytes}, {told}", await kept(served.port, served.port, body))


def conversation(messages: int) -> bytes:
    """A request with so many messages, of code as much as of text."""
    line = "if (value[index] === other) { return {name: 'x', list: [1, 2, 3]}; } // as it was said before, and so on\n"
    tools = [{"name": f"Tool{n}", "description": line * 15, "input_schema": {"type": "object"}} for n in range(25)]
    result = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": line * 22}]}
    turns = [{"role": "user", "content": [result]}] * messages
    return json.dumps({"model": "claude-haiku-4-5", "max_tokens": 1, "tools": tools, "messages": turns}).encode()


async def kept(port: int, host_port: int, body: bytes = SMALL) -> list[float]:
    """Milliseconds of requests one after the other on one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    times = [await timed(lambda: ask(reader, writer, host_port, body)) for _ in range(REQUESTS)]
    writer.close()
    return times


async def fresh(port: int, host_port: int) -> list[float]:
    """Milliseconds of requests on a connection each."""

    async def once() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await ask(reader, writer, host_port)
        writer.close()

    return [await timed(once) for _ in range(REQUESTS)]


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host_port: int, body: bytes = SMALL) -> None:
    """One request and its whole answer."""
    writer.write(
        b"POST /v1/messages?beta=true HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nx-api-key: task-key-of-this-task\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (host_port, len(body), body)
    )
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200 "):
        raise RuntimeError(head.decode())
    await reader.readexactly(len(ANSWER))


async def timed(act: Callable[[], Awaitable[None]]) -> float:
    """Milliseconds that it takes."""
    began = time.perf_counter()
    await act()
    return (time.perf_counter() - began) * 1000


def tell(what: str, milliseconds: list[float]) -> None:
    """One line."""
    median, late = statistics.median(milliseconds), statistics.quantiles(milliseconds, n=20)[-1]
    print(f"{what:<60} median {median:6.3f} ms   95% {late:6.3f} ms")


def rss_kilobytes() -> int:
    """Of this process, now."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1])


if __name__ == "__main__":
    import msgspec  # noqa: F401 - the runner has it already

    asyncio.run(main())
