"""Attacks succeed without a sandbox, so a denial in a sandbox is not caused by a defect in their code.

Each attack runs as root of the host in temporary mount, UTS and PID namespaces. Some attacks are omitted, because they
would change the host, exhaust its resources or stop this process (ptrace), or do not work on all hosts (modules).
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

from escape import attacks_on_credentials, attacks_on_resources, sandbox_attack_runner
from escape.attack_run import ATTACKS

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

UNCONFINED_COMMAND_PREFIX = (
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
ATTACK_TIMEOUT_SECONDS = 20
CREDENTIAL_ATTACKS = (
    *("the host's /etc/shadow", "root's home directory", "writing to the image", "writing to /etc"),
    *("the memory of the init process", "the file descriptors of the init process"),
    *("the root directory of the init process", "the working directory of the init process"),
    *("the output of the init process", "a file descriptor of another process"),
    *(
        "uid 0",
        "a capability",
        "a new user namespace",
        "a new mount namespace",
        "the namespace of another process",
        "a mount",
    ),
    *("pivot_root", "chroot", "sethostname"),
    *("uid 0, as root of a user namespace", "a new mount namespace, as root of a user namespace"),
    *("a mount over /etc, as root of a user namespace", "pivot_root, as root of a user namespace"),
    "sethostname, as root of a user namespace",
    *("a BPF program", "a BPF map", "performance counters (perf_event_open)", "userfaultfd", "io_uring"),
    *("a file by handle (open_by_handle_at)", "writing core_pattern", "writing memory settings"),
    *("writing settings that start programs", "writing settings that halt the machine"),
    *("the host's memory or disk devices", "a device node of a host disk (mknod)", "the kernel log"),
)
RESOURCE_ATTACKS = (
    *("all pseudo-terminals of the machine", "all AIO contexts of the machine", "a higher priority"),
    "real-time scheduling",
    *("BPF filters on thousands of sockets", "reuseport filters on thousands of sockets"),
    "large seccomp filters in many processes",
)
REDUCED_PRELUDE = f"{attacks_on_resources.PRELUDE}\nAIO_EVENTS, FILTER_BYTES = 8, 1 << 20"
"""The numbers are reduced, so that the host watch of another test does not report an escape."""

ATTACK_PARAMETERS = [
    *(pytest.param("credentials", name, attacks_on_credentials.PRELUDE, id=name) for name in CREDENTIAL_ATTACKS),
    *(pytest.param("resources", name, REDUCED_PRELUDE, id=name) for name in RESOURCE_ATTACKS),
]


@pytest.mark.parametrize(("kind", "name", "prelude"), ATTACK_PARAMETERS)
def test_attack_succeeds_without_a_sandbox(kind, name, prelude):
    marker = f"battery-{secrets.token_hex(6)}"
    attack = next(each for each in ATTACKS[kind] if each.name == name)
    entry = {"name": name, "attack": attack.attack, "control": attack.control, "hold_seconds": 0}
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:  # some attacks mount over /tmp
        path, results = Path(directory, "attacks.json"), Path(directory, "results.json")
        path.write_text(json.dumps({"prelude": f"MARKER = {marker!r}\n{prelude}", "attacks": [entry]}))
        command = [
            *UNCONFINED_COMMAND_PREFIX,
            sys.executable,
            sandbox_attack_runner.__file__,
            str(path),
            str(results),
            "1",
            str(ATTACK_TIMEOUT_SECONDS),
        ]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        finally:
            for directory_path in ("/tmp", "/etc", "/usr/bin"):
                with contextlib.suppress(FileNotFoundError):
                    Path(directory_path, marker).unlink()
        report = json.loads(results.read_text())[name]["attack"]
    assert report["outcome"] == "succeeded", report
