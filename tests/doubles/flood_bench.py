"""A gateway in a process of its own, what it reaches, and floods at it: for tests and for the bench."""

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
class FloodBench:
    gateway: subprocess.Popen[str]
    ports: dict[str, int]
    end: dict[str, int] = field(default_factory=dict)

    @property
    def cpu_seconds(self) -> float:
        return cpu_seconds(self.gateway.pid)

    @contextlib.contextmanager
    def connected(self) -> Iterator[HTTPConnection]:
        """To the model."""
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
            assert flood.poll() is None, "the flood has ended by itself"
        finally:
            os.killpg(flood.pid, signal.SIGKILL)
            flood.wait()


@contextlib.contextmanager
def flood_bench(spent_seconds: float = 0.0, factor: float = 1.0) -> Iterator[FloodBench]:
    """`end` has what the gateway told of itself, after the block. spent_seconds: of its CPU budget, before.

    factor: by which what it uses counts, so that a bound can be seen on a machine that is too busy to get past it.
    """
    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(_running(_program(flood_hosts.__file__, stdout=subprocess.PIPE)))
        reached = json.loads(hosts.stdout.readline())
        arguments = (str(reached["model"]), str(reached["host"]), str(spent_seconds), str(factor))
        piped = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        gateway = stack.enter_context(_running(_program(flooded_gateway.__file__, *arguments, **piped)))
        bench = FloodBench(gateway, json.loads(gateway.stdout.readline()))
        yield bench
        said, _ = gateway.communicate("", timeout=60)
        bench.end.update(json.loads(said))


def ask(connection: HTTPConnection) -> None:
    """One model request and its answer. Raises OSError where it is refused."""
    connection.request("POST", "/v1/messages", BODY, {"X-Api-Key": floods.TASK_KEY})
    answer = connection.getresponse()
    answer.read()
    if answer.status != 200:
        raise OSError(answer.status)


def cpu_seconds(pid: int) -> float:
    """All that a process has used by now."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _program(*argv: str, **more: Any) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    return subprocess.Popen([sys.executable, *argv], env=environment, text=True, **more)


@contextlib.contextmanager
def _running(process: "subprocess.Popen[str]") -> Iterator[Any]:
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
