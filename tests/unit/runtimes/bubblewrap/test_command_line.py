"""The command line of bubblewrap."""

import os
from pathlib import Path

import pytest

from sandbox.interfaces.runtime import Command, SandboxSpec
from sandbox.model.failure import AttemptError
from sandbox.runtimes.bubblewrap.command_line import build_program_spec, exposed_entries
from sandbox.runtimes.programs.launcher import FIRST_HIGH_DESCRIPTOR

SPEC = SandboxSpec("attemptattem", Path("/data/attempt"), 2, 1 << 30, 64, programs={Path("/data/tool"): "/opt/tool"})


def _arguments(command: Command, spec: SandboxSpec = SPEC) -> tuple[list[str], list[str]]:
    """Return the argv of bubblewrap, and the arguments that are passed through the file."""
    payload = build_program_spec("/usr/bin/bwrap", spec, command, os.open("/dev/null", os.O_WRONLY))
    try:
        number = int(payload.argv[payload.argv.index("--args") + 1])
        text = os.pread(payload.descriptors[number - FIRST_HIGH_DESCRIPTOR], 1 << 20, 0)
        return payload.argv, text.decode().split("\0")[:-1]
    finally:
        payload.close()


def test_environment_values_are_passed_through_the_file_only():
    argv, arguments = _arguments(Command(["/bin/sh", "-c", "true"], {"TOKEN": "a-secret", "EMPTY": ""}, "/workspace"))
    assert not any("a-secret" in word for word in argv)
    assert argv[-4:] == ["--", "/bin/sh", "-c", "true"]
    at = arguments.index("--clearenv")
    assert arguments[at:] == ["--clearenv", "--setenv", "TOKEN", "a-secret", "--setenv", "EMPTY", ""]


def test_command_line_contains_no_host_paths_of_the_task():
    argv, arguments = _arguments(Command(["/bin/true"], {}, "/workspace"))
    assert not any("/data" in word for word in (*argv, *arguments))
    assert ("overlay", "program-0", "/data/tool") in exposed_entries(SPEC)


def test_all_namespaces_except_those_of_the_launcher_are_unshared():
    _, arguments = _arguments(Command(["/bin/true"], {}, "/workspace"))
    unshared = {word for word in arguments if word.startswith("--unshare")}
    names = ("user", "pid", "uts", "cgroup-try")
    assert unshared == {f"--unshare-{name}" for name in names}
    assert {"--die-with-parent", "--new-session", "--disable-userns"} <= set(arguments)


@pytest.mark.parametrize(
    "command",
    [
        Command(["/bin/sh", "a\0b"], {}, "/workspace"),
        Command(["/bin/sh"], {"NAME": "a\0--bind"}, "/workspace"),
        Command(["/bin/sh"], {}, "/workspace\0--bind"),
    ],
)
def test_nul_characters_in_arguments_are_rejected(command: Command):
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with pytest.raises(AttemptError, match="NUL"):
        build_program_spec("/usr/bin/bwrap", SPEC, command, os.open("/dev/null", os.O_WRONLY))
    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
