"""An image is the / of a sandbox in every runtime: whole, read-only, with nothing of the host's own /usr."""

import asyncio
import io

import pytest

from doubles.image_archives import entry, layer, small_root
from sandbox.images.finalize import finalize
from sandbox.images.oci.layer import apply_layer
from sandbox.images.oci.tar_stream import ByteBudget, TarStream
from sandbox.images.rootfs import RootFs
from sandbox.interfaces.runtime import Command, SandboxSpec

ATTEMPT = "imageimageim"


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """An image with a few programs, in a directory that nobody but its owner can walk to."""
    private = tmp_path_factory.mktemp("images")
    private.chmod(0o700)
    root = private / "root"
    root.mkdir(mode=0o755)
    root.chmod(0o755)
    tree = RootFs(root)
    for one in (small_root(), layer(entry("opt/tools/marker", b"of the image\n"))):
        apply_layer(TarStream(io.BytesIO(one), ByteBudget(1 << 32)), tree)
    finalize(tree)
    return root


@pytest.fixture
def said(runtime, disk, image, tmp_path):
    """Run a line of shell in a sandbox of the image; gives what it says, on both streams."""
    program = tmp_path / "program"
    program.write_bytes(b"#!/bin/sh\necho brought\n")
    program.chmod(0o755)

    async def run(line):
        handle = runtime.prepare(ATTEMPT)
        spec = SandboxSpec(
            ATTEMPT, disk, 1, 512 << 20, 128, programs={program: "/run/sandbox/bin/program"}, image=image
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


def test_the_files_of_the_image_are_there_and_the_hosts_are_not(said):
    assert said("cat /opt/tools/marker; ls /usr/bin/python3 /usr/share") == (
        "of the image\n"
        "ls: cannot access '/usr/bin/python3': No such file or directory\n"
        "ls: cannot access '/usr/share': No such file or directory"
    )


def test_a_program_of_the_server_is_laid_into_the_image(said):
    assert said("program") == "brought"


def test_nothing_in_the_image_can_be_changed(said, image):
    places = "/x /usr/x /etc/x /etc/passwd /opt/tools/marker /run/x /home/x /var/x"
    assert said(f"for p in {places}; do echo x 2>/dev/null >$p && echo $p; done") == ""
    assert (image / "opt/tools/marker").read_text() == "of the image\n"
    assert not (image / "x").exists()


def test_workspace_home_and_tmp_can_be_written(said, disk):
    assert said("for p in /workspace /home/agent /tmp /var/tmp; do echo x >$p/written && echo $p; done") == (
        "/workspace\n/home/agent\n/tmp\n/var/tmp"
    )
    assert (disk / "workspace/written").read_text() == "x\n"


def test_the_user_and_the_names_are_the_sandboxs_own(said):
    assert said("id -un; id -u; cat /etc/hostname; head -1 /etc/hosts; cat /etc/shadow 2>/dev/null") == (
        f"agent\n1000\n{ATTEMPT}\n127.0.0.1 localhost"
    )
