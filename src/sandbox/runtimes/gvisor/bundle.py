"""What runsc is given: a root file system below the launcher's stage, and config.json.

config.json holds the environment, and so does the state that runsc writes of it: both are in memory, the one without a
name, the other in a file system that nothing but the sandbox's own runsc has in sight and that ends with it.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from sandbox.interfaces.layout import UID
from sandbox.interfaces.runtime import Command, SandboxSpec
from sandbox.runtimes import launcher_client
from sandbox.runtimes.disk_layout import PLACES
from sandbox.runtimes.launcher_client import Payload, refuse_nul
from sandbox.runtimes.programs import launcher, process_limits
from sandbox.runtimes.rootfs import Root, describe_root

STATE = f"{launcher.STAGE}/state"
BUNDLE = f"{launcher.STAGE}/bundle"
_ROOT = "root"
_MOUNT_POINTS = (*PLACES.values(), "/dev", "/proc", "/sys")
_NAMESPACES = ("pid", "ipc", "uts", "mount")
Entry = tuple[str, str, str]


def lay_out(spec: SandboxSpec) -> Iterator[Entry]:
    """What the launcher lays beside the disk's places: runsc's own directories, and the sandbox's /."""
    yield ("own", "state", "")
    yield ("link", "bundle/config.json", f"/proc/self/fd/{launcher.FIRST_DESCRIPTOR}")
    yield from _root(describe_root(spec))


def _root(root: Root) -> Iterator[Entry]:
    if root.image is not None:
        yield ("image", _ROOT, str(root.image))
    for place in root.covered:
        yield ("memory", _ROOT + place, "")
    for directory in (*root.directories, *(_MOUNT_POINTS if root.image is None else ())):
        yield ("directory", _ROOT + directory, "")
    for link, target in root.links.items():
        yield ("link", _ROOT + link, target)
    for path in filter(_is_there, root.host_paths):
        yield ("image", _ROOT + path, path)
    for path, content in root.files.items():
        yield ("file", _ROOT + path, content.decode())
    # gVisor runs no program that the agent cannot read.
    for source, inside in root.parts.items():
        yield ("program", _ROOT + inside, str(source))


def _is_there(path: str) -> bool:
    return Path(path).exists()


def encode_config(spec: SandboxSpec, command: Command) -> bytes:
    """config.json of the sandbox's one command. Raises AttemptError (provision_failed) for NUL characters."""
    config = {
        "ociVersion": "1.0.2",
        "hostname": spec.attempt_id,
        "root": {"path": f"{launcher.STAGE}/{_ROOT}", "readonly": True},
        "process": {**_process(command), "rlimits": list(_limits(spec))},
        "mounts": [*_kernels_mounts(spec), *_places()],
        "linux": {"namespaces": [{"type": name} for name in _NAMESPACES]},
    }
    return msgspec.json.encode(config)


def encode_process(command: Command) -> bytes:
    """process.json of a further command on a terminal. Raises AttemptError (provision_failed) for NUL characters."""
    return msgspec.json.encode({**_process(command), "terminal": True})


def _process(command: Command) -> Mapping[str, Any]:
    variables = {"PWD": command.directory, **command.environment}
    words = [f"{name}={value}" for name, value in variables.items()]
    refuse_nul([*words, *command.argv])
    return {
        "user": {"uid": UID, "gid": UID},
        "args": [_as_text(word) for word in command.argv],
        "env": [_as_text(word) for word in words],
        "cwd": command.directory,
        "capabilities": {},
        "noNewPrivileges": True,
    }


def _as_text(word: str) -> str:
    """JSON holds text only; what is none becomes a question mark."""
    return word.encode(errors="replace").decode()


def _limits(spec: SandboxSpec) -> Iterator[Mapping[str, Any]]:
    for name, soft, hard in (
        ("NPROC", spec.processes_max, spec.processes_max),
        ("CORE", 0, 0),
        ("NOFILE", process_limits.OPEN_FILES_SOFT_MAX, process_limits.OPEN_FILES_MAX),
    ):
        yield {"type": f"RLIMIT_{name}", "soft": soft, "hard": hard}


def _kernels_mounts(spec: SandboxSpec) -> Iterator[Mapping[str, Any]]:
    """Of gVisor's own kernel: nothing of the host is in them."""
    yield {"destination": "/proc", "type": "proc", "source": "proc"}
    yield {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]}
    yield {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"}
    size = f"size={spec.memory_bytes // 2}"
    yield {"destination": "/dev/shm", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777", size]}  # noqa: S108


def _places() -> Iterator[Mapping[str, Any]]:
    for name, inside in PLACES.items():
        options = ["rbind", "rw", "nosuid", "nodev"]
        yield {"destination": inside, "type": "bind", "source": f"{launcher.STAGE}/{name}", "options": options}


_FLAGS = (
    f"--root={STATE}",
    "--platform=systrap",
    # The "host" is the sandbox's own network namespace, in which only the gateway listens.
    "--network=host",
    # Without it what is written stays in memory and never comes to the workspace.
    "--overlay2=none",
    # The launcher is in the sandbox's control group already, and so is whatever it becomes.
    "--ignore-cgroups",
)


def build_payload(program: str, spec: SandboxSpec, command: Command, log: int) -> Payload:
    """Everything for the start. `log` is the descriptor of runsc's own messages, taken over.

    Raises AttemptError (provision_failed) for NUL characters.
    """
    payload = Payload()
    try:
        config = encode_config(spec, command)
        # The first one: the bundle's config.json is a link to its number.
        payload.place(launcher_client.write_memory("config", config))
        log_number = payload.place(log)
    except BaseException:
        payload.close()
        os.close(log)
        raise
    marker = launcher_client.mark_attempt(spec.attempt_id)
    flags = (*_FLAGS, f"--log-fd={log_number}", "--log-format=json")
    payload.argv = [program, marker, *flags, "run", f"--bundle={BUNDLE}", spec.attempt_id]
    return payload


def signal_words(program: str, attempt_id: str, number: int) -> list[str]:
    """To signal the sandbox's command and nothing else."""
    return [program, *_FLAGS, "kill", attempt_id, str(number)]


def execute_words(program: str, attempt_id: str, process: int, log: int, begun: int) -> list[str]:
    """To run a further command, on the terminal that runsc itself has. The numbers are of files in memory."""
    files = [f"--process=/proc/self/fd/{process}", f"--internal-pid-file=/proc/self/fd/{begun}"]
    return [program, *_FLAGS, f"--log-fd={log}", "exec", *files, attempt_id]
