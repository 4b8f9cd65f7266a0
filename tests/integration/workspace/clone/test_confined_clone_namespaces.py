"""A compromised git process stays confined. Test programs take the place of git.

Each attack has a control: an action that git is allowed to perform.
"""

import asyncio
import concurrent.futures.thread  # noqa: F401  (an ordinary user may not be able to read it later)
import contextlib
import ctypes
import os
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest

from doubles.ordinary_user import ordinary_user_directory, run_as_ordinary_user
from doubles.sandbox_lifecycle import new_attempt_id
from doubles.workspace_harness import descendant_names
from sandbox.interfaces.runtime import ConfinedCommand, ConfinementSpec
from sandbox.model.failure import AttemptError
from sandbox.runtimes import launcher_client
from sandbox.runtimes.bubblewrap import BubblewrapRuntime
from sandbox.runtimes.programs import inherited_limits, launcher
from sandbox.runtimes.programs.inherited_limits import OPEN_FILES_MAX, OPEN_FILES_SOFT_MAX

VARIABLES = {"PATH": "/usr/local/bin:/usr/bin:/bin"}


class ConfinementHarness:
    """One confinement with a writable and a read-only directory, and the output of its programs."""

    def __init__(self, root):
        self.directory = root
        self.repository, self.rules = root / "repository.git", root / "ignore-rules"
        self.secret = root / "secret"
        self.runtime = BubblewrapRuntime(root)
        self.handle = self.runtime.prepare(new_attempt_id())
        for directory in (self.repository, self.rules):
            directory.mkdir()
            directory.chmod(0o755)
        self.secret.write_text("host secret")
        self.secret.chmod(0o644)

    @contextlib.asynccontextmanager
    async def open(self, memory_bytes=512 * 1024**2, processes_max=64):
        spec = ConfinementSpec(1, memory_bytes, processes_max, [self.repository], [self.rules])
        try:
            async with self.runtime.confine(self.handle, spec) as self.confinement:
                yield self
        finally:
            await self.runtime.destroy(self.handle, self.directory / "disk")

    async def run(self, *argv):
        """Run a program in place of git; return its exit code and output."""
        output = self.directory / f"output-{time.monotonic_ns()}"
        with output.open("wb") as file, Path(os.devnull).open("rb") as devnull:
            ends = (devnull.fileno(), file.fileno(), file.fileno())
            code = await self.confinement.run(ConfinedCommand(argv, VARIABLES, self.repository, *ends))
        return code, output.read_text()

    async def shell(self, text):
        return await self.run("/bin/sh", "-c", text)


def run_confined(directory, scenario, **limits):
    async def run():
        async with ConfinementHarness(directory).open(**limits) as confinement:
            await scenario(confinement)

    asyncio.run(asyncio.wait_for(run(), 60))


async def sees_no_host_files(confinement):
    code, output = await confinement.shell(
        f"cat {confinement.secret} /etc/shadow; ls {confinement.directory}; ls -a /home /root; cat /etc/hostname"
    )
    assert "host secret" not in output
    assert "root:" not in output
    assert output.count("No such file") >= 3
    code, output = await confinement.run("git", "init", "--quiet", "--bare", ".")
    assert (code, output) == (0, "")
    assert (confinement.repository / "HEAD").exists()


def test_host_files_are_invisible(tmp_path):
    run_confined(tmp_path, sees_no_host_files)


async def writes_only_to_the_repository(confinement):
    script = (
        "for d in / /usr /etc ../ignore-rules /proc/sys/kernel; do touch $d/x && echo WROTE $d; done; touch mine; ls"
    )
    _, output = await confinement.shell(script)
    assert "WROTE" not in output
    assert output.endswith("mine\n")
    (confinement.rules / ".gitignore").write_text("*.o\n")
    (confinement.rules / ".gitignore").chmod(0o644)
    assert await confinement.run("cat", "../ignore-rules/.gitignore") == (0, "*.o\n")


def test_only_the_repository_directory_is_writable(tmp_path):
    run_confined(tmp_path, writes_only_to_the_repository)


async def programs_see_only_their_own_directory(confinement):
    workspace = confinement.directory / "workspace"
    workspace.mkdir()
    workspace.chmod(0o755)
    spec = ConfinementSpec(1, 512 * 1024**2, 64, [confinement.repository, workspace], [confinement.rules])
    async with confinement.runtime.confine(confinement.handle, spec) as confinement.confinement:
        (workspace / "from-host").write_text("host")
        await confinement.confinement.transfer_ownership(workspace)
        script = "ls ..; for one in repository.git workspace; do touch ../$one/mine && echo WROTE $one; done"
        _, output = await confinement.shell(script)
        assert output.splitlines()[:2] == ["ignore-rules", "repository.git"]
        assert output.count("WROTE") == 1
        assert not (workspace / "mine").exists()
        repository, confinement.repository = confinement.repository, workspace
        _, output = await confinement.shell(f"{script}; echo more >> from-host && cat from-host")
        confinement.repository = repository
        assert output.splitlines()[:2] == ["ignore-rules", "workspace"]
        assert output.endswith("WROTE workspace\nhostmore\n")


def test_programs_in_different_directories_are_isolated_from_each_other(tmp_path):
    async def run():
        await programs_see_only_their_own_directory(harness)

    harness = ConfinementHarness(tmp_path)
    try:
        asyncio.run(asyncio.wait_for(run(), 60))
    finally:
        asyncio.run(harness.runtime.destroy(harness.handle, tmp_path / "disk"))


async def gets_limited_files_and_no_terminals(confinement):
    count = "import pty\nfor count in range(300):\n try: pty.openpty()\n except OSError: break\nprint(count)"
    _, output = await confinement.shell(f"ulimit -Sn; ulimit -Hn; python3 -c '{count}'")
    assert output.split() == [str(number) for number in (OPEN_FILES_SOFT_MAX, OPEN_FILES_MAX, 0)]


def test_number_of_open_files_is_limited_and_there_are_no_terminals(tmp_path):
    run_confined(tmp_path, gets_limited_files_and_no_terminals)


async def gains_no_privileges(confinement):
    _, output = await confinement.shell(
        "grep -E 'CapEff|CapBnd|NoNewPrivs|Seccomp:' /proc/self/status; unshare -r true; mount"
    )
    assert "CapEff:\t0000000000000000" in output
    assert "CapBnd:\t0000000000000000" in output
    assert "NoNewPrivs:\t1" in output
    assert "Seccomp:\t2" in output
    assert "unshare failed" in output


def test_privileges_are_dropped_and_cannot_be_gained(tmp_path):
    run_confined(tmp_path, gains_no_privileges)


class LinkPlantingConfinement:
    """A confinement whose programs plant a link in their directory, at a path to which the host may write next."""

    def __init__(self, confinement, target):
        self.confinement, self.target = confinement, target

    def __getattr__(self, name):
        return getattr(self.confinement, name)

    async def run(self, command):
        code = await self.confinement.run(command)
        if command.directory.name == "workspace":
            (command.directory / ".git").rename(command.directory / "old")
            (command.directory / ".git").symlink_to(self.target)
        return code


def test_links_left_in_the_workspace_do_not_redirect_the_host(harness, tmp_path):
    outside, names = tmp_path / "outside", []
    outside.mkdir()
    original_confine = harness.confine

    @contextlib.asynccontextmanager
    async def confine(directories, read_only_directories):
        names.append([directory.name for directory in directories])
        async with original_confine(directories, read_only_directories) as confinement:
            yield LinkPlantingConfinement(confinement, outside)

    harness.confine = confine
    harness.stage()
    assert not list(outside.iterdir())
    assert (harness.workspace / "README.md").exists()
    assert names == [["repository.git", "workspace"]]


def test_links_left_in_the_repository_do_not_redirect_the_patch(harness, tmp_path):
    base = harness.stage()
    outside = tmp_path / "outside"
    outside.mkdir()
    files = [outside / "some.keep", outside / "new.lock"]
    for file in files:
        file.touch()
    (harness.workspace / "README.md").write_text("changed\n")
    refs = harness.attempt_dir / "repository.git" / "refs" / "sandbox"
    refs.symlink_to(outside)
    with pytest.raises(AttemptError, match="The patch could not be created"):
        harness.patch(base)
    refs.unlink()
    packs = harness.attempt_dir / "repository.git" / "objects" / "pack"
    packs.rename(outside / "packs")
    packs.symlink_to(outside)
    with pytest.raises(AttemptError, match="The patch could not be created"):
        harness.patch(base)
    assert all(file.exists() for file in files)
    packs.unlink()
    (outside / "packs").rename(packs)
    assert b"+changed" in harness.patch(base)


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user has one kernel uid")
def test_git_runs_with_the_uid_and_the_control_group_of_the_attempt(tmp_path):
    async def scenario(confinement):
        running = asyncio.create_task(confinement.run("sleep", "60"))
        try:
            uid = int(confinement.handle.details["kernel_uid"])
            sleeper = await wait_for_program("sleep")
            assert set(Path(f"/proc/{sleeper}/status").read_text().split("Uid:\t")[1].split("\n")[0].split("\t")) == {
                str(uid)
            }
            for directory in confinement.handle.details["cgroups"].splitlines():
                assert str(sleeper) in (Path(directory) / "cgroup.procs").read_text().split()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    run_confined(tmp_path, scenario)


async def wait_for_program(name):
    """Wait for a program that is a descendant of this process; return its process id."""
    async with asyncio.timeout(10):
        while True:
            for pid in descendants(os.getpid()):
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{pid}/comm").read_text().strip() == name:
                        return pid
            await asyncio.sleep(0.01)


def descendants(pid):
    pids = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                pids += [child, *descendants(child)]
    return pids


CONNECT_PROGRAM = """
import socket, sys
port, name = int(sys.argv[1]), chr(0) + sys.argv[2]
tries = [(socket.AF_INET, ("127.0.0.1", port)), (socket.AF_UNIX, name)]
tries += [(socket.AF_INET, ("192.0.2.1", 80)), (socket.AF_INET6, ("::1", port))]
for family, address in tries:
    try:
        socket.socket(family).connect(address)
        print("CONNECTED", address)
    except OSError as error:
        print(error)
try:
    print(socket.getaddrinfo("example.org", 80))
except OSError:
    print("no name")
"""


async def reaches_no_network(confinement):
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket(socket.AF_UNIX) as abstract:
        name = f"sandbox-test-{new_attempt_id()}"
        abstract.bind(f"\0{name}")
        abstract.listen()
        port = listener.getsockname()[1]
        code, output = await confinement.run("python3", "-c", CONNECT_PROGRAM, str(port), name)
        assert code == 0
        assert "CONNECTED" not in output
        assert output.endswith("no name\n")


def test_network_is_unreachable(tmp_path):
    run_confined(tmp_path, reaches_no_network)


async def dies_with_its_descendants(confinement):
    running = asyncio.create_task(confinement.shell("setsid sleep 600 & nohup sleep 600 & trap '' TERM; sleep 600"))
    await wait_for_program("sleep")
    started = time.monotonic()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert time.monotonic() - started < 5
    async with asyncio.timeout(10):
        while b"sleep" in descendant_names(os.getpid()):
            await asyncio.sleep(0.01)
    assert await confinement.run("true") == (0, "")


def test_cancelled_program_is_killed_with_its_descendants(tmp_path):
    run_confined(tmp_path, dies_with_its_descendants)


async def kills_background_processes(confinement):
    await confinement.shell("setsid sleep 600 & exit 0")
    async with asyncio.timeout(10):
        while b"sleep" in descendant_names(os.getpid()):
            await asyncio.sleep(0.01)


def test_background_processes_are_killed_at_the_end(tmp_path):
    run_confined(tmp_path, kills_background_processes)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs writable control groups")
def test_memory_and_processes_are_limited(tmp_path):
    async def scenario(confinement):
        code, _ = await confinement.run("python3", "-c", "b = bytearray(256 * 1024**2)")
        assert code == 137
        _, output = await confinement.shell("for i in $(seq 40); do sleep 5 & done; echo done")
        assert "fork" in output
        assert (await confinement.run("python3", "-c", "print('small')")) == (0, "small\n")

    runtime = BubblewrapRuntime(tmp_path)
    if not {"memory", "processes"} <= runtime.hierarchies.group("x").limits() and not runtime.hierarchies.roots:
        pytest.skip("no control group can be written to")
    run_confined(tmp_path, scenario, memory_bytes=64 * 1024**2, processes_max=24)


async def run_as_user(directory, *scenarios):
    """Run the scenarios with a copied launcher, since the user may be unable to read this interpreter and checkout."""
    launcher_client.__file__, sys.executable = str(Path(directory) / "launcher_client.py"), "/usr/bin/python3"
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, which the change of uid has reset
    for scenario in scenarios:
        (own := Path(directory) / scenario.__name__).mkdir()
        async with ConfinementHarness(own).open() as confinement:
            await scenario(confinement)


SCENARIOS = [
    sees_no_host_files,
    writes_only_to_the_repository,
    gains_no_privileges,
    reaches_no_network,
    dies_with_its_descendants,
    kills_background_processes,
]


def test_git_of_an_ordinary_user_is_confined():
    if not Path("/usr/bin/python3").exists():
        pytest.skip("no interpreter that every user can run")
    with ordinary_user_directory(for_sandboxes=True) as directory:
        (programs := Path(directory) / "programs").mkdir()
        programs.chmod(0o755)
        for program in (launcher, inherited_limits):
            Path(shutil.copy(program.__file__, programs)).chmod(0o644)
        run_as_ordinary_user(run_as_user, str(directory), *SCENARIOS)
