"""Runs many tasks sequentially and in parallel on one tier, and checks that nothing is left on the machine.

Run with the project's Python: python bench/soak.py [TIER [IN_A_ROW [AT_ONCE]]]    (defaults: bubblewrap, 200, 20)

Server and Claude Code are real; the model is scripted. Exits with 1 if a task does not complete, or a process, mount,
namespace, loop device, control group, socket or file is left. The latest results are in docs/benchmarks.md.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from doubles.leftovers import find_leftovers
from doubles.live_server import Deployment, bash, make_repository, reply, wait_until

TASK_SECONDS = 600
QUIET_SECONDS = 10


def play(deployment, names):
    """Submit all tasks and wait for them; return the duration of each in seconds."""
    began = {}
    for name in names:
        began[name] = time.monotonic()
        deployment.submit(name, vm={"cpus": 1, "memory": "1G", "disk": "1G"})
    took = []
    for name in names:
        status = deployment.wait(name, TASK_SECONDS)
        assert status["state"] == "completed", deployment.diagnostics(name)
        took.append(time.monotonic() - began[name])
    return took


def main():
    tier = sys.argv[1] if len(sys.argv) > 1 else "bubblewrap"
    in_a_row, at_once = (int(sys.argv[n]) if len(sys.argv) > n else default for n, default in ((2, 200), (3, 20)))
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        deployment = Deployment(Path(directory), forks=False)
        try:
            make_repository(deployment.repositories / "repo.git", {"README.md": "# Hi\n"})
            deployment.start_git()
            deployment.start_model(bash("echo soaked > soaked.txt"), reply())
            deployment.start_server(SANDBOX_RUNTIME=tier)
            took = [play(deployment, [f"row-{number}"])[0] for number in range(in_a_row)]
            print(
                f"{tier}: {in_a_row} in sequence, each {statistics.median(took):.2f} s (median), max {max(took):.2f} s"
            )
            if at_once:
                took = play(deployment, [f"crowd-{number}" for number in range(at_once)])
                print(f"{tier}: {at_once} in parallel, all completed after {max(took):.2f} s")
            wait_until(lambda: not find_leftovers(deployment.data_dir), QUIET_SECONDS, "all leftovers to be removed")
            print(f"{tier}: no leftovers")
        except AssertionError as error:
            sys.exit(f"{tier}: {error}; leftovers: {find_leftovers(deployment.data_dir)}")
        finally:
            deployment.close()


if __name__ == "__main__":
    main()
