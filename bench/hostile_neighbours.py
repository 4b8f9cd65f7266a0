"""Measures the server, another task and the start of a sandbox while four tasks attack the machine.

Run as root with the project's Python: python bench/hostile_neighbours.py [SECONDS [RUNTIME]]
(defaults: 120, bubblewrap)

Server, runners, sandboxes and Claude Code are real; the model is scripted. Each hostile task has a different attack:
unread socket buffers, filters on sockets and system calls, floods of the gateway, and all of these. The baseline is the
same ordinary task on the same server before the attacks.
"""

import json
import re
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from doubles import floods
from doubles.deployment import (
    FINAL_STATES,
    ORGANIZATION,
    Deployment,
    bash_turn,
    make_repository,
    reply_turn,
    wait_until,
)

HOSTILE_TASKS = 4
PORTS = {"model": 8123, "proxy": 3128, "dns_udp": 53, "dns_tcp": 53, "transparent_80": 80, "transparent_443": 443}
FLOODS = ("denied DNS names over UDP", "refused tunnels", "requests with a wrong key")

BUFFERS = """
import socket, time
while True:
    listener = socket.socket(); listener.bind(("127.0.0.1", 0)); listener.listen(512); held = []
    for _ in range(150):
        client = socket.create_connection(listener.getsockname()); held += [client, listener.accept()[0]]
        client.setblocking(False)
        try:
            while True: client.send(bytes(65536))
        except BlockingIOError: pass
    for _ in range(2500):
        one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); one.bind(("127.0.0.1", 0)); held.append(one)
        try:
            for _ in range(4): client.getsockname(), socket.socket(2, 2).sendto(bytes(60000), one.getsockname())
        except OSError: pass
    time.sleep(2)
"""

FILTERS = """
import ctypes, os, socket, struct, time
libc, kept = ctypes.CDLL(None, use_errno=True), []
def program(*instructions):
    code = b"".join(struct.pack("HBBI", code, 0, 0, value) for code, value in instructions)
    kept.append(ctypes.create_string_buffer(code, len(code)))
    return struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(kept[-1]))
sockets = [socket.socket() for _ in range(3000)]
small = program((6, 1))
large = program((0x20, 0), *((0x45, 0x12345678),) * 4094, (6, 0x7FFF0000))
for one in sockets:
    try: one.setsockopt(1, 26, small)
    except OSError: pass
libc.prctl(38, 1, 0, 0, 0)
for _ in range(200):
    if os.fork() == 0:
        for _ in range(8): libc.prctl(22, 2, large, 0, 0)
        time.sleep(600)
time.sleep(600)
"""


def task_scripts(seconds: float) -> dict[str, str]:
    """Return the content of work.sh for each task's repository."""
    ports = json.dumps({**PORTS, "host": 443})
    flood = "\n".join(f"setsid python3 -I -S floods.py '{name}' '{ports}' >/dev/null 2>&1 &" for name in FLOODS)
    buffers, filters = (f"setsid python3 -I -S {name}.py >/dev/null 2>&1 &" for name in ("buffers", "filters"))
    attacks = (buffers, filters, flood, f"{buffers}\n{filters}\n{flood}")
    hostile = {f"hostile-{number}": f"{attack}\nsleep {seconds}\n" for number, attack in enumerate(attacks, 1)}
    return {**hostile, "ordinary": "echo done > done.txt\n"}


def host_memory() -> dict[str, int]:
    """Return the memory used by all TCP and UDP socket buffers and by compiled filters, in MiB."""
    pages = re.findall(r"(?m)^(?:TCP|UDP):.* mem (\d+)", Path("/proc/net/sockstat").read_text())
    lines = [line for line in Path("/proc/vmallocinfo").read_text().splitlines() if "bpf" in line]
    return {"buffers": sum(map(int, pages)) >> 8, "filters": sum(int(line.split()[1]) for line in lines) >> 20}


class Watch:
    """Requests the server's health five times per second, and reads the host kernel's memory."""

    def __init__(self, url):
        self.url, self.health, self.peak, self._stopped = url, [], {}, threading.Event()
        self._thread = threading.Thread(target=self._poll)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stopped.set()
        self._thread.join()

    def _poll(self):
        import httpx2

        with httpx2.Client(base_url=self.url, timeout=30) as client:
            while not self._stopped.wait(0.2):
                began = time.monotonic()
                assert client.get("/api/v1/health").status_code == 200
                self.health.append(time.monotonic() - began)
                for name, mebibytes in host_memory().items():
                    self.peak[name] = max(mebibytes, self.peak.get(name, 0))


def run_ordinary_task(deployment, task_id):
    """Run a task; return the seconds until its sandbox is running, and until the task is completed."""
    began = time.monotonic()
    deployment.submit(task_id, repository={"url": f"{ORGANIZATION}ordinary.git"}, vm={"cpus": 1, "memory": "1G"})
    wait_until(
        lambda: deployment.status(task_id)["state"] not in ("pending", "staging", "provisioning"), 120, "a sandbox"
    )
    started = time.monotonic() - began
    status = deployment.wait(task_id, 120)
    assert status["state"] == "completed", deployment.diagnostics(task_id)
    return started, time.monotonic() - began


def main(seconds=120.0, runtime="bubblewrap"):
    with tempfile.TemporaryDirectory(prefix="hostile-") as directory:
        deployment = Deployment(directory)
        deployment.runtime = runtime
        try:
            floods_source = Path(floods.__file__).read_text()
            for name, script in task_scripts(seconds).items():
                files = {"work.sh": script, "floods.py": floods_source, "buffers.py": BUFFERS, "filters.py": FILTERS}
                make_repository(deployment.repositories / f"{name}.git", files)
            deployment.start_git()
            deployment.start_model(bash_turn("sh work.sh"), reply_turn())
            deployment.start_server(SANDBOX_ACCESS_REQUESTS_PER_MINUTE="0")
            before = host_memory()
            alone = run_ordinary_task(deployment, "alone")
            for number in range(1, HOSTILE_TASKS + 1):
                repository = {"url": f"{ORGANIZATION}hostile-{number}.git"}
                deployment.submit(f"hostile-{number}", repository=repository, vm={"cpus": 1, "memory": "512M"})
            hostile = [f"hostile-{number}" for number in range(1, HOSTILE_TASKS + 1)]
            wait_until(
                lambda: all(deployment.status(one)["progress"]["tool_calls"] for one in hostile), 120, "four attacks"
            )
            time.sleep(5)
            with Watch(deployment.server.ready_message["http"]) as watch:
                attacked = [run_ordinary_task(deployment, f"neighbour-{number}") for number in range(3)]
                statuses = {one: deployment.status(one) for one in hostile}
                states = {one: (status["state"], status["error"]) for one, status in statuses.items()}
                time.sleep(max(0.0, 10 - sum(whole for _, whole in attacked)))
            print_results(before, alone, attacked, states, watch)
            for one in hostile:
                if deployment.status(one)["state"] not in FINAL_STATES:
                    deployment.http.delete(f"/api/v1/tasks/{one}", params={"force": "true"})
            for one in hostile:
                print(f"{one}: {deployment.wait(one, 60)['state']} after cancellation")
        finally:
            deployment.close()
    return int(max(watch.health) > 1.0)


def print_results(before, alone, attacked, states, watch):
    """Print the results."""
    median, longest = statistics.median(watch.health) * 1000, max(watch.health) * 1000
    print(f"health: p50 {median:.0f} ms, max {longest:.0f} ms, of {len(watch.health)} requests")
    print(f"ordinary task before the attacks: sandbox after {alone[0]:.1f} s, completed after {alone[1]:.1f} s")
    for started, whole in attacked:
        print(f"ordinary task during four attacks: sandbox after {started:.1f} s, completed after {whole:.1f} s")
    print(f"hostile tasks: {states}")
    print(f"host, MiB: before {before}, peak {watch.peak}")


if __name__ == "__main__":
    sys.exit(main(*(convert(word) for convert, word in zip((float, str), sys.argv[1:], strict=False))))
