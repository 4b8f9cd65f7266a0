"""A worker for engine tests: records what happens to it in a directory that it shares with the test.

Usage: engine_worker.py DIRECTORY ACTION [ARGUMENT...], with one of these actions:

    exit CODE   exit immediately
    wait        wait for SIGTERM, then exit with 143
    clean       wait for SIGTERM, then exit with 0
    stubborn    ignore SIGTERM
    leave       start another process that survives the worker, then exit with 0
"""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

HEARTBEAT_SECONDS = 0.1


class ActivityLog:
    """The events of all workers that use the directory, as one JSON line per event."""

    def __init__(self, directory):
        self.path = Path(directory, "activity")

    def append(self, **event):
        with self.path.open("ab", buffering=0) as file:
            file.write(json.dumps(event).encode() + b"\n")

    def read(self, kind=None):
        """Return the events of one kind, or all events."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        events = [json.loads(line) for line in lines]
        return [event for event in events if kind in (None, event["kind"])]


def main(directory, action, *arguments):
    worker_id = uuid.uuid4().hex
    activity = ActivityLog(directory)

    def terminate(*_):
        activity.append(kind="term", worker=worker_id)
        if action != "stubborn":
            sys.exit(0 if action == "clean" else 143)

    signal.signal(signal.SIGTERM, terminate)
    activity.append(kind="start", worker=worker_id, arguments=arguments, environment=dict(os.environ))
    if action == "exit":
        sys.exit(int(arguments[0]))
    if action == "leave":
        subprocess.Popen([sys.executable, "-I", "-S", __file__, directory, "stubborn"], start_new_session=True)
        while len(activity.read("heartbeat")) < 3:
            time.sleep(HEARTBEAT_SECONDS)
        return
    while True:
        activity.append(kind="heartbeat", worker=worker_id)
        time.sleep(HEARTBEAT_SECONDS)


if __name__ == "__main__":
    main(*sys.argv[1:])
