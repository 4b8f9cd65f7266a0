"""An image is the root file system of a sandbox: complete, read-only and without the host's /usr."""

import asyncio
import io

import pytest

from doubles.image_archives import entry, layer, minimal_root
from sandbox.images.image_builder import finalize
from sandbox.images.rootfs_writer import RootFsWriter
from sandbox.images.tar_layers import ByteBudget, TarStream, apply_layer
from sandbox.interfaces.runtime import Command, SandboxSpec
from sandbox.interfaces.task_file_layout import new_attempt_id

ATTEMPT_ID = new_attempt_id()  # another process may run the same tests


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """An image with a few programs, in a directory that only its owner can enter."""
    private = tmp_path_factory.mktemp("images")
    private.chmod(0o700)
    root = private / "root"
    root.mkdir(mode=0o755)
    root.chmod(0o755)
    tree = RootFsWriter(root)
    for data in (minimal_root(), layer(entry("opt/tools/marker", b"of the image\n"))):
        apply_layer(TarStream(io.BytesIO(data), ByteBudget(1 << 32)), tree)
    finalize(tree)
    return root


@pytest.fixture
def run_line(runtime, disk, image, tmp_path):
    """Return a function that runs a shell line in a sandbox with the image, and returns stdout and stderr."""
    program = tmp_path / "program"
    program.write_bytes(b"#!/bin/sh\necho brought\n")
    program.chmod(0o755)

    async def run(line):
        handle = runtime.prepare(ATTEMPT_ID)
        spec = SandboxSpec(
            ATTEMPT_ID, disk, 1, 512 << 20, 128, programs={program: "/run/sandbox/bin/program"}, image=image
        )
        environment = {"PATH": "/run/sandbox/bin:/usr/bin:/bin", "HOME": "/home/agent"}
        try:
            sandbox = await runtime.create(handle, spec)
            streams = await sandbox.start(Command(["/bin/bash", "-c", line], environment, "/workspace"))
            texts = await asyncio.gather(*(stream.read() for stream in streams))
            await sandbox.wait()
        finally:
            await runtime.destroy(handle, disk)
        return "".join(text.decode() for text in texts).strip()

    return lambda line: asyncio.run(asyncio.wait_for(run(line), 90))


def test_sandbox_has_the_files_of_the_image_but_not_of_the_host(run_line):
    assert run_line("cat /opt/tools/marker; ls /usr/bin/python3 /usr/share") == (
        "of the image\n"
        "ls: cannot access '/usr/bin/python3': No such file or directory\n"
        "ls: cannot access '/usr/share': No such file or directory"
    )


def test_server_program_is_available_in_the_image(run_line):
    assert run_line("program") == "brought"


def test_image_is_read_only(run_line, image):
    paths = "/x /usr/x /etc/x /etc/passwd /opt/tools/marker /run/x /home/x /var/x"
    assert run_line(f"for p in {paths}; do echo x 2>/dev/null >$p && echo $p; done") == ""
    assert (image / "opt/tools/marker").read_text() == "of the image\n"
    assert not (image / "x").exists()


def test_workspace_home_and_tmp_are_writable(run_line, disk):
    assert run_line("for p in /workspace /home/agent /tmp /var/tmp; do echo x >$p/written && echo $p; done") == (
        "/workspace\n/home/agent\n/tmp\n/var/tmp"
    )
    assert (disk / "workspace/written").read_text() == "x\n"


def test_user_and_host_names_are_sandbox_specific(run_line):
    assert run_line("id -un; id -u; cat /etc/hostname; head -1 /etc/hosts; cat /etc/shadow 2>/dev/null") == (
        f"agent\n1000\n{ATTEMPT_ID}\n127.0.0.1 localhost"
    )
