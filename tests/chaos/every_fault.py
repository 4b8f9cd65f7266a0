"""Every write-like call of a short task's life fails once, in every way; run by `script/chaos-faults`.

Prints a table of what came of it, for docs/chaos.md.
"""

import collections
import sys
import tempfile
import time
import traceback
from pathlib import Path

from doubles.faults import Fault
from doubles.faulty_attempt import FaultyLife, journal_of

ERRORS = ("ENOSPC", "EIO", "EINTR")
NTH_MAX = 400


def on_journal(life, task_id):
    return (journal_of(life, task_id),)


def on_index(life, _):
    return tuple(str(life.world.data_dir / name) for name in ("index.sqlite", "index.sqlite-wal"))


def on_everything(*_):
    return ()


PLACES = {"journal": on_journal, "index": on_index, "everything": on_everything}


def play(life, place, error, *, goes_on=False, step=1):
    """Each n until nothing is hit any more; gives counts of how the tasks ended, and the failures of the oracle."""
    ends, wrong = collections.Counter(), []
    for nth in range(1, NTH_MAX, step):
        task_id = f"{place}-{error.lower()}-{nth}{'-on' if goes_on else ''}"
        fault = Fault(error, nth, paths=PLACES[place](life, task_id), goes_on=goes_on)
        try:
            status, hits = life.live(task_id, fault)
        except Exception:
            wrong.append(f"{task_id}: {traceback.format_exc(limit=-2)}")
            print(wrong[-1], file=sys.stderr, flush=True)
            continue
        if not hits:
            break
        ends[status["error"]["code"] if status["error"] else status["state"]] += 1
        print(f"{task_id}: {status['state']} {status['error'] or ''} {hits[:3]}", file=sys.stderr, flush=True)
    return ends, wrong


def main(places, errors):
    failed = False
    print("| what fails | error | lives | how they ended | slowest health |\n| --- | --- | --- | --- | --- |")
    for place in places:
        for error in errors:
            for goes_on in (False, True) if error != "EINTR" else (False,):
                with tempfile.TemporaryDirectory(prefix="chaos-faults-") as directory:
                    begin, life = time.monotonic(), FaultyLife(Path(directory))
                    try:
                        ends, wrong = play(life, place, error, goes_on=goes_on)
                        life.judge_all()
                    except Exception:
                        wrong.append(traceback.format_exc(limit=-2))
                    finally:
                        life.close()
                    told = ", ".join(f"{count} {end}" for end, count in ends.most_common())
                    what = f"{place}, {'from the n-th on, for 4 s' if goes_on else 'the n-th call'}"
                    seconds = time.monotonic() - begin
                    lives = f"{ends.total()} in {seconds:.0f} s"
                    print(f"| {what} | {error} | {lives} | {told} | {life.slowest_seconds:.2f} s |", flush=True)
                    for each in wrong:
                        failed = True
                        print(each, file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    chosen = sys.argv[1:]
    places = [name for name in PLACES if name in chosen] or list(PLACES)
    sys.exit(main(places, [error for error in ERRORS if error in chosen] or list(ERRORS)))
