"""After a simulated reboot, running tasks end as lost and pending tasks start.

The simulation ends all processes and changes the boot id in the journals.
"""

import contextlib
import os
import re
import signal
from pathlib import Path
from zlib import crc32

from doubles.deployment import bash_turn, reply_turn, wait_until
from doubles.leftovers import find_leftovers

SLEEP_COMMAND = "python3 -c 'import time; time.sleep(600)'"


def reboot(deployment):
    """Kill all processes, change the boot id in the journals, and start the server."""
    deployment.server.stop(signal.SIGKILL)
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            command_line = (descriptor.parents[1] / "cmdline").read_bytes()
            if b"sandbox.bootstrap.runner" in command_line and str(deployment.data_dir) in str(descriptor.readlink()):
                os.kill(int(descriptor.parents[1].name), signal.SIGKILL)
    for records in deployment.data_dir.glob("tasks/*/journal/records"):
        records.write_bytes(b"".join(map(with_other_boot_id, records.read_bytes().splitlines(keepends=True))))
    deployment.start_server()


def with_other_boot_id(line):
    """Return the record with a different boot id of the same length, and a matching checksum."""
    payload = re.sub(rb'"boot_id":"[0-9a-f]', b'"boot_id":"g', line[9:-1])
    return b"%08x %b\n" % (crc32(payload), payload)


def test_running_task_ends_as_host_lost_and_pending_task_starts(deploy):
    deployment = deploy(bash_turn("echo line-1 > first.txt"), bash_turn(SLEEP_COMMAND), reply_turn())
    deployment.submit("ran", vm={"cpus": 16})
    deployment.submit("waited", vm={"cpus": 16})
    wait_until(lambda: deployment.status("ran")["progress"]["tool_calls"] == 2, 60, "the second tool call")
    assert deployment.status("waited")["state"] == "pending"
    reboot(deployment)
    status = deployment.wait("ran")
    assert (status["state"], status["error"]["code"]) == ("failed", "host_lost")
    assert "restarted" in status["error"]["message"]
    assert b"+line-1\n" in deployment.artifact("ran.patch", "ran")
    assert {"metadata.json", "transcript.ndjson"} <= deployment.artifact_names("ran")
    assert deployment.states("ran")[-3:] == ["running", "completing", "failed"]
    wait_until(lambda: deployment.status("waited")["state"] != "pending", 30, "the pending task to start")
    deployment.http.delete("/api/v1/tasks/waited?force=true")
    assert deployment.wait("waited")["state"] == "cancelled"
    wait_until(lambda: not find_leftovers(deployment.data_dir), 20, "no leftovers")
