"""The command lines of runsc: start a sandbox, signal its command, and run another command in it."""

import os

from sandbox.interfaces.runtime import Command, SandboxSpec
from sandbox.runtimes import launcher_client
from sandbox.runtimes.descriptor_passing import create_memfd
from sandbox.runtimes.gvisor.bundle import BUNDLE_DIRECTORY, STATE_DIRECTORY, encode_config
from sandbox.runtimes.launcher_client import ProgramSpec

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
