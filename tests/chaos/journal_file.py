"""A task's journal on disk, read without any of Sandbox's code."""

import json

FINAL_STATES = {"completed", "failed", "failed_preserved", "cancelled"}


def read_records(data_dir, task_id):
    """Return the complete lines as JSON; a partly written line is ignored."""
    try:
        text = (data_dir / "tasks" / task_id / "journal" / "records").read_bytes()
    except FileNotFoundError:
        return []
    return [json.loads(line[9:]) for line in text.split(b"\n")[:-1]]


def state_of(records):
    return next((record["transition"]["new_state"] for record in reversed(records) if "transition" in record), "")


def latest_attempt_id(records):
    """Return the id of the latest attempt; None before the first attempt."""
    events = (record["event"] for record in reversed(records))
    return next((event["attempt_id"] for event in events if event["type"] == "attempt_started"), None)


def stdout_of(records):
    events = (record["event"] for record in records if record["event"]["type"] == "output")
    return "".join(event["text"] for event in events if event["stream"] == "stdout").encode()
