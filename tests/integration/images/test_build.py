"""The shipped profiles are built of real packages. Slow, and asks the machine's package mirror: only on request."""

import os
import subprocess
from pathlib import Path

import pytest

from sandbox.bootstrap.runtime import image_components
from sandbox.images import debian
from sandbox.images.build import build_image
from sandbox.images.catalog import ProfileCatalog
from sandbox.images.debian import find_sources, install_packages
from sandbox.images.definition import ImageDefinition, read_shipped
from sandbox.images.errors import BuildFailedError
from sandbox.images.rootfs import RootFs

WANTED = os.environ.get("SANDBOX_TEST_BUILDS")
real = pytest.mark.skipif(not WANTED, reason="set SANDBOX_TEST_BUILDS=1 to build images of real packages")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root builds")


@real
@needs_root
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["basic", "agentic-dev"])
def test_a_shipped_profile_is_built_and_built_again_the_same(tmp_path, name):
    catalog = ProfileCatalog(tmp_path)
    mounts = Path("/proc/self/mounts").read_text()
    one, again = (build_image(catalog.image_store(name), read_shipped(name), image_components()) for _ in range(2))
    assert one.digest == again.digest
    assert {"git", "curl"} <= set(one.versions)
    root = catalog.image_store(name).rootfs_path(one.digest)
    assert inside(root, "git", "--version").startswith("git version")
    assert not (root / "etc/apt").exists()
    assert str(tmp_path) not in mounts + Path("/proc/self/mounts").read_text()
    if name == "agentic-dev":
        assert inside(root, "/opt/node/bin/node", "--version").strip() == one.versions["node"]
        for program in ("rg", "gcc"):
            assert inside(root, program, "--version")


def inside(root, *argv):
    """What a program of the image says."""
    sandboxed = ["bwrap", "--ro-bind", str(root), "/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp", *argv]
    ran = subprocess.run(sandboxed, check=True, capture_output=True, text=True, timeout=60, env={"PATH": "/usr/bin"})
    return ran.stdout


@pytest.fixture
def program(tmp_path):
    """A program that takes mmdebstrap's place."""

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
    install_packages(ImageDefinition("x", read_shipped("basic").date, ("git", "curl")), RootFs(root), scratch, program)
    return root


@needs_root
def test_what_mmdebstrap_writes_is_unpacked_without_what_is_of_this_machine(program, tmp_path):
    place = tmp_path / "made"
    for name in ("etc/apt/sources.list", "usr/bin/git", "var/log/apt.log", "var/lib/apt/lists/x"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(name)
    root = run(program(f'echo "$SOURCE_DATE_EPOCH $@" >{tmp_path}/asked; tar -C {place} -c .'), tmp_path)
    found = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert found == {"usr/bin/git"}
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith("1793491200 --mode=root")
    assert "--include=curl,git" in asked


@needs_root
def test_a_build_that_fails_has_the_last_words_of_mmdebstrap(program, tmp_path):
    with pytest.raises(BuildFailedError, match="Unable to locate package git"):
        run(program("echo 'E: Unable to locate package git' >&2; exit 1"), tmp_path)


@needs_root
def test_a_whole_tar_of_a_build_that_failed_is_not_enough(program, tmp_path):
    with pytest.raises(BuildFailedError, match="late"):
        run(program("tar -c --files-from=/dev/null; echo 'too late' >&2; exit 1"), tmp_path)


@needs_root
@pytest.mark.parametrize("asked", ["exit 100", "exec sleep 60"])
def test_a_machine_whose_apt_does_not_tell_its_settings_is_told_so(program, tmp_path, monkeypatch, asked):
    apt_config = tmp_path / "apt-config"
    apt_config.write_text(f"#!/bin/sh\n{asked}\n")
    apt_config.chmod(0o755)
    monkeypatch.setattr(debian, "_APT_CONFIG", str(apt_config))
    monkeypatch.setattr(debian, "_COMMAND_SECONDS", 0.5)
    with pytest.raises(BuildFailedError, match="apt-config"):
        run(program("exit 1"), tmp_path)


def test_a_machine_without_mmdebstrap_is_told_what_to_install(tmp_path):
    with pytest.raises(BuildFailedError, match=r"apt-get install mmdebstrap|Only root"):
        run("/nowhere/mmdebstrap", tmp_path)


def test_the_sources_are_those_of_the_machines_apt(tmp_path):
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
