"""Attacks succeed without a sandbox: a denial is not caused by a defect in their code.

Each runs as root of the host in temporary mount, UTS and PID namespaces. Omitted are attacks that would change the host
or use up its resources, stop the battery (ptrace), or do not work on all hosts (modules).
"""

import contextlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from escape import attacks_on_credentials, attacks_on_resources, battery
from escape.attack_runner import ATTACKS

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

UNCONFINED = (
    "unshare",
    "--mount",
    "--uts",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
    "--propagation",
    "private",
)
SECONDS = 20
CREDENTIALS = (
    *("the host's shadow file", "root's home", "writing to the image", "writing to /etc"),
    *("the memory of the first process inside", "the descriptors of the first process inside"),
    *("the root of the first process inside", "the working directory of the first process inside"),
    *("the output of the first process inside", "a descriptor of another process"),
    *("uid 0", "a capability", "a user namespace", "a mount namespace", "another process's namespace", "a mount"),
    *("another root", "a root of its own (chroot)", "another host name"),
    *("uid 0, as root of a user namespace", "a mount namespace, as root of a user namespace"),
    *("a file system over /etc, as root of a user namespace", "another root, as root of a user namespace"),
    "another host name, as root of a user namespace",
    *("a BPF program", "a BPF map", "performance counters", "userfaultfd", "io_uring"),
    *("a file by its handle", "writing core_pattern", "writing a setting of how memory is used"),
    *("writing a setting that starts programs", "writing a switch that stops the machine"),
    *("the host's memory or disks", "a device of the host's disks", "the kernel's log"),
)
RESOURCES = (
    *("all pseudo-terminals of the machine", "the machine's contexts for AIO", "a higher priority"),
    "real-time scheduling",
    *("filters on thousands of sockets", "filters on thousands of sockets that share a port"),
    "large filters on system calls in many processes",
)
REDUCED_PRELUDE = f"{attacks_on_resources.PRELUDE}\nAIO_EVENTS, FILTERS = 8, 1 << 20"
"""Reduced so that the host watch of another test does not report an escape."""

ALL = [
    *(pytest.param("credentials", name, attacks_on_credentials.PRELUDE, id=name) for name in CREDENTIALS),
    *(pytest.param("resources", name, REDUCED_PRELUDE, id=name) for name in RESOURCES),
]


@pytest.mark.parametrize(("kind", "name", "prelude"), ALL)
def test_attack_succeeds_without_a_sandbox(kind, name, prelude):
    marker = f"battery-{secrets.token_hex(6)}"
    attack = next(each for each in ATTACKS[kind] if each.name == name)
    entry = {"name": name, "attack": attack.attack, "control": attack.control, "hold_seconds": 0}
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:  # attacks cover /tmp
        path, results = Path(directory, "attacks.json"), Path(directory, "results.json")
        path.write_text(json.dumps({"prelude": f"MARKER = {marker!r}\n{prelude}", "attacks": [entry]}))
        command = [*UNCONFINED, sys.executable, battery.__file__, str(path), str(results), "1", str(SECONDS)]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        finally:
            for directory_path in ("/tmp", "/etc", "/usr/bin"):
                with contextlib.suppress(FileNotFoundError):
                    Path(directory_path, marker).unlink()
        report = json.loads(results.read_text())[name]["attack"]
    assert report["outcome"] == "succeeded", report
