"""Many tasks, one after the other and many at once, in one tier; then the machine must be as it was before.

Run with the project's Python: python bench/soak.py [TIER [IN_A_ROW [AT_ONCE]]]    (bubblewrap, 200 and 20 without)

The real server, the real Claude Code, a scripted model. Exits with 1 when a task does not complete, or when a process,
mount, namespace, loop device, control group, socket or file is left. docs/benchmarks.md has the last results.
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


def play(world, names):
    """Submit all, wait for all; gives how long each took, in seconds."""
    began = {}
    for name in names:
        began[name] = time.monotonic()
        world.submit(name, vm={"cpus": 1, "memory": "1G", "disk": "1G"})
    took = []
    for name in names:
        status = world.wait(name, TASK_SECONDS)
        assert status["state"] == "completed", world.diagnostics(name)
        took.append(time.monotonic() - began[name])
    return took


def main():
    tier = sys.argv[1] if len(sys.argv) > 1 else "bubblewrap"
    in_a_row, at_once = (int(sys.argv[n]) if len(sys.argv) > n else default for n, default in ((2, 200), (3, 20)))
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        world = Deployment(Path(directory), forks=False)
        try:
            make_repository(world.repositories / "repo.git", {"README.md": "# Hi\n"})
            world.start_git()
            world.start_model(bash("echo soaked > soaked.txt"), reply())
            world.start_server(SANDBOX_RUNTIME=tier)
            took = [play(world, [f"row-{number}"])[0] for number in range(in_a_row)]
            print(
                f"{tier}: {in_a_row} in a row, each {statistics.median(took):.2f} s (median), {max(took):.2f} s at most"
            )
            if at_once:
                took = play(world, [f"crowd-{number}" for number in range(at_once)])
                print(f"{tier}: {at_once} at once, all done after {max(took):.2f} s")
            wait_until(lambda: not find_leftovers(world.data_dir), QUIET_SECONDS, "the machine to be as it was before")
            print(f"{tier}: nothing is left")
        except AssertionError as error:
            sys.exit(f"{tier}: {error}; left: {find_leftovers(world.data_dir)}")
        finally:
            world.close()


if __name__ == "__main__":
    main()
