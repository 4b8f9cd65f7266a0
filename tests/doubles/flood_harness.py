"""A gateway in a separate process, its upstream hosts, and floods against it, for tests and benchmarks."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from doubles import flood_hosts, flooded_gateway, floods

BODY = b'{"model":"claude-haiku-4-5","max_tokens":1,"messages":[]}'


@dataclass
class FloodHarness:
    gateway: subprocess.Popen[str]
    ports: dict[str, int]
    final_report: dict[str, int] = field(default_factory=dict)

    @property
    def cpu_seconds(self) -> float:
        return cpu_seconds(self.gateway.pid)

    @contextlib.contextmanager
    def connected(self) -> Iterator[HTTPConnection]:
        """Yield a connection to the model."""
        connection = HTTPConnection("127.0.0.1", self.ports["model"], timeout=30)
        try:
            yield connection
        finally:
            connection.close()

    @contextlib.contextmanager
    def flooded(self, name: str) -> Iterator[None]:
        flood = _program("-I", "-S", floods.__file__, name, json.dumps(self.ports), start_new_session=True)
        try:
            yield
            assert flood.poll() is None, "the flood ended too early"
        finally:
            os.killpg(flood.pid, signal.SIGKILL)
            flood.wait()


@contextlib.contextmanager
def flood_harness(spent_seconds: float = 0.0, cpu_time_factor: float = 1.0) -> Iterator[FloodHarness]:
    """Run a gateway and its upstream hosts. After the block, `final_report` contains the gateway's report.

    spent_seconds: CPU budget used before the start.
    cpu_time_factor: multiplies the counted CPU time, so the limit is reached even on a busy machine.
    """
    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(_running(_program(flood_hosts.__file__, stdout=subprocess.PIPE)))
        host_ports = json.loads(hosts.stdout.readline())
        arguments = (str(host_ports["model"]), str(host_ports["host"]), str(spent_seconds), str(cpu_time_factor))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        gateway = stack.enter_context(_running(_program(flooded_gateway.__file__, *arguments, **pipes)))
        harness = FloodHarness(gateway, json.loads(gateway.stdout.readline()))
        yield harness
        output, _ = gateway.communicate("", timeout=60)
        harness.final_report.update(json.loads(output))


def send_model_request(connection: HTTPConnection) -> None:
    """Send a model request and read the response. Raises OSError if it is rejected."""
    connection.request("POST", "/v1/messages", BODY, {"X-Api-Key": floods.GATEWAY_KEY})
    response = connection.getresponse()
    response.read()
    if response.status != 200:
        raise OSError(response.status)


def cpu_seconds(pid: int) -> float:
    """Return the total CPU time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _program(*argv: str, **options: Any) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    return subprocess.Popen([sys.executable, *argv], env=environment, text=True, **options)


@contextlib.contextmanager
def _running(process: "subprocess.Popen[str]") -> Iterator[Any]:
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
