"""Floods the gateway from a sandbox: `floods.py NAME PORTS`, with PORTS as JSON.

A flood runs in several processes of one process group until they are killed. This program uses only the standard
library, so it can run in a sandbox.
"""

import contextlib
import json
import os
import select
import socket
import struct
import sys
import threading

HOST = "files.example.org"
GATEWAY_KEY = "task-key-of-this-task"
PORTS: dict[str, int] = {}
PROCESSES, CONNECTIONS = 3, 8


def query(name: str) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return b"\xab\xcd\x01\0\0\x01" + bytes(6) + labels + b"\0\0\x01\0\x01"


def hello(name: str) -> bytes:
    names = b"\0" + len(name).to_bytes(2, "big") + name.encode()
    extension = b"\0\0" + (len(names) + 2).to_bytes(2, "big") + len(names).to_bytes(2, "big") + names
    extension = extension if name else b""
    body = b"\3\3" + bytes(32) + b"\0\0\2\x13\1\1\0" + len(extension).to_bytes(2, "big") + extension
    message = b"\1" + len(body).to_bytes(3, "big") + body
    return b"\x16\3\1" + len(message).to_bytes(2, "big") + message


def request(key: str, body: bytes, length: int | None = None, path: str = "/v1/messages") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{PORTS['model']}\r\nX-Api-Key: {key}\r\n"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


def connect(port: str) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", PORTS[port]), 60)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def datagrams(message: bytes) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect(("127.0.0.1", PORTS["dns_udp"]))
        sender.setblocking(False)
        while True:
            with contextlib.suppress(BlockingIOError, ConnectionRefusedError):
                sender.send(message)
            with contextlib.suppress(BlockingIOError, ConnectionRefusedError):
                sender.recv(4096)


def connections(port: str, initial: bytes = b"", *, reads_responses: bool = True, resets: bool = False) -> None:
    """Open new connections continuously."""
    while True:
        with contextlib.suppress(OSError), connect(port) as connection:
            if resets:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(initial)
            while reads_responses and connection.recv(65536):
                pass


def stream(port: str, initial: bytes, piece: bytes) -> None:
    """Send on one connection continuously and discard responses; reconnect if it is closed."""
    while True:
        with contextlib.suppress(OSError), connect(port) as connection:
            connection.sendall(initial)
            connection.setblocking(False)
            while True:
                readable, writable, _ = select.select([connection], [connection], [], 60)
                if readable and not connection.recv(1 << 20):
                    break
                if writable and piece:
                    connection.send(piece)


def sequential_requests(message: bytes) -> None:
    """Send requests on one connection, each after the previous response."""
    while True:
        with contextlib.suppress(OSError), connect("model") as connection:
            while True:
                connection.sendall(message)
                if not connection.recv(65536):
                    break


def tunnel(initial: bytes) -> bytes:
    return f"CONNECT {HOST}:{PORTS['host']} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode() + initial


def chunked_request_head(key: str) -> bytes:
    head = f"POST /v1/messages HTTP/1.1\r\nHost: 127.0.0.1:{PORTS['model']}\r\nX-Api-Key: {key}\r\n"
    return f"{head}Transfer-Encoding: chunked\r\n\r\n".encode()


def floods() -> dict:
    denied_queries = b"".join(len(one).to_bytes(2, "big") + one for one in [query("denied.example")] * 100)
    allowed_queries = denied_queries.replace(query("denied.example"), query(HOST)).replace(
        len(query("denied.example")).to_bytes(2, "big") + query(HOST), len(query(HOST)).to_bytes(2, "big") + query(HOST)
    )
    refused = b"CONNECT denied.example:443 HTTP/1.1\r\nHost: denied.example\r\n\r\n"
    return {
        "denied DNS names over UDP": lambda: datagrams(query("denied.example")),
        "an allowed DNS name over UDP": lambda: datagrams(query(HOST)),
        "long DNS names over UDP": lambda: datagrams(query(".".join(["a"] * 120))),
        "truncated DNS messages over UDP": lambda: datagrams(b"\0" * 13),
        "denied DNS names over TCP": lambda: stream("dns_tcp", b"", denied_queries),
        "an allowed DNS name over TCP": lambda: stream("dns_tcp", b"", allowed_queries),
        "DNS over TCP byte by byte": lambda: stream("dns_tcp", b"", b"\0"),
        "connections to the DNS port": lambda: connections("dns_tcp", reads_responses=False),
        "refused tunnels": lambda: connections("proxy", refused),
        "refused tunnels, reset": lambda: connections("proxy", refused, reads_responses=False, resets=True),
        "connections to the proxy": lambda: connections("proxy", reads_responses=False),
        "invalid requests to the proxy": lambda: connections("proxy", b"\0\r\n\r\n"),
        "connections to port 443": lambda: connections("transparent_443", reads_responses=False),
        "TLS without a server name (SNI)": lambda: connections("transparent_443", hello("")),
        "TLS with a refused name": lambda: connections("transparent_443", hello("denied.example")),
        "requests at port 80": lambda: connections("transparent_80", b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"),
        "data after a refusal": lambda: stream("proxy", refused, bytes(65536)),
        "a request head byte by byte": lambda: stream("proxy", b"GET http://x/ HTTP/1.1\r\nX: ", b"x"),
        "connections to the model": lambda: connections("model", reads_responses=False),
        "connections to the model, reset": lambda: connections("model", b"P", reads_responses=False, resets=True),
        "requests with a wrong key": lambda: sequential_requests(request("wrong", b"{}")),
        "connections with a wrong key": lambda: connections("model", request("wrong", b"{}"), reads_responses=False),
        "requests for a wrong path": lambda: sequential_requests(request(GATEWAY_KEY, b"{}", path="/v1/files")),
        "requests with invalid JSON": lambda: sequential_requests(request(GATEWAY_KEY, b"{")),
        "pipelined requests": lambda: stream("model", b"", request("wrong", b"{}") * 100),
        "the body of a rejected request": lambda: stream("model", request("wrong", b"", 1 << 40), bytes(65536)),
        "a body that is too large": lambda: stream("model", request(GATEWAY_KEY, b"", 1 << 26), bytes(65536)),
        "large bodies": lambda: stream("model", request(GATEWAY_KEY, b"", 1 << 21), bytes(65536)),
        "a body in one-byte chunks": lambda: stream("model", chunked_request_head(GATEWAY_KEY), b"1\r\nx\r\n" * 10_000),
        "a body byte by byte": lambda: stream("model", request(GATEWAY_KEY, b"", 1 << 24), b"x"),
        "forwarded requests": lambda: sequential_requests(request(GATEWAY_KEY, b'{"model":"m","messages":[]}')),
        "allowed tunnels": lambda: connections("proxy", tunnel(b"\1"), reads_responses=False),
        "uploads through a tunnel": lambda: stream("proxy", tunnel(b"\1"), bytes(1 << 18)),
        "downloads through a tunnel": lambda: stream("proxy", tunnel(b"\2"), b""),
        "echoes through a tunnel byte by byte": lambda: stream("proxy", tunnel(b"\3"), b"x"),
    }


def flood_names() -> tuple[str, ...]:
    PORTS.update(model=0, host=0)
    return tuple(floods())


def main() -> None:
    PORTS.update(json.loads(sys.argv[2]))
    flood = floods()[sys.argv[1]]
    for _ in range(PROCESSES - 1):
        if os.fork() == 0:
            break
    for _ in range(CONNECTIONS - 1):
        threading.Thread(target=flood, daemon=True).start()
    flood()


if __name__ == "__main__":
    main()
