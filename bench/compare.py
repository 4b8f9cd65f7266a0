"""Compares a whole task in Sandbox with the same work without a sandbox, and with other tools, in turn, in one run.

Run as root with the project's Python: python bench/compare.py [ROUNDS [CONTENDER ...]]   (default: 20, all contenders)

The work: clone a small repository, then run `claude -p` in it; Claude Code is real, the model is scripted. `bare` is
`git clone` and `claude -p` as plain processes. `bubblewrap` and `gvisor` are tasks of a running server, from the
request until the task has completed. The others are:
- docker: both commands in a new container whose /usr is the host's.
- sandbox-runtime: both commands under `srt`, from the npm package @anthropic-ai/sandbox-runtime.
- swe-rex: both commands in a session of a LocalDeployment, which isolates nothing.
- prefect: a flow with two tasks, which isolates nothing.
They are not dependencies of the project. Install them into a separate directory, and set SANDBOX_PEERS to its path:
npm packages in `node_modules`, Python packages in a virtual environment `venv`. A contender that is not installed or
does not work is skipped.

Prints the wall time of each contender, the median of the differences and of the ratios to the `bare` run of the same
round, and the same for CPU time, which a control group (v2) measures. At the end: the phases of a task, and the load.
"""

import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from doubles.deployment import ORGANIZATION, SERVER_KEY, Deployment, make_repository, reply_turn, wait_until
from sandbox.agents.claude_code.agent import find_binary

RUN_SECONDS = 120
BARE = "bare"
RUNTIMES = ("bubblewrap", "gvisor")
PHASES = (
    ("until the runner clones", "pending", "staging"),
    ("disk and clone", "staging", "provisioning"),
    ("sandbox", "provisioning", "running"),
    ("agent", "running", "completing"),
    ("patch, artifacts, teardown", "completing", "completed"),
)
SWE_REX_PROGRAM = """
import asyncio, sys
from swerex.deployment.local import LocalDeployment
from swerex.runtime.abstract import BashAction, CreateBashSessionRequest

async def main():
    deployment = LocalDeployment()
    await deployment.start()
    await deployment.runtime.create_session(CreateBashSessionRequest())
    await deployment.runtime.run_in_session(BashAction(command=sys.argv[1], timeout=100))
    await deployment.stop()

asyncio.run(main())
"""
PREFECT_PROGRAM = """
import subprocess, sys
from prefect import flow, task

@task
def run(command):
    subprocess.run(["/bin/sh", "-c", command], check=True)

@flow
def whole(commands):
    for command in commands:
        run(command)

whole(sys.argv[1:])
"""


class SkippedError(Exception):
    """The contender is not installed or does not work here."""


class CpuMeter:
    """Measures the CPU time of the processes of one contender with a control group, if the host has version 2."""

    def __init__(self, name: str) -> None:
        roots = [root for root in (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup")) if _is_v2(root)]
        self._directory = roots[0] / f"compare-{os.getpid()}-{name}" if roots else None
        if self._directory is not None:
            self._directory.mkdir()

    def add(self, pid: int) -> None:
        """Count the process, where 0 is the calling process, and its later children."""
        if self._directory is not None:
            (self._directory / "cgroup.procs").write_text(str(pid))

    def seconds(self) -> float:
        """Return the CPU time so far; NaN if it cannot be measured."""
        if self._directory is None:
            return float("nan")
        return int((self._directory / "cpu.stat").read_text().split()[1]) / 1e6

    def close(self) -> None:
        """Remove the group, whose processes must have ended."""
        if self._directory is not None:
            with contextlib.suppress(OSError):
                self._directory.rmdir()


def _is_v2(root: Path) -> bool:
    return (root / "cgroup.controllers").exists() and os.access(root, os.W_OK)


class PlainContender:
    """Runs the work as a command. Each run gets a new directory, which is removed after the run."""

    def __init__(self, name: str, deployment: Deployment) -> None:
        self.meter = CpuMeter(name)
        self.clone_seconds: list[float] = []
        self._deployment = deployment
        self._runs = deployment.directory / name
        self._runs.mkdir()

    def run(self, _number: int) -> None:
        """Do the work once. Raises CalledProcessError, TimeoutExpired."""
        directory = Path(tempfile.mkdtemp(dir=self._runs))
        began = time.perf_counter()
        for number, command in enumerate(self.commands(directory)):
            self.execute(command, directory)
            if number == 0:
                self.clone_seconds.append(time.perf_counter() - began)

    def commands(self, directory: Path) -> list[list[str]]:
        """Return the command lines to run one after the other."""
        return [clone_command(directory), claude_command()]

    def environment(self) -> dict[str, str]:
        """Return the environment of the commands."""
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self._deployment.home),
            "LANG": "C.UTF-8",
            "ANTHROPIC_BASE_URL": self._deployment.model_url,
            "ANTHROPIC_API_KEY": SERVER_KEY,
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        }

    def execute(self, command: list[str], directory: Path) -> None:
        """Run a command in the clone if that exists."""
        workspace = directory / "workspace"
        completed = subprocess.run(
            command,
            cwd=workspace if workspace.exists() else directory,
            env=self.environment(),
            input=b"Do it.",
            capture_output=True,
            timeout=RUN_SECONDS,
            preexec_fn=lambda: self.meter.add(0),
            check=False,
        )
        if completed.returncode:
            raise SkippedError((completed.stderr or completed.stdout).decode(errors="replace").strip()[-300:])

    def clean_up(self) -> None:
        """Remove the files of the run. The time is not part of the measurement, unlike that of Sandbox's teardown."""
        for directory in self._runs.iterdir():
            shutil.rmtree(directory)


def clone_command(directory: Path) -> list[str]:
    """Return the command that clones the repository like a task without a commit."""
    options = ("--quiet", "--depth=1", "--single-branch", "--no-tags", "--branch=main")
    return ["git", "clone", *options, f"{ORGANIZATION}repo.git", str(directory / "workspace")]


def claude_command() -> list[str]:
    """Return the command of the agent, with the options that affect its start."""
    options = ("--output-format", "stream-json", "--verbose", "--setting-sources", "", "--strict-mcp-config")
    model = "--model=claude-sonnet-4-5-20250929"
    return [str(find_binary()), "-p", *options, model, "--session-id", str(uuid.uuid4())]


def shell_line(directory: Path) -> str:
    """Return the whole work as one line for a shell."""
    words = [subprocess.list2cmdline(one) for one in (clone_command(directory), claude_command())]
    return f"{words[0]} && cd {directory}/workspace && echo 'Do it.' | {words[1]}"


class DockerContender(PlainContender):
    """Runs the work in a new container, with the host's network and its /usr read-only."""

    IMAGE = "sandbox-compare:empty"

    def __init__(self, name: str, deployment: Deployment) -> None:
        if shutil.which("docker") is None:
            raise SkippedError("docker is not installed")
        links = "".join(f"ln -s usr/{one} {one};" for one in ("bin", "sbin", "lib", "lib64"))
        make = f"cd $(mktemp -d) && mkdir -m 1777 tmp && mkdir usr etc root && {links} tar c . | docker import - "
        made = subprocess.run(
            ["/bin/sh", "-c", make + self.IMAGE], capture_output=True, text=True, timeout=RUN_SECONDS, check=False
        )
        if made.returncode:
            raise SkippedError(made.stderr.strip().splitlines()[-1])
        super().__init__(name, deployment)

    def commands(self, directory: Path) -> list[list[str]]:
        """Run both commands in one container. Its processes belong to the Docker daemon, so CPU time is incomplete."""
        mounts = [
            "/usr:/usr:ro",
            "/etc/ssl:/etc/ssl:ro",
            f"{directory}:{directory}",
            f"{find_binary()}:{find_binary()}:ro",
        ]
        mounts += [f"{self._deployment.home}:{self._deployment.home}"]
        variables = [word for name, value in self.environment().items() for word in ("--env", f"{name}={value}")]
        options = ["--rm", "--network=host", *variables, *(f"--volume={one}" for one in mounts)]
        return [["docker", "run", *options, self.IMAGE, "/bin/sh", "-c", shell_line(directory)]]


class SandboxRuntimeContender(PlainContender):
    """Runs the work under `srt`, whose proxy allows the model and the git server."""

    def __init__(self, name: str, deployment: Deployment) -> None:
        self._program = find_peer("node_modules/.bin/srt")
        super().__init__(name, deployment)

    def commands(self, directory: Path) -> list[list[str]]:
        """Run both commands under one `srt`. NO_PROXY would bypass the proxy, which is the only way out."""
        settings = directory / "settings.json"
        writable = [str(directory), str(self._deployment.home), "/tmp"]
        network = {"allowedDomains": ["127.0.0.1", "localhost"], "deniedDomains": []}
        filesystem = {"denyRead": [], "allowWrite": writable, "denyWrite": []}
        settings.write_text(json.dumps({"network": network, "filesystem": filesystem}))
        line = f"unset NO_PROXY no_proxy; {shell_line(directory)}"
        return [[self._program, "--settings", str(settings), "-c", line]]


class SweRexContender(PlainContender):
    """Runs the work in a session of SWE-ReX on this machine."""

    def __init__(self, name: str, deployment: Deployment) -> None:
        self._program = find_python_peer("swerex")
        super().__init__(name, deployment)

    def commands(self, directory: Path) -> list[list[str]]:
        """Run both commands in one session."""
        return [[self._program, "-c", SWE_REX_PROGRAM, shell_line(directory)]]


class PrefectContender(PlainContender):
    """Runs the work as two tasks of a Prefect flow, which starts a temporary Prefect server."""

    def __init__(self, name: str, deployment: Deployment) -> None:
        self._program = find_python_peer("prefect")
        super().__init__(name, deployment)

    def commands(self, directory: Path) -> list[list[str]]:
        """Run one task for each command."""
        claude = f"cd {directory}/workspace && echo 'Do it.' | {subprocess.list2cmdline(claude_command())}"
        return [[self._program, "-c", PREFECT_PROGRAM, subprocess.list2cmdline(clone_command(directory)), claude]]


def find_peer(path: str) -> str:
    """Return the path of a program in the directory of the peers. Raises SkippedError."""
    directory = os.environ.get("SANDBOX_PEERS")
    if directory is None or not (program := Path(directory, path)).exists():
        raise SkippedError(f"there is no {path} in SANDBOX_PEERS")
    return str(program)


def find_python_peer(package: str) -> str:
    """Return the interpreter that can import a package. Raises SkippedError."""
    program = find_peer("venv/bin/python")
    if subprocess.run([program, "-c", f"import {package}"], capture_output=True, check=False).returncode:
        raise SkippedError(f"{package} is not installed in SANDBOX_PEERS/venv")
    return program


class TaskContender:
    """Runs the work as a task of a server with one runtime."""

    def __init__(self, name: str, deployment: Deployment) -> None:
        self.meter = CpuMeter(name)
        self.clone_seconds: list[float] = []
        self.phases: dict[str, list[float]] = {phase: [] for phase, _, _ in PHASES}
        self._deployment = make_deployment(deployment.directory / name)
        self._deployment.runtime = name
        self._deployment.model_url = deployment.model_url
        shutil.copy(deployment.home / ".gitconfig", self._deployment.home)
        try:
            self._deployment.start_server()
        except AssertionError as error:
            raise SkippedError(str(error).strip().splitlines()[-1]) from error
        server = self._deployment.server.ready_message["pid"]
        self.meter.add(server)
        for fork_server in wait_until(lambda: child_processes(server), RUN_SECONDS, "the fork server of the runners"):
            self.meter.add(fork_server)

    def run(self, number: int) -> None:
        """Run one task until it has completed."""
        name = f"compare-{number}"
        self._deployment.submit(name)
        status = self._deployment.wait(name, RUN_SECONDS)
        if status["state"] != "completed":
            raise SkippedError(self._deployment.diagnostics(name)[-1000:])

    def note_phases(self, number: int) -> None:
        """Store the durations of the phases of a task, according to its journal."""
        changes = [one for one in self._deployment.wire_events(f"compare-{number}") if one["type"] == "state_change"]
        at = {one["new_state"]: datetime.fromisoformat(one["timestamp"]) for one in changes}
        for phase, first, last in PHASES:
            self.phases[phase].append((at[last] - at[first]).total_seconds())
        self.clone_seconds.append(self.phases["disk and clone"][-1])

    def clean_up(self) -> None:
        """Do nothing: the teardown is part of the task."""

    def close(self) -> None:
        """Stop the server."""
        self._deployment.close()


def child_processes(pid: int) -> list[int]:
    """Return the children of all threads of a process."""
    listings = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for listing in listings for child in listing.read_text().split()]


CONTENDERS = {
    BARE: PlainContender,
    **dict.fromkeys(RUNTIMES, TaskContender),
    "docker": DockerContender,
    "sandbox-runtime": SandboxRuntimeContender,
    "swe-rex": SweRexContender,
    "prefect": PrefectContender,
}


def main() -> None:
    """Run the benchmark and print the results."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    names = list(dict.fromkeys((BARE, *(sys.argv[2:] or CONTENDERS))))
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}"
    )
    print(f"load before: {os.getloadavg()[0]:.2f}", flush=True)
    with tempfile.TemporaryDirectory(prefix="compare-") as folder, started(Path(folder), names) as contenders:
        measured = measure(contenders, rounds)
    for name, runs in measured.items():
        print_times(name, runs, measured[BARE])
    for name, contender in contenders.items():
        if isinstance(contender, TaskContender):
            print_phases(name, contender, contenders[BARE].clone_seconds)
    print(f"load after: {os.getloadavg()[0]:.2f}")


@contextlib.contextmanager
def started(folder: Path, names: list[str]) -> Iterator[dict[str, PlainContender | TaskContender]]:
    """Start git, the model and the contenders that work. Each contender does the work once before the measurement."""
    deployment = make_deployment(folder / "shared")
    contenders: dict[str, PlainContender | TaskContender] = {}
    try:
        make_repository(deployment.repositories / "repo.git", {"README.md": "# Hi\n"})
        deployment.start_git()
        deployment.start_model(reply_turn())
        for name in names:
            try:
                contenders[name] = CONTENDERS[name](name, deployment)
                contenders[name].run(-1)
                contenders[name].clean_up()
            except (SkippedError, subprocess.TimeoutExpired) as error:
                if name == BARE:
                    raise
                print(f"{name}: skipped, {error}", flush=True)
                close(contenders.pop(name, None))
        yield contenders
    finally:
        for contender in contenders.values():
            close(contender)
        deployment.close()


def make_deployment(directory: Path) -> Deployment:
    """Return a deployment without processes."""
    directory.mkdir()
    return Deployment(directory, forks=False)


def close(contender: PlainContender | TaskContender | None) -> None:
    """Stop the contender's processes."""
    if isinstance(contender, TaskContender):
        contender.close()
    if contender is not None:
        contender.meter.close()


def measure(contenders: dict[str, PlainContender | TaskContender], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Run the contenders in turn, in a different order in each round. Return the wall and CPU times in seconds."""
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for contender in contenders.values():
        contender.clone_seconds.clear()
    names = list(contenders)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            contender = contenders[name]
            cpu_before, began = contender.meter.seconds(), time.perf_counter()
            contender.run(number)
            wall = time.perf_counter() - began
            time.sleep(0.05)  # the end of the runner's process
            measured[name].append((wall, contender.meter.seconds() - cpu_before))
            contender.clean_up()
            if isinstance(contender, TaskContender):
                contender.note_phases(number)
    return measured


def print_times(name: str, runs: list[tuple[float, float]], bare: list[tuple[float, float]]) -> None:
    """Print one line."""
    wall = [one for one, _ in runs]
    p99 = statistics.quantiles(wall, n=100, method="inclusive")[98] if len(wall) > 1 else wall[0]
    text = f"{name:16} wall {statistics.median(wall) * 1000:6.0f} ms (p99 {p99 * 1000:6.0f} ms)"
    text += f", CPU {statistics.median(cpu for _, cpu in runs) * 1000:6.0f} ms"
    for title, column in (("wall", 0), ("CPU", 1)):
        pairs = [(one[column], other[column]) for one, other in zip(runs, bare, strict=True)]
        extra = statistics.median(one - other for one, other in pairs) * 1000
        text += f"; {title} of bare +{extra:.0f} ms, x{statistics.median(one / other for one, other in pairs):.2f}"
    print(text, flush=True)


def print_phases(name: str, contender: TaskContender, bare_clone_seconds: list[float]) -> None:
    """Print the phases of the tasks, and the ratio of the clone."""
    medians = {phase: statistics.median(times) * 1000 for phase, times in contender.phases.items()}
    print(f"{name}: " + ", ".join(f"{phase} {value:.0f} ms" for phase, value in medians.items()))
    ratio = statistics.median(
        one / other for one, other in zip(contender.clone_seconds, bare_clone_seconds, strict=True)
    )
    print(f"{name}: disk and clone x{ratio:.2f} of {statistics.median(bare_clone_seconds) * 1000:.0f} ms")


if __name__ == "__main__":
    main()
