"""Measures whether a deployment on many hosts reaches its goals, and prints a table.

Run as root with the project's Python: python bench/cluster.py [FIGURE ...], by default all of these figures:

- load: 1,000 simulated workers, each with one TLS connection, write two records per second. The CPU time and the memory
  of the server's process, which accepts the claims, checks the records and stores them with `fsync`. The process has
  the worker server, the jobs and the copies of the journals; it does not serve the API and follows no task.
- lag: how far the server's copy of the journal is behind while a client follows three tasks on real workers.
- worker: the proportional memory (PSS) of each of these workers.
- slurm: the time from `pending` to `staging` on an idle Slurm cluster (script/setup --cluster).
- restart: the time from SIGKILL of the server until it has connections from all workers, which hold real runners.
- ended: the time from SIGKILL of a worker until the next attempt.

bench/lost_hosts.py covers lost hosts. Each figure takes less than two minutes. The latest results are in
docs/benchmarks.md. The exit code is 1 if a figure misses its goal.
"""

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import random
import resource
import signal
import ssl
import statistics
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import msgspec

from doubles.cluster_deployment import LEASE_SECONDS, ClusterDeployment
from doubles.cluster_server import ClusterServer
from doubles.deployment import bash_turn, make_repository, reply_turn, wait_until
from sandbox.interfaces.worker_messages import (
    SERVER_MESSAGE_BYTES_MAX,
    Claimed,
    Heartbeat,
    HeartbeatAnswer,
    Records,
    RecordsReceived,
    ServerMessage,
)
from sandbox.journal import record_format
from sandbox.journal.journals import FileJournals
from sandbox.model.events import AttemptStarted, Output, Record
from sandbox.model.resources import Resources
from sandbox.primitives.message_stream import encode_message, read_message

RECORDS_PER_SECOND = 2
POLL_SECONDS = 0.1
"""A real worker looks for new records and changes this often."""

HEARTBEAT_SECONDS = 2.0
EPOCH = 2
CONNECTING_MAX = 50
JOB_RESOURCES = Resources(1, 2**28, 2**28)
SMALL = {"cpus": 1, "memory": "512M", "disk": "1G"}
FOLLOWED_TASKS = 3
TICK = os.sysconf("SC_CLK_TCK")
_decoder = msgspec.msgpack.Decoder(ServerMessage)


class Results:
    """The rows of the table."""

    def __init__(self):
        self.rows = []

    def add(self, name, goal, value, unit, detail, load):
        has_reached = value <= goal
        loads = f"{load:.1f} → {os.getloadavg()[0]:.1f}"
        self.rows.append((name, f"≤ {goal:g} {unit}", f"{value:.4g} {unit}", has_reached, loads, detail))
        print(f"{name}: {value:.4g} {unit}, goal {goal:g} {unit}; {detail}; load {loads}", flush=True)

    def print_table(self):
        print(f"\n{_machine()}\n\n| figure | goal | measured | reached | load before → after | details |")
        print("| --- | --- | --- | --- | --- | --- |")
        for name, goal, value, has_reached, loads, detail in self.rows:
            print(f"| {name} | {goal} | {value} | {'yes' if has_reached else '**no**'} | {loads} | {detail} |")


def _machine():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown CPU")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    version = ".".join(map(str, sys.version_info[:2]))
    return f"{os.cpu_count()} × {model}, {memory:.0f} GiB, Linux {os.uname().release}, Python {version}"


def cpu_seconds(pid):
    """Return the user and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / TICK, int(fields[12]) / TICK


def pss_mb(pid):
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024 / 1e6


def percentile(values, percent):
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


# Many simulated workers.


def measure_load(results, options):
    load = os.getloadavg()[0]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="cluster-") as directory:
        own_end, server_end = context.Pipe()
        server = context.Process(target=_serve, args=(server_end, directory, options.workers), daemon=True)
        server.start()
        try:
            port, claims = own_end.recv()
            empty = pss_mb(server.pid)
            simulation = asyncio.run(_simulate(port, claims, server.pid, options.seconds))
        finally:
            server.kill()
            server.join()
        device = Path(directory).stat().st_dev
    seconds, (user, system) = simulation.seconds, simulation.cpu
    stored = f"{simulation.stored / seconds:.0f} records/s stored"
    lag = [percentile(simulation.delays, percent) for percent in (50, 99)]
    about = (
        f"{options.workers} workers, {stored} of {options.workers * RECORDS_PER_SECOND}, confirmed after p50 "
        f"{lag[0] * 1000:.0f} ms, p99 {lag[1] * 1000:.0f} ms, {simulation.lost} connections lost, {seconds:.0f} s"
    )
    share = (user + system) / seconds * 100
    detail = f"user {user / seconds:.0%}, system {system / seconds:.0%}; fsync on (device {os.major(device)}:"
    detail += f"{os.minor(device)}); {about}"
    results.add("server CPU", 50, share, "% of a core", detail, load)
    results.add("server memory (PSS)", 150, simulation.pss, "MB", f"{empty:.0f} MB without connections; {about}", load)


def _serve(parent, directory, workers):
    """Run the server's process until it is killed."""
    _allow_open_files()

    async def serve():
        # A server gets its submissions one by one. Here, they only prepare the measurement.
        server = ClusterServer(Path(directory))
        await server.start()
        claims = []
        for number in range(workers):
            task_id = f"task-{number}"
            job = server.jobs.reserve(task_id, None, JOB_RESOURCES)
            server.record_attempt(job)
            claims.append((task_id, job))
        async with asyncio.timeout(60):
            while len(server.engine.submitted) < workers:  # noqa: ASYNC110  # the double has no event for it
                await asyncio.sleep(0.05)
        tokens = {each.name: bytes.fromhex(each.environment["TOKEN"]) for each in server.engine.submitted}
        sent = []
        for task_id, job in claims:
            sequence = server.journals.replay(task_id).task.last_seq
            sent.append((encode_message(server.claim(job, tokens[job.name])), sequence))
        parent.send((server.port, sent))
        await asyncio.Event().wait()

    asyncio.run(serve())


def _allow_open_files():
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Simulation:
    """What all simulated workers have measured.

    stored: the records that the server has confirmed. delays: the seconds from a record's creation to its confirmation.
    """

    def __init__(self):
        self.delays, self.stored, self.lost = [], 0, 0
        self.is_measuring = False


async def _simulate(port, claims, server_pid, seconds):
    _allow_open_files()
    simulation, connecting = Simulation(), asyncio.Semaphore(CONNECTING_MAX)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    workers = [SimulatedWorker(simulation, *claim) for claim in claims]
    async with asyncio.timeout(90), asyncio.TaskGroup() as group:
        for worker in workers:
            group.create_task(worker.connect(port, tls, connecting))
    running = [asyncio.create_task(worker.run()) for worker in workers]
    await asyncio.sleep(5)  # all workers have written records
    before, began, simulation.is_measuring = cpu_seconds(server_pid), time.monotonic(), True
    await asyncio.sleep(seconds)
    simulation.is_measuring, simulation.seconds = False, time.monotonic() - began
    simulation.cpu = tuple(b - a for a, b in zip(before, cpu_seconds(server_pid), strict=True))
    simulation.pss = pss_mb(server_pid)
    simulation.lost = sum(each.done() for each in running)
    for each in running:
        each.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    for worker in workers:
        worker.writer.transport.abort()
    return simulation


class SimulatedWorker:
    """Sends what a real worker with a running task sends: records, and a heartbeat after each change."""

    def __init__(self, simulation, claim, sequence):
        self.simulation, self.claim, self.sequence = simulation, claim, sequence
        self.waiting, self.sent, self.end, self.heartbeats = [], [], 0, 0
        self.confirmed = 0
        self.heartbeat_at = 0.0

    async def connect(self, port, tls, connecting):
        async with connecting:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
            self.writer.write(self.claim)
            answer = await read_message(self.reader, _decoder, SERVER_MESSAGE_BYTES_MAX)
        assert isinstance(answer, Claimed), answer
        self.end = self.confirmed = answer.end_offset

    async def run(self):
        async with asyncio.TaskGroup() as group:
            group.create_task(self._write())
            group.create_task(self._read())

    async def _write(self):
        """Write records at regular times, and send them together if the server is late."""
        pause = 1 / RECORDS_PER_SECOND
        next_at = time.monotonic() + random.uniform(0, pause)
        while True:
            await asyncio.sleep(max(0.0, next_at - time.monotonic()))
            next_at += pause
            self.sequence += 1
            event = Output.from_bytes("stdout", b"a line of output as agents print it: %d\n" % self.sequence)
            line = record_format.encode(
                Record(seq=self.sequence, epoch=EPOCH, at=datetime.now(UTC), event=event, transition=None)
            )
            self.end += len(line)
            self.waiting.append((line, time.monotonic()))
            if not self.sent:
                self._send_records()
            self._send_heartbeat()

    def _send_records(self):
        self.sent, self.waiting = self.waiting, []
        self.writer.write(encode_message(Records(self.confirmed, b"".join(line for line, _ in self.sent))))

    def _send_heartbeat(self):
        self.heartbeats += 1
        heartbeat = Heartbeat(self.heartbeats, "held", self.end, launches=1, is_launching=False)
        self.writer.write(encode_message(heartbeat))

    async def _read(self):
        while True:
            match await read_message(self.reader, _decoder, SERVER_MESSAGE_BYTES_MAX):
                case RecordsReceived(end_offset, is_accepted):
                    assert is_accepted
                    now, self.confirmed = time.monotonic(), end_offset
                    if self.simulation.is_measuring:
                        self.simulation.stored += len(self.sent)
                        self.simulation.delays += [now - at for _, at in self.sent]
                    self.sent = []
                    if self.waiting:
                        self._send_records()
                case HeartbeatAnswer():
                    pass
                case None:
                    raise ConnectionError("the server closed the connection")
                case other:
                    raise AssertionError(other)


# Real workers of the `processes` engine.


@contextlib.contextmanager
def _cluster(*turns, **options):
    with tempfile.TemporaryDirectory(prefix="cluster-") as directory:
        deployment = ClusterDeployment(directory, forks=False)
        try:
            make_repository(deployment.repositories / "repo.git", {"README.md": "Hello.\n"})
            deployment.start_git()
            deployment.start_model(*turns)
            deployment.start_server(**options)
            yield deployment
        finally:
            deployment.close()


def measure_followed(results, options):
    """Measure the lag and the memory of the workers in one run."""
    load = os.getloadavg()[0]
    steps = options.seconds * 2
    turns = [bash_turn(f"echo {number}; sleep 0.3") for number in range(steps)]
    with _cluster(*turns, reply_turn(), **{"SANDBOX_CAPACITY_CPUS": "100"}) as deployment:
        tasks = [f"task-{number}" for number in range(1, FOLLOWED_TASKS + 1)]
        for task_id in tasks:
            deployment.submit(task_id, vm=SMALL)
        for task_id in tasks:
            deployment.wait_for_state("running", task_id, 60)
        followers = [threading.Thread(target=_follow, args=(deployment, task_id), daemon=True) for task_id in tasks]
        for follower in followers:
            follower.start()
        lags = _watch_copies(deployment, tasks, options.seconds)
        memory = [pss_mb(pid) for pid in deployment.worker_pids()]
    about = f"{FOLLOWED_TASKS} followed tasks, {len(lags)} records"
    if "lag" in options.figures:
        detail = f"p50 {percentile(lags, 50):.2f} s, maximum {max(lags):.2f} s; {about}"
        results.add("copy behind (p99)", 1, percentile(lags, 99), "s", detail, load)
    if "worker" in options.figures:
        detail = f"largest of {len(memory)} workers with a running task, median {statistics.median(memory):.1f} MB"
        results.add("worker memory (PSS)", 25, max(memory), "MB", detail, load)


def _follow(deployment, task_id):
    with (
        contextlib.suppress(Exception),
        deployment._client() as http,
        http.stream("GET", f"/api/v1/tasks/{task_id}/logs?follow=true") as stream,
    ):
        for _ in stream.iter_bytes():
            pass


def _watch_copies(deployment, tasks, seconds):
    """Return the seconds between the creation of each record and its arrival in the server's copy."""
    journals, lags = FileJournals(deployment.data_dir), []
    offsets = {task_id: journals.size_bytes(task_id) for task_id in tasks}
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for task_id in tasks:
            if journals.size_bytes(task_id) > offsets[task_id]:
                now, batch = time.time(), journals.read(task_id, offsets[task_id])
                offsets[task_id] = batch.next_offset
                lags += [now - record.at.timestamp() for record in batch.records]
        time.sleep(0.01)
    return lags


def measure_restart(results, options):
    """Kill the server while all workers have a runner that waits for the git host, so no agent needs memory."""
    load = os.getloadavg()[0]
    capacity = {
        f"SANDBOX_CAPACITY_{name}": value for name, value in {"CPUS": "64", "MEMORY": "64", "DISK": "64"}.items()
    }
    with _cluster(reply_turn(), **capacity) as deployment:
        git_server = deployment.processes[0]
        git_server.send_signal(signal.SIGSTOP)
        try:
            tasks = [f"task-{number}" for number in range(1, options.restart_workers + 1)]
            for task_id in tasks:
                deployment.submit(task_id, vm=SMALL)
            for task_id in tasks:
                deployment.wait_for_state("staging", task_id, 60)
            wait_until(lambda: _connected_workers(deployment) == len(tasks), 30, "connections")
            options_of_server = dict(deployment.server_environment)
            ports = deployment.ports()
            killed_at = time.monotonic()
            deployment.server.stop(signal.SIGKILL)
            starter = threading.Thread(
                target=lambda: deployment.start_server(ports=ports, **_without_cluster(options_of_server))
            )
            starter.start()
            wait_until(lambda: _is_listening(deployment), 60, "the server")
            listening = time.monotonic() - killed_at
            wait_until(lambda: _connected_workers(deployment) == len(tasks), 60, "all workers")
            seconds = time.monotonic() - killed_at
            starter.join()
        finally:
            git_server.send_signal(signal.SIGCONT)
    detail = f"{len(tasks)} workers with runners; the new server listened after {listening:.1f} s, so "
    detail += f"{seconds - listening:.1f} s in addition"
    results.add("all workers reconnected", 5, seconds, "s", detail, load)


def _without_cluster(environment):
    return {name: value for name, value in environment.items() if not name.startswith("SANDBOX_CLUSTER_")}


def _connected_workers(deployment):
    """Count the workers' connections that a server has accepted. Their sessions are the only permanent connections."""
    return sum(state == "01" and inode != "0" for state, inode in _sockets_of_worker_port(deployment))


def _is_listening(deployment):
    return any(state == "0A" for state, _ in _sockets_of_worker_port(deployment))


def _sockets_of_worker_port(deployment):
    """Return the state and the inode of each socket of the server's port. Without an inode, it is not accepted yet."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [(words[3], words[9]) for words in lines if words[1].endswith(f":{deployment.worker_port:04X}")]


def measure_ended(results, _):
    load = os.getloadavg()[0]
    with _cluster(bash_turn("sleep 30"), reply_turn()) as deployment:
        deployment.submit(vm=SMALL, lifecycle={"retries": 1})
        deployment.wait_for_state("running", seconds=60)
        (pid,) = deployment.worker_pids()
        killed_at = time.time()
        deployment.signal(signal.SIGKILL, pid)
        wait_until(lambda: len(deployment.attempts()) == 2, 60, "the next attempt")
        records = FileJournals(deployment.data_dir).read("task-1").records
        started = [record.at.timestamp() for record in records if isinstance(record.event, AttemptStarted)]
    detail = f"worker killed while its agent ran, engine processes, lease {LEASE_SECONDS} s"
    results.add("ended job → next attempt", 10, started[-1] - killed_at, "s", detail, load)


# A real Slurm cluster.


def measure_slurm(results, options):
    from doubles import slurm_cluster
    from doubles.slurm_deployment import SlurmDeployment

    if (reason := slurm_cluster.missing_requirement()) is not None:
        print(f"slurm: {reason}", file=sys.stderr)
        return
    load, delays = os.getloadavg()[0], []
    deadline = time.monotonic() + options.seconds * 3
    with (
        tempfile.TemporaryDirectory(prefix="cluster-") as directory,
        slurm_cluster.SlurmCluster(slurmd_timeout=60) as cluster,
    ):
        deployment = SlurmDeployment(directory, cluster)
        try:
            make_repository(deployment.repositories / "repo.git", {"README.md": "Hello.\n"})
            deployment.start_git()
            deployment.start_model(reply_turn())
            deployment.start_server()
            for number in range(options.rounds + 1):
                task_id = f"task-{number}"
                deployment.submit(task_id, vm=SMALL)
                deployment.wait(task_id)
                delays.append(_staging_delay(deployment, task_id))
                if time.monotonic() > deadline:
                    break
        finally:
            deployment.close()
    warm = delays[1:] or delays
    detail = f"{len(warm)} tasks, one after the other, maximum {max(warm):.2f} s; the first task {delays[0]:.2f} s"
    results.add("submission → staging (p50)", 1.5, statistics.median(warm), "s", detail, load)


def _staging_delay(deployment, task_id):
    at = {}
    for record in FileJournals(deployment.data_dir).read(task_id).records:
        if record.transition is not None:
            at.setdefault(str(record.transition.new_state), record.at)
    return (at["staging"] - at["pending"]).total_seconds()


FIGURES = {
    "load": measure_load,
    "lag": measure_followed,
    "worker": measure_followed,
    "slurm": measure_slurm,
    "restart": measure_restart,
    "ended": measure_ended,
}


def main():
    parser = argparse.ArgumentParser(description="Measure a cluster against its goals.")
    parser.add_argument("figures", nargs="*", help=f"of {', '.join(FIGURES)}; default: all")
    parser.add_argument("--workers", type=int, default=1000, help="simulated workers")
    parser.add_argument("--restart-workers", type=int, default=30, help="real workers that must reconnect")
    parser.add_argument("--seconds", type=int, default=20, help="how long the load and the lag are measured")
    parser.add_argument("--rounds", type=int, default=10, help="tasks on Slurm")
    options = parser.parse_args()
    if unknown := set(options.figures) - FIGURES.keys():
        parser.error(f"unknown figures: {', '.join(sorted(unknown))}")
    options.figures = options.figures or list(FIGURES)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # removes processes and directories
    results = Results()
    for measure in dict.fromkeys(FIGURES[name] for name in options.figures):
        measure(results, options)
    results.print_table()
    return int(not all(row[3] for row in results.rows))


if __name__ == "__main__":
    sys.exit(main())
