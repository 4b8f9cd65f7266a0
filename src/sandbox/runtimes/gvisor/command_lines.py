"""The command lines of runsc, and the bundle that they run.

The commands start a sandbox, signal its command, and run another command in it. The bundle is a root file system under
the launcher's EXPOSED_DIRECTORY, and config.json. config.json contains the environment, and so does the state file
that runsc writes. Both are kept in memory: config.json is a nameless memfd; the state file is in a file system that is
visible only to the sandbox's runsc and that disappears with it.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from sandbox.interfaces.runtime import SANDBOX_UID, Command, SandboxSpec
from sandbox.runtimes import launcher_client
from sandbox.runtimes.launcher_client import ProgramSpec, create_memfd, reject_nul
from sandbox.runtimes.programs import inherited_limits, launcher
from sandbox.runtimes.sandbox_filesystem import DISK_DIRECTORIES, RootFsSpec, describe_rootfs

STATE_DIRECTORY = f"{launcher.EXPOSED_DIRECTORY}/state"
BUNDLE_DIRECTORY = f"{launcher.EXPOSED_DIRECTORY}/bundle"
_ROOT_NAME = "root"
_MOUNT_POINTS = (*DISK_DIRECTORIES.values(), "/dev", "/proc", "/sys")
_NAMESPACES = ("pid", "ipc", "uts", "mount")
ExposedEntry = tuple[str, str, str]


def exposed_entries(spec: SandboxSpec) -> Iterator[ExposedEntry]:
    """Yield additional entries for the launcher to expose: runsc's directories and the sandbox's /."""
    yield ("own", "state", "")
    yield ("link", "bundle/config.json", f"/proc/self/fd/{launcher.FIRST_HIGH_DESCRIPTOR}")
    yield from _rootfs_entries(describe_rootfs(spec))


def _rootfs_entries(root: RootFsSpec) -> Iterator[ExposedEntry]:
    if root.image is not None:
        yield ("image", _ROOT_NAME, str(root.image))
    for mount_path in root.tmpfs_mounts:
        yield ("memory", _ROOT_NAME + mount_path, "")
    for directory in (*root.directories, *(_MOUNT_POINTS if root.image is None else ())):
        yield ("directory", _ROOT_NAME + directory, "")
    for link, target in root.links.items():
        yield ("link", _ROOT_NAME + link, target)
    for path in filter(_exists, root.host_paths):
        yield ("image", _ROOT_NAME + path, path)
    for path, content in root.files.items():
        yield ("file", _ROOT_NAME + path, content.decode())
    # gVisor runs only programs that the agent can read.
    for source, sandbox_path in root.mounts.items():
        yield ("program", _ROOT_NAME + sandbox_path, str(source))


def _exists(path: str) -> bool:
    return Path(path).exists()


def encode_config(spec: SandboxSpec, command: Command) -> bytes:
    """Encode config.json for the sandbox's command. Raises AttemptError (provision_failed) for NUL characters."""
    config = {
        "ociVersion": "1.0.2",
        "hostname": spec.attempt_id,
        "root": {"path": f"{launcher.EXPOSED_DIRECTORY}/{_ROOT_NAME}", "readonly": True},
        "process": {**_process_config(command), "rlimits": list(_rlimits(spec))},
        "mounts": [*_kernel_mounts(spec), *_disk_mounts()],
        "linux": {"namespaces": [{"type": name} for name in _NAMESPACES]},
    }
    return msgspec.json.encode(config)


def encode_process(command: Command) -> bytes:
    """Encode process.json for another command on a pty. Raises AttemptError (provision_failed) for NUL characters."""
    return msgspec.json.encode({**_process_config(command), "terminal": True})


def _process_config(command: Command) -> Mapping[str, Any]:
    variables = {"PWD": command.directory, **command.environment}
    arguments = [f"{name}={value}" for name, value in variables.items()]
    reject_nul([*arguments, *command.argv])
    return {
        "user": {"uid": SANDBOX_UID, "gid": SANDBOX_UID},
        "args": [_as_text(word) for word in command.argv],
        "env": [_as_text(word) for word in arguments],
        "cwd": command.directory,
        "capabilities": {},
        "noNewPrivileges": True,
    }


def _as_text(word: str) -> str:
    """Replace undecodable bytes with question marks, because JSON contains text only."""
    return word.encode(errors="replace").decode()


def _rlimits(spec: SandboxSpec) -> Iterator[Mapping[str, Any]]:
    for name, soft, hard in (
        ("NPROC", spec.processes_max, spec.processes_max),
        ("CORE", 0, 0),
        ("NOFILE", inherited_limits.OPEN_FILES_SOFT_MAX, inherited_limits.OPEN_FILES_MAX),
    ):
        yield {"type": f"RLIMIT_{name}", "soft": soft, "hard": hard}


def _kernel_mounts(spec: SandboxSpec) -> Iterator[Mapping[str, Any]]:
    """Yield the mounts that gVisor's kernel provides. They do not expose any of the host's data."""
    yield {"destination": "/proc", "type": "proc", "source": "proc"}
    yield {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]}
    yield {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"}
    size = f"size={spec.memory_bytes // 2}"
    yield {"destination": "/dev/shm", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777", size]}  # noqa: S108


def _disk_mounts() -> Iterator[Mapping[str, Any]]:
    for name, sandbox_path in DISK_DIRECTORIES.items():
        options = ["rbind", "rw", "nosuid", "nodev"]
        yield {
            "destination": sandbox_path,
            "type": "bind",
            "source": f"{launcher.EXPOSED_DIRECTORY}/{name}",
            "options": options,
        }


_RUNSC_FLAGS = (
    f"--root={STATE_DIRECTORY}",
    "--platform=systrap",
    # The "host" is the sandbox's own network namespace, in which only the gateway listens.
    "--network=host",
    # Without this option, files stay in memory and are never written to the workspace.
    "--overlay2=none",
    # The launcher is already in the sandbox's control group, so all programs that it starts are too.
    "--ignore-cgroups",
)


def build_program_spec(program: str, spec: SandboxSpec, command: Command, log_fd: int) -> ProgramSpec:
    """Build the argv and descriptors that start the sandbox.

    log_fd: descriptor for runsc's log messages; ownership passes to the result. Raises AttemptError (provision_failed)
    for NUL characters.
    """
    program_spec = ProgramSpec()
    try:
        config = encode_config(spec, command)
        # Add this descriptor first: the bundle's config.json is a symbolic link to /proc/self/fd/FIRST_HIGH_DESCRIPTOR.
        program_spec.add_descriptor(create_memfd("config", config))
        log_number = program_spec.add_descriptor(log_fd)
    except BaseException:
        program_spec.close()
        os.close(log_fd)
        raise
    marker = launcher_client.attempt_marker(spec.attempt_id)
    flags = (*_RUNSC_FLAGS, f"--log-fd={log_number}", "--log-format=json")
    program_spec.argv = [program, marker, *flags, "run", f"--bundle={BUNDLE_DIRECTORY}", spec.attempt_id]
    return program_spec


def kill_arguments(program: str, attempt_id: str, number: int) -> list[str]:
    """Return the argv that signals the sandbox's command and no other process."""
    return [program, *_RUNSC_FLAGS, "kill", attempt_id, str(number)]


def exec_arguments(program: str, attempt_id: str, process: int, log: int, started: int) -> list[str]:
    """Return the argv that runs another command on runsc's own terminal. The numbers are descriptors of memfds."""
    files = [f"--process=/proc/self/fd/{process}", f"--internal-pid-file=/proc/self/fd/{started}"]
    return [program, *_RUNSC_FLAGS, f"--log-fd={log}", "exec", *files, attempt_id]
