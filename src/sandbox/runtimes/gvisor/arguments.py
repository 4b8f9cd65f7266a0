"""runsc's command lines."""

import os

from sandbox.contracts.runtime import Command, SandboxSpec
from sandbox.runtimes import launch
from sandbox.runtimes.gvisor.bundle import BUNDLE, STATE, encode_config
from sandbox.runtimes.payload import Payload

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
        payload.place(launch.write_memory("config", config))
        log_number = payload.place(log)
    except BaseException:
        payload.close()
        os.close(log)
        raise
    marker = launch.mark_attempt(spec.attempt_id)
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
