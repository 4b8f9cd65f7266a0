"""A disk with a separate file system is the root directory of the sandbox."""

import asyncio
import io
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from doubles.image_archives import directory, entry, layer, minimal_root, symlink
from doubles.runtime_availability import require_runtime
from doubles.sandbox_lifecycle import read_until, ready_sandbox, run_python, run_shell
from doubles.syscall_faults import fill_file_system, small_file_system
from sandbox.images.image_builder import finalize
from sandbox.images.rootfs_writer import RootFsWriter
from sandbox.images.tar_layers import ByteBudget, TarStream, apply_layer
from sandbox.interfaces.runtime import Command
from sandbox.model.failure import AttemptError
from sandbox.runtimes.bubblewrap import BubblewrapRuntime
from sandbox.runtimes.bubblewrap import runtime as bubblewrap_runtime
from sandbox.runtimes.limits import usage_limits
from sandbox.runtimes.limits.kernel_memory import DirectoryMeter
from sandbox.runtimes.sandbox_filesystem import create_disk_directories

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a disk")

DISK_BYTES = 192 << 20


@pytest.fixture
def runtime(tmp_path: Path) -> BubblewrapRuntime:
    require_runtime("bubblewrap", tmp_path / "probe")
    return BubblewrapRuntime(tmp_path / "run")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A mounted file system."""
    with small_file_system(tmp_path / "disk", DISK_BYTES) as directory:
        yield directory


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image that has more than the usual directories in / and /home."""
    root = tmp_path_factory.mktemp("images") / "root"
    root.mkdir()
    root.chmod(0o755)
    tree = RootFsWriter(root)
    additions = (
        entry("file", b"of the root\n"),
        entry("nix/store", b"of nix\n"),
        symlink("link", "nix/store"),
        entry("home/user/tool", b"of user\n"),
        directory("home/agent/hidden"),
        directory("tmp/hidden"),
    )
    for data in (minimal_root(), layer(*additions)):
        apply_layer(TarStream(io.BytesIO(data), ByteBudget(1 << 32)), tree)
    finalize(tree)
    return root


_TIME_PARENT_LOOKUPS = """
import os, time
def seconds(top):
    os.chdir(top)
    for _ in range(5000):
        os.mkdir("d"); os.chdir("d")
    found = []
    for _ in range(5):
        start = time.perf_counter(); os.stat("../" * 1300); found.append(time.perf_counter() - start)
    return min(found)
print(*(seconds(top) for top in ("/dev/shm", "/workspace", "/home/agent", "/tmp")))
"""


def test_parent_directories_on_a_disk_are_resolved_as_fast_as_on_a_whole_file_system(
    runtime: BubblewrapRuntime, disk: Path
):
    """The control is /dev/shm, where a whole file system is mounted, so the kernel does not check a path's parents."""
    ended = run_python(runtime, disk, _TIME_PARENT_LOOKUPS)
    shared_memory, *on_disk = map(float, ended.output.split())
    assert len(on_disk) == 3
    assert max(on_disk) < 30 * shared_memory


_ORDINARY_USE = """
import os
for top in ("/workspace", "/home/agent", "/tmp"):
    os.makedirs(f"{top}/a/b"); os.chdir(f"{top}/a/b")
    open("../../file", "w").write("kept")
    assert os.path.samefile("../..", top) and os.getcwd() == f"{top}/a/b" and os.listdir("../..") >= ["a"]
os.rename("/tmp/a", "/workspace/moved")
os.link("/workspace/file", "/home/agent/same")
print(sorted(os.listdir("/")), os.listdir("/home"), sorted(os.listdir("/workspace")))
"""


def test_directories_of_the_agent_are_writable_and_persist(runtime: BubblewrapRuntime, disk: Path):
    ended = run_python(runtime, disk, _ORDINARY_USE)
    names = [
        "bin",
        "dev",
        "etc",
        "home",
        "lib",
        "lib64",
        "opt",
        "proc",
        "run",
        "sbin",
        "tmp",
        "usr",
        "var",
        "workspace",
    ]
    assert (ended.output, ended.errors) == (f"{names} ['agent'] ['a', 'file', 'moved']\n", "")
    assert (disk / "home/agent/same").read_text() == "kept"
    again = run_shell(runtime, disk, "cat ~/same /workspace/file", is_disk_reused=True)
    assert again.output == "keptkept"


_INTRUSION = """
import errno, os
def attempt(call, *arguments):
    try: call(*arguments); result = "done"
    except OSError as error: result = errno.errorcode[error.errno]
    if result not in ("EACCES", "EPERM", "EROFS", "EBUSY", "EXDEV", "ENOTSUP"): print(result, call.__name__, *arguments)
for directory in ("/", "/home", "/lost+found", "/etc", "/usr", "/opt", "/run", "/var"):
    attempt(os.chmod, directory, 0o777)
    attempt(os.chown, directory, 1000, 1000)
    attempt(os.utime, directory)
    attempt(os.setxattr, directory, "user.x", b"x")
    attempt(os.mkdir, f"{directory}/made")
    attempt(os.symlink, "x", f"{directory}/made")
attempt(os.listdir, "/lost+found")
attempt(os.stat, "/lost+found/secret")
attempt(os.chdir, "/lost+found")
attempt(os.link, "/usr/bin/env", "/tmp/env")
for name in ("workspace", "tmp", "home", "home/agent", "usr", "lost+found", "bin"):
    attempt(os.rename, f"/{name}", "/workspace/moved" if name == "tmp" else "/tmp/moved")
    attempt(os.rmdir, f"/{name}") if name != "bin" else attempt(os.unlink, f"/{name}")
print(os.stat("/").st_uid, oct(os.stat("/").st_mode), sorted(os.listdir("/tmp")))
"""


def test_agent_cannot_change_the_root_directory(runtime: BubblewrapRuntime, disk: Path):
    """A file system check moves orphaned files to lost+found."""
    (disk / "lost+found" / "secret").write_text("of another program")
    ended = run_python(runtime, disk, _INTRUSION)
    assert (ended.output, ended.errors) == ("65534 0o40755 []\n", "")
    assert (disk / "lost+found" / "secret").read_text() == "of another program"


def test_image_is_complete_on_a_mounted_disk(runtime: BubblewrapRuntime, disk: Path, image: Path):
    script = "cat /file /link /nix/store /home/user/tool; ls -d /home/agent/* /tmp/*; echo x >/workspace/written"
    ended = run_shell(runtime, disk, script, image=image)
    assert ended.output == "of the root\nof nix\nof nix\nof user\n"
    assert (disk / "workspace" / "written").read_text() == "x\n"


def test_image_is_read_only_on_a_mounted_disk(runtime: BubblewrapRuntime, disk: Path, image: Path):
    paths = "/x /file /link /nix/store /nix/x /usr/x /etc/passwd /run/x /home/x /home/user/tool /var/x /sys/x"
    ended = run_shell(runtime, disk, f"for p in {paths}; do echo x 2>/dev/null >$p && echo $p; done", image=image)
    assert ended.output == ""
    assert (image / "nix" / "store").read_text() == "of nix\n"


def test_next_sandbox_on_a_disk_can_have_another_image(runtime: BubblewrapRuntime, disk: Path, image: Path):
    listing = "ls / /home"
    host = run_shell(runtime, disk, listing).output
    other = run_shell(runtime, disk, listing, image=image, is_disk_reused=True).output
    assert {"nix", "link", "file", "user"} <= set(other.split())
    assert run_shell(runtime, disk, listing, is_disk_reused=True).output == host


@pytest.mark.parametrize("is_disk_reused", [False, True])
def test_full_disk_without_mount_points_is_accepted_only_if_it_was_used_before(
    runtime: BubblewrapRuntime, disk: Path, is_disk_reused: bool
):
    """A preserved disk of an earlier version has no mount points, but must remain accessible even if it is full."""
    create_disk_directories(disk)
    (disk / "lost+found").rmdir()
    (disk / "workspace" / "kept").write_text("kept")
    fill_file_system(disk / "workspace")
    script = "cat kept; rm filler && echo x >/tmp/written && cat /tmp/written"
    if is_disk_reused:
        assert run_shell(runtime, disk, script, is_disk_reused=True).output == "keptx\n"
    else:
        with pytest.raises(AttemptError, match="No space left"):
            run_shell(runtime, disk, script)


def test_full_disk_of_an_earlier_sandbox_keeps_its_root(runtime: BubblewrapRuntime, disk: Path):
    run_shell(runtime, disk, "true")
    fill_file_system(disk / "workspace")
    script = "grep -c workspace /proc/self/mountinfo; rm filler && echo x >written && cat written"
    assert run_shell(runtime, disk, script, is_disk_reused=True).output == "0\nx\n"


async def _violation_of(
    runtime: BubblewrapRuntime, disk: Path, script: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, str]:
    """Run a script with a limit of 1000 directories. Return the violation and the output."""
    monkeypatch.setattr(usage_limits, "DISK_DIRECTORIES_MAX", 1000)
    monkeypatch.setattr(bubblewrap_runtime, "DirectoryMeter", lambda disk: DirectoryMeter(disk, files_min=1000))
    async with ready_sandbox(runtime, disk) as started:
        violation = asyncio.create_task(started.wait_for_exceeded_limit())
        command = Command(["/bin/bash", "-c", script], {"PATH": "/usr/bin:/bin"}, "/workspace")
        output, _ = await started.start(command)
        text = await read_until(output, b"made")
        with suppress(TimeoutError):
            await asyncio.wait_for(violation, 10 if "end" in script else 2)
        await started.kill()
        return "" if violation.cancelled() else violation.result(), text.decode()


def test_number_of_directories_on_the_disk_is_limited(
    runtime: BubblewrapRuntime, disk: Path, monkeypatch: pytest.MonkeyPatch
):
    script = "mkdir -p d{0..1100}/deep; echo made; sleep 60 # end"
    violation, _ = asyncio.run(_violation_of(runtime, disk, script, monkeypatch))
    assert "directories on its disk" in violation


def test_files_do_not_count_as_directories(runtime: BubblewrapRuntime, disk: Path, monkeypatch: pytest.MonkeyPatch):
    script = "touch f{0..3000}; mkdir d{0..900}; rmdir d*; mkdir e{0..900}; echo made; sleep 60"
    assert asyncio.run(_violation_of(runtime, disk, script, monkeypatch)) == ("", "made\n")


def test_all_directories_of_the_disk_are_counted(runtime: BubblewrapRuntime, disk: Path):
    script = "mkdir -p a/b/c ~/{1..300} /tmp/{1..400}; rmdir ~/7; touch file; ln -s a link; echo made"
    assert run_shell(runtime, disk, script).output == "made\n"
    directories = sum(1 for path in disk.rglob("*") if path.is_dir() and not path.is_symlink())
    assert DirectoryMeter(disk, files_min=0).count() == directories + 1
    assert DirectoryMeter(disk, files_min=1_000_000).count() == 0
