"""A repository that took git over gets no further than its confinement: a program of the test's plays that git.

Each attack stands beside what git itself may do there.
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

from doubles.ordinary_user import as_ordinary_user, ordinary_place
from doubles.sandbox_lifecycle import new_attempt_id
from doubles.workspace_fixture import programs_below
from sandbox.interfaces.runtime import ConfinedCommand, ConfinementSpec
from sandbox.model.errors import AttemptError
from sandbox.runtimes import launcher_client
from sandbox.runtimes.bubblewrap import BubblewrapRuntime
from sandbox.runtimes.programs import launcher, process_limits
from sandbox.runtimes.programs.launcher import PTYS_MAX
from sandbox.runtimes.programs.process_limits import OPEN_FILES_MAX, OPEN_FILES_SOFT_MAX

VARIABLES = {"PATH": "/usr/local/bin:/usr/bin:/bin"}


class Hold:
    """One confinement with a directory to write to and one to read, and what its programs said."""

    def __init__(self, place):
        self.place = place
        self.repository, self.rules = place / "repository.git", place / "ignore-rules"
        self.secret = place / "secret"
        self.runtime = BubblewrapRuntime(place)
        self.handle = self.runtime.prepare(new_attempt_id())
        for directory in (self.repository, self.rules):
            directory.mkdir()
            directory.chmod(0o755)
        self.secret.write_text("of the host's")
        self.secret.chmod(0o644)

    @contextlib.asynccontextmanager
    async def open(self, memory_bytes=512 * 1024**2, processes_max=64):
        spec = ConfinementSpec(1, memory_bytes, processes_max, [self.repository], [self.rules])
        try:
            async with self.runtime.confine(self.handle, spec) as self.confinement:
                yield self
        finally:
            await self.runtime.destroy(self.handle, self.place / "disk")

    async def run(self, *argv):
        """Exit code and output of a program that plays git."""
        output = self.place / f"output-{time.monotonic_ns()}"
        with output.open("wb") as file, Path(os.devnull).open("rb") as nothing:
            ends = (nothing.fileno(), file.fileno(), file.fileno())
            code = await self.confinement.run(ConfinedCommand(argv, VARIABLES, self.repository, *ends))
        return code, output.read_text()

    async def shell(self, text):
        return await self.run("/bin/sh", "-c", text)


def play(place, story, **limits):
    async def carry_out():
        async with Hold(place).open(**limits) as hold:
            await story(hold)

    asyncio.run(asyncio.wait_for(carry_out(), 60))


async def reads_no_file_of_the_hosts(hold):
    code, said = await hold.shell(
        f"cat {hold.secret} /etc/shadow; ls {hold.place}; ls -a /home /root; cat /etc/hostname"
    )
    assert "of the host's" not in said
    assert "root:" not in said
    assert said.count("No such file") >= 3
    code, said = await hold.run("git", "init", "--quiet", "--bare", ".")
    assert (code, said) == (0, "")
    assert (hold.repository / "HEAD").exists()


def test_no_file_of_the_hosts_is_in_sight(tmp_path):
    play(tmp_path, reads_no_file_of_the_hosts)


async def writes_only_where_it_may(hold):
    script = (
        "for d in / /usr /etc ../ignore-rules /proc/sys/kernel; do touch $d/x && echo WROTE $d; done; touch mine; ls"
    )
    _, said = await hold.shell(script)
    assert "WROTE" not in said
    assert said.endswith("mine\n")
    (hold.rules / ".gitignore").write_text("*.o\n")
    (hold.rules / ".gitignore").chmod(0o644)
    assert await hold.run("cat", "../ignore-rules/.gitignore") == (0, "*.o\n")


def test_only_its_own_directory_can_be_written(tmp_path):
    play(tmp_path, writes_only_where_it_may)


async def takes_no_whole_table_of_the_machine(hold):
    count = "import pty\nfor count in range(300):\n try: pty.openpty()\n except OSError: break\nprint(count)"
    _, said = await hold.shell(f"ulimit -Sn; ulimit -Hn; python3 -c '{count}'")
    assert said.split() == [str(number) for number in (OPEN_FILES_SOFT_MAX, OPEN_FILES_MAX, PTYS_MAX)]


def test_files_and_terminals_are_left_for_others(tmp_path):
    play(tmp_path, takes_no_whole_table_of_the_machine)


async def has_no_privileges(hold):
    _, said = await hold.shell("grep -E 'CapEff|CapBnd|NoNewPrivs|Seccomp:' /proc/self/status; unshare -r true; mount")
    assert "CapEff:\t0000000000000000" in said
    assert "CapBnd:\t0000000000000000" in said
    assert "NoNewPrivs:\t1" in said
    assert "Seccomp:\t2" in said
    assert "unshare failed" in said


def test_no_privilege_is_left_nor_can_be_had(tmp_path):
    play(tmp_path, has_no_privileges)


class Planting:
    """A confinement in which git was taken over: after each program a link stands where the host may write next."""

    def __init__(self, confinement, directories, target):
        self.confinement, self.directories, self.target = confinement, directories, target

    def __getattr__(self, name):
        return getattr(self.confinement, name)

    async def run(self, command):
        code = await self.confinement.run(command)
        for directory in self.directories:
            if directory.name == "workspace":
                if (directory / ".git").exists():
                    (directory / ".git").rename(directory / "old")
                (directory / ".git").symlink_to(self.target)
        return code


def test_a_clone_leads_the_host_nowhere_by_what_it_leaves_in_the_workspace(house, tmp_path):
    outside, shown = tmp_path / "outside", []
    outside.mkdir()
    real = house.confine

    @contextlib.asynccontextmanager
    async def confine(directories, read_only):
        shown.append([one.name for one in directories])
        async with real(directories, read_only) as confinement:
            yield Planting(confinement, directories, outside)

    house.confine = confine
    house.stage()
    assert not list(outside.iterdir())
    assert (house.workspace / "README.md").exists()
    assert shown == [["repository.git"], ["workspace"]]


def test_a_clone_leads_the_host_nowhere_when_a_patch_is_made(house, tmp_path):
    base = house.stage()
    outside = tmp_path / "outside"
    outside.mkdir()
    kept = [outside / "some.keep", outside / "new.lock"]
    for file in kept:
        file.touch()
    (house.workspace / "README.md").write_text("changed\n")
    refs = house.attempt / "repository.git" / "refs" / "sandbox"
    refs.symlink_to(outside)
    with pytest.raises(AttemptError, match="The patch could not be made"):
        house.patch(base)
    refs.unlink()
    packs = house.attempt / "repository.git" / "objects" / "pack"
    packs.rename(outside / "packs")
    packs.symlink_to(outside)
    with pytest.raises(AttemptError, match="The patch could not be made"):
        house.patch(base)
    assert all(file.exists() for file in kept)
    packs.unlink()
    (outside / "packs").rename(packs)
    assert b"+changed" in house.patch(base)


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user has one kernel uid")
def test_it_is_the_attempts_uid_in_the_attempts_control_group(tmp_path):
    async def story(hold):
        running = asyncio.create_task(hold.run("sleep", "60"))
        try:
            uid = int(hold.handle.details["kernel_uid"])
            sleeper = await born("sleep")
            assert set(Path(f"/proc/{sleeper}/status").read_text().split("Uid:\t")[1].split("\n")[0].split("\t")) == {
                str(uid)
            }
            for directory in hold.handle.details["cgroups"].splitlines():
                assert str(sleeper) in (Path(directory) / "cgroup.procs").read_text().split()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    play(tmp_path, story)


async def born(name):
    """The id of a program that this process started, at the end of however many others."""
    async with asyncio.timeout(10):
        while True:
            for pid in descendants(os.getpid()):
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{pid}/comm").read_text().strip() == name:
                        return pid
            await asyncio.sleep(0.01)


def descendants(pid):
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found


CONNECT = """
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


async def has_no_network(hold):
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket(socket.AF_UNIX) as abstract:
        name = f"sandbox-test-{new_attempt_id()}"
        abstract.bind(f"\0{name}")
        abstract.listen()
        port = listener.getsockname()[1]
        code, said = await hold.run("python3", "-c", CONNECT, str(port), name)
        assert code == 0
        assert "CONNECTED" not in said
        assert said.endswith("no name\n")


def test_nothing_can_be_connected_to(tmp_path):
    play(tmp_path, has_no_network)


async def dies_with_all_it_started(hold):
    running = asyncio.create_task(hold.shell("setsid sleep 600 & nohup sleep 600 & trap '' TERM; sleep 600"))
    await born("sleep")
    began = time.monotonic()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert time.monotonic() - began < 5
    async with asyncio.timeout(10):
        while b"sleep" in programs_below(os.getpid()):
            await asyncio.sleep(0.01)
    assert await hold.run("true") == (0, "")


def test_at_its_time_limit_it_ends_with_all_that_it_started(tmp_path):
    play(tmp_path, dies_with_all_it_started)


async def leaves_nobody_behind(hold):
    await hold.shell("setsid sleep 600 & exit 0")
    async with asyncio.timeout(10):
        while b"sleep" in programs_below(os.getpid()):
            await asyncio.sleep(0.01)


def test_what_it_leaves_in_the_background_ends_with_it(tmp_path):
    play(tmp_path, leaves_nobody_behind)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs writable control groups")
def test_it_has_no_more_memory_and_processes_than_the_sandbox(tmp_path):
    async def story(hold):
        code, _ = await hold.run("python3", "-c", "b = bytearray(256 * 1024**2)")
        assert code == 137
        _, said = await hold.shell("for i in $(seq 40); do sleep 5 & done; echo done")
        assert "fork" in said
        assert (await hold.run("python3", "-c", "print('small')")) == (0, "small\n")

    runtime = BubblewrapRuntime(tmp_path)
    if not {"memory", "processes"} <= runtime.hierarchies.group("x").limits() and not runtime.hierarchies.roots:
        pytest.skip("no control group can be written to")
    play(tmp_path, story, memory_bytes=64 * 1024**2, processes_max=24)


async def play_as_user(place, *stories):
    """The interpreter and this checkout may lie where another user cannot walk, so the launcher is copied."""
    launcher_client.__file__, sys.executable = str(Path(place) / "launcher_client.py"), "/usr/bin/python3"
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, lost by the change of uid
    for story in stories:
        (own := Path(place) / story.__name__).mkdir()
        async with Hold(own).open() as hold:
            await story(hold)


STORIES = [
    reads_no_file_of_the_hosts,
    writes_only_where_it_may,
    has_no_privileges,
    has_no_network,
    dies_with_all_it_started,
    leaves_nobody_behind,
]


def test_an_ordinary_users_git_is_confined_as_well():
    if not Path("/usr/bin/python3").exists():
        pytest.skip("no interpreter that everybody reaches")
    with ordinary_place(for_sandboxes=True) as place:
        (programs := Path(place) / "programs").mkdir()
        programs.chmod(0o755)
        for program in (launcher, process_limits):
            Path(shutil.copy(program.__file__, programs)).chmod(0o644)
        as_ordinary_user(play_as_user, str(place), *STORIES)
