"""A sandbox that floods its gateway uses a limited share of a CPU, and its model requests still succeed.

The assertions use the CPU time of the gateway's process, which does not depend on the load of the machine.
"""

import socket
import statistics
import threading
import time
from contextlib import ExitStack

import pytest

from doubles import floods
from doubles.flood_harness import flood_harness, send_model_request
from sandbox.gateway.limits import MODEL_CONNECTION_CPU_DEBT_SECONDS_MAX, NEW_MODEL_CONNECTION_CPU_DEBT_SECONDS_MAX
from sandbox.model.fixed_limits import RUNNER_CPU_BURST_SECONDS, RUNNER_CPU_CORES

FLOOD_SECONDS = 5.0
CPU_TIME_FACTOR = 4
"""The counted CPU time is multiplied by this factor, so that a flood reaches the limit even on a busy machine."""
EVENTS_PER_SECOND_MAX = 25
SLACK_CPU_SECONDS = 0.3
"""CPU time for data that is read ahead and discarded, for timers, and for the test's requests."""

FLOODS = (
    "denied DNS names over UDP",
    "an allowed DNS name over UDP",
    "denied DNS names over TCP",
    "refused tunnels",
    "TLS without a server name (SNI)",
    "a request head byte by byte",
    "allowed tunnels",
    "downloads through a tunnel",
    "requests with a wrong key",
    "pipelined requests",
    "the body of a rejected request",
    "a body in one-byte chunks",
)


@pytest.mark.parametrize("name", FLOODS)
def test_flood_uses_limited_cpu_time_and_model_requests_continue(name):
    seconds = []
    spent = RUNNER_CPU_BURST_SECONDS + NEW_MODEL_CONNECTION_CPU_DEBT_SECONDS_MAX
    with flood_harness(spent, CPU_TIME_FACTOR) as harness, harness.connected() as kept_alive:
        send_model_request(kept_alive)
        started, cpu_started = time.monotonic(), harness.cpu_seconds
        with harness.flooded(name):
            while time.monotonic() < started + FLOOD_SECONDS:
                requested_at = time.monotonic()
                send_model_request(kept_alive)
                seconds.append(time.monotonic() - requested_at)
                time.sleep(0.1)
            used, elapsed = harness.cpu_seconds - cpu_started, time.monotonic() - started
        with harness.connected() as new:
            send_model_request(new)
    assert used < RUNNER_CPU_CORES / CPU_TIME_FACTOR * elapsed + SLACK_CPU_SECONDS
    assert statistics.median(seconds) < 1
    assert harness.final_report["events"] < EVENTS_PER_SECOND_MAX * elapsed + len(seconds) + 100
    assert harness.final_report["peak_memory_bytes"] < 200 * 1024**2


def test_forwarded_requests_use_limited_cpu_time():
    with flood_harness(RUNNER_CPU_BURST_SECONDS + MODEL_CONNECTION_CPU_DEBT_SECONDS_MAX, CPU_TIME_FACTOR) as harness:
        started, cpu_started = time.monotonic(), harness.cpu_seconds
        with harness.flooded("forwarded requests"):
            time.sleep(FLOOD_SECONDS)
            used, elapsed = harness.cpu_seconds - cpu_started, time.monotonic() - started
    assert used < RUNNER_CPU_CORES / CPU_TIME_FACTOR * elapsed + SLACK_CPU_SECONDS


def open_tunnel(harness, kind):
    floods.PORTS.update(harness.ports)
    connection = floods.connect("proxy")
    connection.sendall(floods.tunnel(kind))
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += connection.recv(1)
    assert b" 200 " in head
    return connection


def test_package_installation_stays_within_the_cpu_burst():
    """The control: 600 connections to a host and 2000 DNS queries, many of them concurrent."""
    tunnels, failures = 600, []

    def install(harness):
        try:
            for _ in range(tunnels // 20):
                with open_tunnel(harness, floods.hello(floods.HOST)) as connection:
                    connection.sendall(b"\x17\3\3" + b"y" * 20_000)
                    connection.shutdown(socket.SHUT_WR)
                    received = b""
                    while data := connection.recv(65536):
                        received += data
                    assert received.endswith(b"\x17\3\3" + b"y" * 20_000 + b"heard")
        except Exception as error:
            failures.append(error)

    with flood_harness() as harness:
        before = harness.cpu_seconds
        threads = [threading.Thread(target=install, args=(harness,)) for _ in range(20)]
        for thread in threads:
            thread.start()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as resolver:
            resolver.connect(("127.0.0.1", harness.ports["dns_udp"]))
            resolver.settimeout(20)
            for _ in range(2000):
                resolver.send(floods.query(floods.HOST))
                assert resolver.recv(1000)[3] & 15 == 0
        for thread in threads:
            thread.join()
        used = harness.cpu_seconds - before
    assert failures == []
    assert used < RUNNER_CPU_BURST_SECONDS


def test_large_clone_stays_within_the_cpu_burst():
    megabytes = 600
    with flood_harness() as harness, ExitStack() as stack:
        connection = stack.enter_context(open_tunnel(harness, b"\2"))
        before, received, buffer = harness.cpu_seconds, 0, bytearray(1 << 20)
        while received < megabytes * 10**6:
            received += connection.recv_into(buffer)
        used = harness.cpu_seconds - before
    assert used / megabytes < RUNNER_CPU_BURST_SECONDS / 600
