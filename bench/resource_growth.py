"""Runs thousands of short tasks on one server, and checks that its resource usage does not grow.

Run with the project's Python: python bench/resource_growth.py [TASKS [KEPT [DRAWING]]] (default: 2000 200, no drawing)

Runners and sandboxes are real; the agent is fake. After every KEPT tasks, all but the latest KEPT are pruned. Prints
the server's memory, descriptors, threads and files, and draws them as SVG. Exits with 1 if the second half of the run
needs more resources than the first half. The latest results are in docs/benchmarks.md.
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from doubles.deployment import FINAL_STATES, Deployment, make_repository, reply_turn, wait_until
from doubles.fake_agent import make_fake_agent
from doubles.leftovers import find_leftovers

PARALLEL_TASKS = 4
TASK_TIMEOUT_SECONDS, QUIET_SECONDS = 120, 15
SLACK = {"memory_mb": 1.15, "descriptors": 1.25, "threads": 1.25, "files": 1.25}
TITLES = {
    "memory_mb": "memory, MB",
    "descriptors": "descriptors",
    "threads": "threads",
    "files": "files below the data directory",
}


@dataclass(frozen=True, slots=True)
class Sample:
    """Resource usage of the server after `tasks` tasks."""

    tasks: int
    memory_mb: float
    descriptors: int
    threads: int
    files: int


def sample(deployment, tasks):
    """Measure the server's current resource usage."""
    process = Path(f"/proc/{deployment.server.ready_message['pid']}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return Sample(
        tasks,
        int(status["VmRSS"].split()[0]) / 1024,
        len(list((process / "fd").iterdir())),
        int(status["Threads"]),
        sum(1 for path in deployment.data_dir.rglob("*") if not path.is_dir()),
    )


def run_tasks(deployment, first, count):
    """Run tasks, PARALLEL_TASKS at a time; each must complete."""
    waiting, running = [f"short-{number}" for number in range(first, first + count)], {}
    while waiting or running:
        while waiting and len(running) < PARALLEL_TASKS:
            name = waiting.pop(0)
            deployment.submit(name, vm={"cpus": 1, "memory": "64M", "disk": "64M"})
            running[name] = time.monotonic()
        for name, began in list(running.items()):
            status = deployment.status(name)
            if status["state"] in FINAL_STATES:
                assert status["state"] == "completed", deployment.diagnostics(name)
                del running[name]
            assert time.monotonic() - began < TASK_TIMEOUT_SECONDS, deployment.diagnostics(name)
        time.sleep(0.02)


def prune(deployment, kept):
    """Prune all tasks except the latest `kept`."""
    command = [sys.executable, "-m", "sandbox", "admin", "prune", "--keep", str(kept)]
    command += ["--server", deployment.server.ready_message["http"]]
    subprocess.run(command, check=True, timeout=120, stdout=subprocess.DEVNULL)


def find_growth(samples):
    """Yield each measure whose maximum in the second half exceeds that in the first half by more than the slack."""
    early, late = samples[1 : len(samples) // 2 + 1], samples[len(samples) // 2 + 1 :]
    for name, factor in SLACK.items():
        before, after = (max(getattr(each, name) for each in half) for half in (early, late))
        if after > before * factor:
            yield f"{TITLES[name]}: maximum {before:.0f} in the first half, {after:.0f} in the second"


def draw(samples):
    """Draw four curves, each from zero to its maximum."""
    width, height, gap = 340, 90, 44
    parts = []
    for number, (name, title) in enumerate(TITLES.items()):
        left, top = (number % 2) * (width + gap) + 20, number // 2 * (height + gap) + 30
        peak = max(getattr(each, name) for each in samples)
        points = " ".join(
            f"{left + width * each.tasks / samples[-1].tasks:.1f},{top + height * (1 - getattr(each, name) / peak):.1f}"
            for each in samples
        )
        parts += [
            f'<text x="{left}" y="{top - 8}">{title}: peak {peak:.0f}</text>',
            f'<path d="M{left},{top} v{height} h{width}"/>',
            f'<polyline points="{points}"/>',
            f'<text x="{left + width}" y="{top + height + 14}" text-anchor="end">{samples[-1].tasks} tasks</text>',
        ]
    style = "text{font:12px sans-serif;fill:#888} path{fill:none;stroke:#888}"
    style += " polyline{fill:none;stroke:#2f81f7;stroke-width:2}"
    size = f'width="{2 * width + gap + 40}" height="{2 * (height + gap) + 20}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>{"".join(parts)}</svg>\n'


def main():
    """Run the benchmark and print the samples."""
    tasks, kept = (int(sys.argv[n]) if len(sys.argv) > n else default for n, default in ((1, 2000), (2, 200)))
    with tempfile.TemporaryDirectory(prefix="long-life-") as directory:
        deployment = Deployment(Path(directory), forks=False)
        try:
            make_repository(deployment.repositories / "repo.git", {"README.md": "# Hi\n"})
            deployment.start_git()
            deployment.start_model(reply_turn())
            make_fake_agent(deployment.directory / "agent", [("at work", 0.05)] * 4)
            deployment.start_server(
                PYTHONPATH=str(deployment.directory / "agent"),
                SANDBOX_ACCESS_REQUESTS_PER_MINUTE="0",
                SANDBOX_LOG_LEVEL="error",
            )
            begin, samples = time.monotonic(), [sample(deployment, 0)]
            for first in range(0, tasks, kept):
                run_tasks(deployment, first, kept)
                prune(deployment, kept)
                samples.append(sample(deployment, first + kept))
                print(f"{time.monotonic() - begin:6.0f} s  {samples[-1]}", flush=True)
            wait_until(lambda: not find_leftovers(deployment.data_dir), QUIET_SECONDS, "all leftovers to be removed")
        finally:
            deployment.close()
    if len(sys.argv) > 3:
        Path(sys.argv[3]).write_text(draw(samples))
    if growth := list(find_growth(samples)):
        sys.exit("\n".join(growth))
    print("no growth, no leftovers")


if __name__ == "__main__":
    main()
