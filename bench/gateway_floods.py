"""What floods from inside cost the process of a gateway, and its model requests: `python bench/gateway_floods.py`.

Each flood goes on for SECONDS. Printed: the processor time that the gateway took, in cores, in all and in the last
half of it; how long model requests took meanwhile, over a kept connection and over fresh ones. `--only TEXT`
chooses floods by their names, `--seconds N` makes them longer.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from http.client import HTTPConnection
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from doubles import flood_hosts, flooded_gateway, floods  # noqa: E402

BODY = b'{"model":"claude-haiku-4-5","max_tokens":1,"messages":[]}'


def main() -> None:
    """One flood after the other, each at a gateway of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--seconds", type=float, default=10)
    chosen = parser.parse_args()
    print(f"{'flood':<36} {'cores':>6} {'later':>6}   kept: median, max ms   fresh: median, max ms   events  MiB")
    for name in floods.names():
        if chosen.only in name:
            measure(name, chosen.seconds)


def measure(name: str, seconds: float) -> None:
    """One line."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}

    def program(*argv: str, **more: object) -> "subprocess.Popen[str]":
        return subprocess.Popen([sys.executable, *argv], env=environment, text=True, **more)  # type: ignore[call-overload]

    hosts = program(flood_hosts.__file__, stdout=subprocess.PIPE)
    reached = json.loads(hosts.stdout.readline())
    gateway = program(
        flooded_gateway.__file__,
        str(reached["model"]),
        str(reached["host"]),
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
    )
    ports = json.loads(gateway.stdout.readline())
    asked = {"kept": [], "fresh": []}
    kept = HTTPConnection("127.0.0.1", ports["model"], timeout=30)
    ask(kept)
    flood = program("-I", "-S", floods.__file__, name, json.dumps(ports), start_new_session=True)
    try:
        began, cpu_began = time.monotonic(), cpu_seconds(gateway.pid)
        half = None
        while (now := time.monotonic()) < began + seconds:
            if half is None and now > began + seconds / 2:
                half = now, cpu_seconds(gateway.pid)
            asked["kept"].append(timed(kept))
            asked["fresh"].append(timed(HTTPConnection("127.0.0.1", ports["model"], timeout=30)))
            time.sleep(0.1)
        cores = (cpu_seconds(gateway.pid) - cpu_began) / (now - began)
        later = (cpu_seconds(gateway.pid) - half[1]) / (time.monotonic() - half[0])
        os.killpg(flood.pid, signal.SIGKILL)
        said, _ = gateway.communicate("", timeout=60)
        told = json.loads(said)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(flood.pid, signal.SIGKILL)
        for one in (flood, gateway, hosts):
            one.kill()
            one.wait()
    times = "   ".join(f"{statistics.median(one):>9.1f} {max(one):>9.1f}  " for one in asked.values())
    print(
        f"{name:<36} {cores:6.2f} {later:6.2f}   {times} {told['events']:>6} {told['peak_memory_bytes'] >> 20:>4}",
        flush=True,
    )


def timed(connection: HTTPConnection) -> float:
    """Milliseconds; a broken one counts as a whole minute."""
    began = time.perf_counter()
    try:
        ask(connection)
    except OSError:
        connection.close()
        return 60_000
    return (time.perf_counter() - began) * 1000


def ask(connection: HTTPConnection) -> None:
    """One model request and its answer."""
    connection.request("POST", "/v1/messages", BODY, {"X-Api-Key": floods.TASK_KEY})
    answer = connection.getresponse()
    if answer.status != 200:
        raise OSError(answer.status)
    answer.read()


def cpu_seconds(pid: int) -> float:
    """All that a process has used by now."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
