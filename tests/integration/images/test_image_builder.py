"""The shipped profiles can be built from real packages.

The builds are slow and use the machine's package mirror, so they run only on request.
"""

import os
import subprocess
from pathlib import Path

import pytest

from sandbox.cli.commands.profile import image_components
from sandbox.images import image_builder
from sandbox.images.image_builder import build_image, find_sources, install_packages
from sandbox.images.profiles import ImageDefinition, ProfileCatalog, read_shipped
from sandbox.images.rootfs_writer import RootFsWriter
from sandbox.interfaces.images import BuildFailedError

RUN_PACKAGE_BUILDS = os.environ.get("SANDBOX_TEST_BUILDS")
needs_packages = pytest.mark.skipif(
    not RUN_PACKAGE_BUILDS, reason="set SANDBOX_TEST_BUILDS=1 to build images of real packages"
)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can build images")


@needs_packages
@needs_root
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["basic", "agentic-dev"])
def test_shipped_profile_build_is_reproducible(tmp_path, name):
    catalog = ProfileCatalog(tmp_path)
    mounts = Path("/proc/self/mounts").read_text()
    first, second = (build_image(catalog.image_store(name), read_shipped(name), image_components()) for _ in range(2))
    assert first.digest == second.digest
    assert {"git", "curl"} <= set(first.package_versions)
    root = catalog.image_store(name).rootfs_path(first.digest)
    assert run_in_image(root, "git", "--version").startswith("git version")
    assert not (root / "etc/apt").exists()
    assert str(tmp_path) not in mounts + Path("/proc/self/mounts").read_text()
    if name == "agentic-dev":
        assert run_in_image(root, "/opt/node/bin/node", "--version").strip() == first.package_versions["node"]
        for program in ("rg", "gcc"):
            assert run_in_image(root, program, "--version")


def run_in_image(root, *argv):
    """Run a program in the image; return its output."""
    sandboxed = ["bwrap", "--ro-bind", str(root), "/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp", *argv]
    completed = subprocess.run(
        sandboxed, check=True, capture_output=True, text=True, timeout=60, env={"PATH": "/usr/bin"}
    )
    return completed.stdout


@pytest.fixture
def program(tmp_path):
    """A program that replaces mmdebstrap."""

    def make(text):
        path = tmp_path / "program"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return str(path)

    return make


def run(program, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    root = tmp_path / "root"
    root.mkdir()
    install_packages(
        ImageDefinition("x", read_shipped("basic").snapshot_date, ("git", "curl")),
        RootFsWriter(root),
        scratch,
        program,
    )
    return root


@needs_root
def test_mmdebstrap_output_is_unpacked_without_machine_specific_files(program, tmp_path):
    tree = tmp_path / "tree"
    for name in ("etc/apt/sources.list", "usr/bin/git", "var/log/apt.log", "var/lib/apt/lists/x"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(name)
    root = run(program(f'echo "$SOURCE_DATE_EPOCH $@" >{tmp_path}/arguments; tar -C {tree} -c .'), tmp_path)
    files = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert files == {"usr/bin/git"}
    arguments = (tmp_path / "arguments").read_text()
    assert arguments.startswith("1793491200 --mode=root")
    assert "--include=curl,git" in arguments


@needs_root
def test_error_of_a_failed_build_contains_the_last_line_of_mmdebstrap(program, tmp_path):
    with pytest.raises(BuildFailedError, match="Unable to locate package git"):
        run(program("echo 'E: Unable to locate package git' >&2; exit 1"), tmp_path)


@needs_root
def test_complete_tar_of_a_failed_build_is_rejected(program, tmp_path):
    with pytest.raises(BuildFailedError, match="late"):
        run(program("tar -c --files-from=/dev/null; echo 'too late' >&2; exit 1"), tmp_path)


@needs_root
@pytest.mark.parametrize("script", ["exit 100", "exec sleep 60"])
def test_failing_apt_config_is_reported(program, tmp_path, monkeypatch, script):
    apt_config = tmp_path / "apt-config"
    apt_config.write_text(f"#!/bin/sh\n{script}\n")
    apt_config.chmod(0o755)
    monkeypatch.setattr(image_builder, "_APT_CONFIG", str(apt_config))
    monkeypatch.setattr(image_builder, "_COMMAND_SECONDS", 0.5)
    with pytest.raises(BuildFailedError, match="apt-config"):
        run(program("exit 1"), tmp_path)


def test_missing_mmdebstrap_is_reported_with_a_remedy(tmp_path):
    with pytest.raises(BuildFailedError, match=r"apt-get install mmdebstrap|Only root"):
        run("/nowhere/mmdebstrap", tmp_path)


def test_build_uses_the_apt_sources_of_the_host(tmp_path):
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text("# nothing\n")
    with pytest.raises(BuildFailedError, match="sources"):
        find_sources(tmp_path)
    for name, text in {
        "a.list": "deb http://mirror.invalid/debian stable main\n",
        "b.sources": "Types: deb\nURIs: http://mirror.invalid/debian\n",
        "c.list": "# deb off\n",
        "d.list.save": "deb http://mirror.invalid/debian stable main\n",
    }.items():
        (tmp_path / "sources.list.d" / name).write_text(text)
    assert [path.name for path in find_sources(tmp_path)] == ["a.list", "b.sources"]
