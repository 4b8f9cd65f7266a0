"""Every process that bubblewrap confines is isolated with the same arguments."""

import os
from pathlib import Path

import pytest

from sandbox.interfaces.runtime import Command, ConfinedCommand, ConfinementSpec, SandboxSpec
from sandbox.model.failure import AttemptError
from sandbox.runtimes.bubblewrap.command_line import build_program_spec
from sandbox.runtimes.bubblewrap_confinement import BubblewrapConfinement
from sandbox.runtimes.launcher_client import LauncherProcess
from sandbox.runtimes.limits.cgroups import ControlGroup
from sandbox.runtimes.programs.launcher import FIRST_HIGH_DESCRIPTOR
from sandbox.runtimes.qemu import command_lines
from sandbox.runtimes.qemu.command_lines import Accelerator, QemuDescriptors
from sandbox.runtimes.qemu.guest_components import GuestComponents

ATTEMPT_ID = "attemptattem"
BWRAP = "/usr/bin/bwrap"
ISOLATION = (
    "--unshare-user --unshare-pid --unshare-uts --unshare-cgroup-try --disable-userns --uid 1000 "
    f"--gid 1000 --hostname {ATTEMPT_ID} --new-session --die-with-parent --cap-drop ALL"
).split()


def null():
    return os.open("/dev/null", os.O_RDWR)


def sandbox(injected_text=""):
    spec = SandboxSpec(ATTEMPT_ID, Path("/data/attempt"), 2, 1 << 30, 64)
    return build_program_spec(BWRAP, spec, Command(["program", "argument"], {"A": injected_text}, "/workspace"), null())


class FakeLauncher(LauncherProcess):
    def __init__(self):
        pass

    async def run_command(self, argv, low_fds, descriptors):
        self.started = [argv, [os.dup(each) for each in descriptors]]
        return 0


async def confined_program(injected_text=""):
    launcher, directory = FakeLauncher(), Path("/data/attempt")
    programs = BubblewrapConfinement(
        ATTEMPT_ID, BWRAP, launcher, None, ConfinementSpec(1, 1 << 30, 10, [directory]), ControlGroup([]), None
    )
    await programs.run(ConfinedCommand(["program", "argument"], {"A": injected_text}, directory, 0, 1, 2))
    return launcher.started


def guest(injected_text=""):
    components = GuestComponents(
        "/virtiofsd", Path("/k"), [Path("/m/a.ko.xz")], Path("/py" + injected_text), Path("/py/python3")
    )
    spec = SandboxSpec(ATTEMPT_ID, Path("/data/attempt"), 2, 1 << 30, 64)
    guest_spec = command_lines.GuestSpec(spec, components, {}, Accelerator.TCG, Path("/run/s"))
    return command_lines.build_program_spec(BWRAP, guest_spec, QemuDescriptors(null(), null(), null(), null()), null())


async def bubblewrap_arguments(program, injected_text=""):
    """Return the argv of bubblewrap and the arguments in its file, and close the descriptors."""
    if program is confined_program:
        argv, descriptors = await confined_program(injected_text)
    else:
        program_spec = program(injected_text)
        argv, descriptors = program_spec.argv, program_spec.descriptors
    number = int(argv[argv.index("--args") + 1])
    text = os.pread(descriptors[number - FIRST_HIGH_DESCRIPTOR], 1 << 20, 0)
    for descriptor in descriptors:
        os.close(descriptor)
    assert number == FIRST_HIGH_DESCRIPTOR + len(descriptors) - 1
    return argv, text.decode().split("\0")[:-1]


every_program = pytest.mark.parametrize("program", [sandbox, confined_program, guest])


@every_program
async def test_isolation_arguments_come_first_for_every_program(program):
    argv, arguments = await bubblewrap_arguments(program)
    assert arguments[: len(ISOLATION)] == ISOLATION
    assert arguments.count("--add-seccomp-fd") == 1
    assert not any(word.startswith(("--share", "--cap-add")) for word in arguments)
    assert argv[:3] == [BWRAP, f"sandbox:{ATTEMPT_ID}", "--args"]
    assert argv[4] == "--"
    if program is not guest:
        assert argv[5:] == ["program", "argument"]


@every_program
async def test_nul_character_is_refused_and_every_descriptor_is_closed(program):
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with pytest.raises(AttemptError, match="NUL"):
        await bubblewrap_arguments(program, "a\0--bind")
    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
