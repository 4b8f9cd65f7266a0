"""A task's journal as it lies on disk, read without any code of Sandbox's."""

import json

TERMINAL = {"completed", "failed", "failed_preserved", "cancelled"}


def read_records(data_dir, task_id):
    """Whole lines as JSON; what is half written is not there yet."""
    try:
        text = (data_dir / "tasks" / task_id / "journal" / "records").read_bytes()
    except FileNotFoundError:
        return []
    return [json.loads(line[9:]) for line in text.split(b"\n")[:-1]]


def state_of(records):
    return next((one["transition"]["new_state"] for one in reversed(records) if "transition" in one), "")


def attempt_of(records):
    """The id of the latest attempt; None before the first one."""
    events = (one["event"] for one in reversed(records))
    return next((event["attempt_id"] for event in events if event["type"] == "attempt_started"), None)


def stdout_of(records):
    events = (one["event"] for one in records if one["event"]["type"] == "output")
    return "".join(event["text"] for event in events if event["stream"] == "stdout").encode()
