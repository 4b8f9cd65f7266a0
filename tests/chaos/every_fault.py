"""Makes each write-like system call of a short task fail once with each error; run by `script/chaos-faults`.

Prints a table of the outcomes, for docs/chaos.md.
"""

import collections
import sys
import tempfile
import time
import traceback
from pathlib import Path

from doubles.fault_harness import FaultHarness, journal_path
from doubles.syscall_faults import Fault

ERRORS = ("ENOSPC", "EIO", "EINTR")
NTH_MAX = 400


def journal_target(harness, task_id):
    return (journal_path(harness, task_id),)


def index_target(harness, _):
    return tuple(str(harness.deployment.data_dir / name) for name in ("index.sqlite", "index.sqlite-wal"))


def any_target(*_):
    return ()


TARGETS = {"journal": journal_target, "index": index_target, "everything": any_target}


def run_faults(harness, target, error, *, is_persistent=False, step=1):
    """For each n, run a task whose n-th call fails, until a task makes fewer than n calls.

    Returns counts of the final states, and the failures.
    """
    counts, failures = collections.Counter(), []
    for nth in range(1, NTH_MAX, step):
        task_id = f"{target}-{error.lower()}-{nth}{'-on' if is_persistent else ''}"
        fault = Fault(error, nth, paths=TARGETS[target](harness, task_id), is_persistent=is_persistent)
        try:
            status, hits = harness.run_task(task_id, fault)
        except Exception:
            failures.append(f"{task_id}: {traceback.format_exc(limit=-2)}")
            print(failures[-1], file=sys.stderr, flush=True)
            continue
        if not hits:
            break
        counts[status["error"]["code"] if status["error"] else status["state"]] += 1
        print(f"{task_id}: {status['state']} {status['error'] or ''} {hits[:3]}", file=sys.stderr, flush=True)
    return counts, failures


def main(targets, errors):
    failed = False
    print("| failing calls | error | runs | outcomes | slowest health response |\n| --- | --- | --- | --- | --- |")
    for target in targets:
        for error in errors:
            for is_persistent in (False, True) if error != "EINTR" else (False,):
                with tempfile.TemporaryDirectory(prefix="chaos-faults-") as directory:
                    start, harness = time.monotonic(), FaultHarness(Path(directory))
                    try:
                        counts, failures = run_faults(harness, target, error, is_persistent=is_persistent)
                        harness.check_after_restart()
                    except Exception:
                        failures.append(traceback.format_exc(limit=-2))
                    finally:
                        harness.close()
                    outcomes = ", ".join(f"{count} {end}" for end, count in counts.most_common())
                    description = f"{target}, {'from the n-th on, for 4 s' if is_persistent else 'the n-th call'}"
                    seconds = time.monotonic() - start
                    runs = f"{counts.total()} in {seconds:.0f} s"
                    print(
                        f"| {description} | {error} | {runs} | {outcomes} | {harness.slowest_seconds:.2f} s |",
                        flush=True,
                    )
                    for failure in failures:
                        failed = True
                        print(failure, file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    arguments = sys.argv[1:]
    targets = [name for name in TARGETS if name in arguments] or list(TARGETS)
    sys.exit(main(targets, [error for error in ERRORS if error in arguments] or list(ERRORS)))
