"""Runs many tasks sequentially and in parallel with one runtime, and checks that nothing is left on the machine.

Run with the project's Python: python bench/soak.py [RUNTIME [SEQUENTIAL [PARALLEL]]]    (defaults: bubblewrap, 200, 20)

Server and Claude Code are real; the model is scripted. Exits with 1 if a task does not complete, or a process, mount,
namespace, loop device, control group, socket or file is left behind. The latest results are in docs/benchmarks.md.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from doubles.deployment import Deployment, bash_turn, make_repository, reply_turn, wait_until
from doubles.leftovers import find_leftovers

TASK_TIMEOUT_SECONDS = 600
QUIET_SECONDS = 10


def run_tasks(deployment, names):
    """Submit all tasks and wait for them; return the duration of each in seconds."""
    began = {}
    for name in names:
        began[name] = time.monotonic()
        deployment.submit(name, vm={"cpus": 1, "memory": "1G", "disk": "1G"})
    durations = []
    for name in names:
        status = deployment.wait(name, TASK_TIMEOUT_SECONDS)
        assert status["state"] == "completed", deployment.diagnostics(name)
        durations.append(time.monotonic() - began[name])
    return durations


def main():
    runtime = sys.argv[1] if len(sys.argv) > 1 else "bubblewrap"
    sequential_count, parallel_count = (
        int(sys.argv[n]) if len(sys.argv) > n else default for n, default in ((2, 200), (3, 20))
    )
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        deployment = Deployment(Path(directory), forks=False)
        try:
            make_repository(deployment.repositories / "repo.git", {"README.md": "# Hi\n"})
            deployment.start_git()
            deployment.start_model(bash_turn("echo soaked > soaked.txt"), reply_turn())
            deployment.start_server(SANDBOX_RUNTIME=runtime)
            durations = [run_tasks(deployment, [f"row-{number}"])[0] for number in range(sequential_count)]
            median = statistics.median(durations)
            print(
                f"{runtime}: {sequential_count} in sequence, each {median:.2f} s (median), max {max(durations):.2f} s"
            )
            if parallel_count:
                durations = run_tasks(deployment, [f"parallel-{number}" for number in range(parallel_count)])
                print(f"{runtime}: {parallel_count} in parallel, all completed after {max(durations):.2f} s")
            wait_until(lambda: not find_leftovers(deployment.data_dir), QUIET_SECONDS, "all leftovers to be removed")
            print(f"{runtime}: no leftovers")
        except AssertionError as error:
            sys.exit(f"{runtime}: {error}; leftovers: {find_leftovers(deployment.data_dir)}")
        finally:
            deployment.close()


if __name__ == "__main__":
    main()
