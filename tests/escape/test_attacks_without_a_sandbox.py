"""Attacks succeed where nothing holds them: their code is no reason that a sandbox seems to refuse them.

Each runs as root of the host in mount, name and process namespaces that are thrown away. Left out is what would
change the host all the same, use up what it has, stop the battery (ptrace), or not be there on all hosts (modules).
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

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may do all of it")

UNHELD = ("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private")
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
MODEST = f"{attacks_on_resources.PRELUDE}\nAIO_EVENTS, FILTERS = 8, 1 << 20"
"""Without what another test's watch of the host would take for an escape."""

ALL = [
    *(pytest.param("credentials", name, attacks_on_credentials.PRELUDE, id=name) for name in CREDENTIALS),
    *(pytest.param("resources", name, MODEST, id=name) for name in RESOURCES),
]


@pytest.mark.parametrize(("kind", "name", "prelude"), ALL)
def test_an_attack_succeeds_where_nothing_holds_it(kind, name, prelude):
    marker = f"battery-{secrets.token_hex(6)}"
    attack = next(one for one in ATTACKS[kind] if one.name == name)
    given = {"name": name, "attack": attack.attack, "twin": attack.twin, "hold_seconds": 0}
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:  # attacks cover /tmp
        path, results = Path(directory, "given.json"), Path(directory, "results.json")
        path.write_text(json.dumps({"prelude": f"MARKER = {marker!r}\n{prelude}", "attacks": [given]}))
        command = [*UNHELD, sys.executable, battery.__file__, str(path), str(results), "1", str(SECONDS)]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        finally:
            for place in ("/tmp", "/etc", "/usr/bin"):
                with contextlib.suppress(FileNotFoundError):
                    Path(place, marker).unlink()
        report = json.loads(results.read_text())[name]["attack"]
    assert report["outcome"] == "through", report
