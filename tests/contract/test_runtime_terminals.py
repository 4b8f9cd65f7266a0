"""What every runtime keeps about terminals: a further command inside, confined as the sandbox's own is."""

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from doubles.sandbox_lifecycle import PATIENCE_SECONDS, describe, has_own_kernel, living, new_attempt_id, read_until
from doubles.sandbox_queries import WHO
from sandbox.interfaces.runtime import Command, ExitStatus, Runtime, Sandbox, Terminal, TerminalSize
from sandbox.model.errors import AttemptError

SIZE = TerminalSize(rows=24, columns=80)
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "TERM": "dumb", "PS1": "ready$ "}


@asynccontextmanager
async def busy(
    runtime: Runtime, disk: Path, script: str = "sleep 300 & wait", **changes: object
) -> AsyncIterator[Sandbox]:
    """A sandbox whose own command is at work."""
    async with living(runtime, disk, **changes) as sandbox:
        output, _ = await sandbox.start(Command(["/bin/bash", "-c", f"echo up; {script}"], {}, "/workspace"))
        await read_until(output, b"up")
        yield sandbox


async def open_shell(sandbox: Sandbox, *argv: str) -> Terminal:
    """A shell that has begun, or another command."""
    command = Command(argv or ["/bin/bash", "--norc", "--noprofile"], ENVIRONMENT, "/workspace")
    terminal = await sandbox.open_terminal(command, SIZE)
    if not argv:
        await read_until(terminal.output, b"ready$ ")
    return terminal


async def ended(terminal: Terminal) -> ExitStatus:
    async with asyncio.timeout(PATIENCE_SECONDS):
        return await terminal.wait()


async def said(terminal: Terminal) -> str:
    """Everything that it shows to its end."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        return (await terminal.output.read()).decode(errors="replace").replace("\r\n", "\n")


def own_traces() -> tuple[list[str], int]:
    """This process's children and how many descriptors it has open."""
    children = [pid for listing in Path("/proc/self/task").glob("*/children") for pid in listing.read_text().split()]
    return children, len(list(Path("/proc/self/fd").iterdir()))


# A terminal and its process


def test_what_is_typed_is_shown_and_answered(runtime: Runtime, disk: Path):
    async def story() -> None:
        async with busy(runtime, disk) as sandbox:
            terminal = await open_shell(sandbox)
            await terminal.write(b"echo $((40 + 2)); tty; test -t 0 -a -t 1 -a -t 2 && echo three\n")
            shown = await read_until(terminal.output, b"three\r\nready$ ")
            assert b"echo $((40 + 2))" in shown
            name = b"not a tty" if runtime.name == "gvisor" else rb"/dev/pts/\d+"  # there it has no name inside
            assert re.search(rb"\r\n42\r\n" + name + rb"\r\n", shown), shown
            await terminal.hang_up()

    asyncio.run(story())


@pytest.mark.parametrize("code", [0, 7])
def test_the_exit_code_comes_back_and_the_sandbox_goes_on(runtime: Runtime, disk: Path, code: int):
    async def story() -> None:
        async with busy(runtime, disk) as sandbox:
            terminal = await open_shell(sandbox)
            await terminal.write(b"exit %d\n" % code)
            assert (await ended(terminal)).code == code
            assert (await ended(terminal)).code == code
            await terminal.write(b"nobody reads this\n")
            again = await open_shell(sandbox, "/bin/echo", "still here")
            assert await said(again) == "still here\n"

    asyncio.run(story())


def test_death_by_signal_is_128_and_its_number(runtime: Runtime, disk: Path):
    async def story() -> None:
        async with busy(runtime, disk) as sandbox:
            terminal = await open_shell(sandbox, "/bin/bash", "-c", "kill -TERM $$")
            assert (await ended(terminal)).code == 128 + signal.SIGTERM

    asyncio.run(story())


def test_a_program_that_is_not_there_says_so_and_ends_with_127(runtime: Runtime, disk: Path):
    async def story() -> None:
        async with busy(runtime, disk) as sandbox:
            terminal = await open_shell(sandbox, "/usr/bin/no-such-program")
            assert "no-such-program" in await said(terminal)
            assert (await ended(terminal)).code == 127

    asyncio.run(story())


def test_environment_and_directory_are_what_was_given(runtime: Runtime, disk: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOST_SECRET", "of-the-host")

    async def story() -> None:
        async with busy(runtime, disk) as sandbox:
            given = {"GREETING": "two words, a \u00fc and\na line", "EMPTY": "", "HOME": "/home/agent"}
            command = Command(["/usr/bin/env", "-0"], given, "/home/agent")
            terminal = await sandbox.open_terminal(command, SIZE)
            found = dict(pair.split("=", 1) for pair in (await said(terminal)).split("\0") if pair)
            assert found == {**given, "PWD": "/home/agent"}
            terminal = await open_shell(sandbox, "/bin/bash", "-c", 'echo $# "$2" $PWD; pwd', "name", "", "last")
            assert await said(terminal) == "2 last /workspace\n/workspace\n"

    asyncio.run(story())


def test_it_begins_with_its_size_and_follows_changes(runtime: Runtime, disk: Path):
    async def story() -> None:
        async with busy(runtime, disk) as sandbox:
            script = "stty size; trap 'stty size; exit 0' WINCH; echo waits; while :; do sleep 0.1; done"
            terminal = await open_shell(sandbox, "/bin/bash", "-c", script)
            assert (await read_until(terminal.output, b"waits")).startswith(b"24 80\r\n")
            await terminal.resize(TerminalSize(rows=50, columns=132))
            assert "50 132" in await said(terminal)
            assert (await ended(terminal)).code == 0

    asyncio.run(story())


def test_control_c_reaches_the_foreground_only(runtime: Runtime, disk: Path):
    async def story() -> None:
        async with busy(runtime, disk) as sandbox:
            terminal = await open_shell(sandbox)
            await terminal.write(b"sh -c 'trap \"exit 130\" INT; echo be''gun; while :; do sleep 0.05; done'\n")
            await read_until(terminal.output, b"begun\r\n")
            await terminal.write(b"\x03")
            await read_until(terminal.output, b"ready$ ")
            await terminal.write(b"echo code $?; exit 0\n")
            assert "code 130" in await said(terminal)
            assert (await ended(terminal)).code == 0

    asyncio.run(story())


def test_a_hang_up_ends_what_is_on_the_terminal(runtime: Runtime, disk: Path):
    async def story() -> None:
        async with busy(runtime, disk) as sandbox:
            terminal = await open_shell(sandbox)
            await terminal.hang_up()
            assert (await ended(terminal)).code in {0, 1, 128 + signal.SIGHUP}
            await said(terminal)
            await terminal.hang_up()
            await terminal.resize(SIZE)

    asyncio.run(story())


def test_megabytes_are_shown_whole_and_typed_text_arrives_whole(runtime: Runtime, disk: Path):
    async def story() -> None:
        async with busy(runtime, disk) as sandbox:
            flood = await open_shell(sandbox, "/bin/bash", "-c", "head -c 3000000 /dev/zero | tr '\\0' x; sleep 0.2")
            assert len(await said(flood)) == 3_000_000
            script = "stty raw -echo; echo go; head -c 200000 | sha256sum"
            typed, text = await open_shell(sandbox, "/bin/bash", "-c", script), os.urandom(200_000)
            await read_until(typed.output, b"go")
            async with asyncio.timeout(PATIENCE_SECONDS):
                await typed.write(text)
            import hashlib

            assert hashlib.sha256(text).hexdigest() in await said(typed)

    asyncio.run(story())


def test_many_at_once_are_apart(runtime: Runtime, disk: Path):
    async def story() -> None:
        async with busy(runtime, disk) as sandbox:

            async def one(number: int) -> tuple[str, int | None]:
                terminal = await open_shell(sandbox, "/bin/bash", "-c", f"tty; exit {number}")
                return await said(terminal), (await ended(terminal)).code

            told = await asyncio.gather(*(one(number) for number in range(5)))
            assert [code for _, code in told] == list(range(5))
            shells = [await open_shell(sandbox) for _ in range(3)]
            names = []
            for shell in shells:
                await shell.write(b"tty\n")
                names.append((await read_until(shell.output, b"ready$ ")).split()[1])
                await shell.hang_up()
            assert len(set(names)) == (1 if runtime.name == "gvisor" else 3)

    asyncio.run(story())


# Its end


def test_it_ends_with_the_sandboxs_command(runtime: Runtime, disk: Path):
    async def story() -> None:
        async with busy(
            runtime,
            disk,
            "read -t 60 < /tmp/end || sleep 1",
        ) as sandbox:
            terminal = await open_shell(
                sandbox, "/bin/bash", "-c", "trap '' HUP TERM INT; echo stays; sleep 300; sleep 300"
            )
            await read_until(terminal.output, b"stays")
            async with asyncio.timeout(PATIENCE_SECONDS):
                await sandbox.wait()
            assert (await ended(terminal)).code in {None, 128 + signal.SIGKILL}
            await said(terminal)

    asyncio.run(story())


def test_it_ends_with_a_killed_sandbox(runtime: Runtime, disk: Path):
    async def story() -> None:
        async with busy(runtime, disk) as sandbox:
            terminals = [await open_shell(sandbox) for _ in range(3)]
            await sandbox.kill()
            async with asyncio.timeout(PATIENCE_SECONDS):
                await sandbox.wait()
            for terminal in terminals:
                assert (await ended(terminal)).code in {None, 1, 128 + signal.SIGHUP, 128 + signal.SIGKILL}
                assert "could not be started" not in await said(terminal)

    asyncio.run(story())


def test_there_is_none_before_the_start_nor_after_the_end(runtime: Runtime, disk: Path):
    async def story() -> None:
        async with living(runtime, disk) as sandbox:
            with pytest.raises(AttemptError) as caught:
                await open_shell(sandbox, "/bin/true")
            assert caught.value.code == "sandbox_lost"
            await sandbox.start(Command(["/bin/true"], {}, "/workspace"))
            await sandbox.wait()
            with pytest.raises(AttemptError) as caught:
                await open_shell(sandbox, "/bin/true")
            assert caught.value.code == "sandbox_lost"

    asyncio.run(story())


def test_nothing_is_left_of_terminals_however_they_end(runtime: Runtime, disk: Path):
    async def story() -> None:
        async with busy(runtime, disk) as sandbox:
            left_open = await open_shell(sandbox)
            hung_up = await open_shell(sandbox)
            await hung_up.hang_up()
            await ended(await open_shell(sandbox, "/bin/true"))
            opening = asyncio.create_task(open_shell(sandbox, "/bin/sleep", "300"))
            await asyncio.sleep(0.02)
            opening.cancel()
            await asyncio.gather(opening, return_exceptions=True)
        await ended(left_open)
        await ended(hung_up)

    before = own_traces()
    asyncio.run(story())
    assert own_traces() == before


def test_another_process_can_destroy_a_sandbox_with_terminals(runtime: Runtime, disk: Path):
    async def story() -> None:
        handle = runtime.prepare(new_attempt_id())
        sandbox = await runtime.create(handle, describe(disk, handle.attempt_id))
        try:
            await sandbox.start(Command(["/bin/sleep", "300"], {}, "/workspace"))
            await open_shell(sandbox)
        finally:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await runtime.destroy(handle, disk)
        assert handle.attempt_id not in runtime.attempt_ids()

    asyncio.run(story())


# Confinement


def test_it_is_confined_as_the_command_is(runtime: Runtime, disk: Path):
    async def story() -> None:
        async with living(runtime, disk) as sandbox:
            script = f"exec 2>&1; {WHO}\necho the end; sleep 300"
            output, _ = await sandbox.start(Command(["/bin/bash", "-c", script], ENVIRONMENT, "/workspace"))
            of_the_command = (await read_until(output, b"the end\n")).decode().removesuffix("the end\n")
            terminal = await open_shell(sandbox, "/bin/bash", "-c", WHO)
            of_the_terminal = await said(terminal)
            assert "NoNewPrivs" in of_the_terminal or runtime.name == "gvisor"
            assert "CapEff:\t0000000000000000" in of_the_terminal
            # gVisor numbers the namespace of users anew each time that it is asked for it.
            fixed = (of_the_terminal, of_the_command)
            if runtime.name == "gvisor":
                fixed = tuple(re.sub(r"user:\[\d+\]", "user", lines) for lines in fixed)
            assert fixed[0].splitlines() == fixed[1].splitlines()

    asyncio.run(story())


_GRASP = r"""
import ctypes, errno, fcntl, os
libc = ctypes.CDLL(None, use_errno=True)
def attempt(name, call):
    try:
        call()
        print(name, "works")
    except OSError as error:
        print(name, errno.errorcode[error.errno])
def check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
attempt("sti", lambda: fcntl.ioctl(0, 0x5412, b"x"))
attempt("size", lambda: fcntl.ioctl(0, 0x5413, bytes(8)))
attempt("unshare", lambda: check(libc.unshare(0x10000000)))
attempt("setns", lambda: check(libc.setns(os.open("/proc/self/ns/net", os.O_RDONLY), 0)))
attempt("core_pattern", lambda: os.open("/proc/sys/kernel/core_pattern", os.O_WRONLY))
attempt("setuid", lambda: os.setuid(0))
attempt("mount", lambda: check(libc.mount(b"none", b"/tmp", b"tmpfs", 0, None)))
print("session", os.getsid(0) == os.getpid())
print("parent", os.getppid() in (0, 1) or os.path.exists(f"/proc/{os.getppid()}"))
"""


def test_it_can_do_no_more_than_the_command(runtime: Runtime, disk: Path):
    async def story() -> None:
        async with busy(runtime, disk) as sandbox:
            told = dict(
                line.split()
                for line in (await said(await open_shell(sandbox, "/usr/bin/python3", "-c", _GRASP))).splitlines()
            )
            assert (told.pop("size"), told.pop("session"), told.pop("parent")) == ("works", "True", "True")
            assert told.pop("sti") in {"EPERM", "EIO", "ENOTTY"}
            if has_own_kernel(runtime):
                told.pop("unshare")  # of that kernel's, as it is for the command
            assert told
            assert not [name for name, answer in told.items() if answer == "works"], told

    asyncio.run(story())


def test_no_process_inside_tells_of_the_host_while_terminals_open(
    runtime: Runtime, disk: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SERVER_SECRET", "server-secret-value")
    spy = r"""
while [ ! -e /tmp/enough ]; do
    cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2> /dev/null
    for fd in /proc/[0-9]*/fd/* /proc/[0-9]*/exe /proc/[0-9]*/cwd; do readlink $fd; done
done | tr '\0' '\n' | sort -u > /tmp/seen; echo done; sleep 300
"""

    async def story() -> None:
        async with living(runtime, disk) as sandbox:
            output, _ = await sandbox.start(Command(["/bin/bash", "-c", f"echo up; {spy}"], ENVIRONMENT, "/workspace"))
            await read_until(output, b"up")
            for _ in range(5):
                await ended(await open_shell(sandbox, "/bin/true"))
            await ended(await open_shell(sandbox, "/usr/bin/touch", "/tmp/enough"))
            await read_until(output, b"done")
            seen = await said(await open_shell(sandbox, "/bin/cat", "/tmp/seen"))
            assert "TERM=dumb" in seen
            checkout = str(Path(__file__).parents[2])
            for secret in ("server-secret-value", str(disk), "site-packages", "exec_command", "SANDBOX", checkout):
                assert secret not in seen, secret

    asyncio.run(story())


_TRAPS = {
    "a link to a file": "rm /dev/ptmx; ln -s /workspace/trap /dev/ptmx; touch /workspace/trap",
    "a pipe": "rm /dev/ptmx; mkfifo /dev/ptmx",
    "no such name": "rm -f /dev/ptmx /dev/tty /dev/pts/ptmx; mv /dev/pts /dev/elsewhere",
    "another /proc": "mv /proc /elsewhere; rm -rf /workspace/../proc/self",
}


@pytest.mark.parametrize("trap", _TRAPS)
def test_what_is_inside_cannot_send_it_astray(runtime: Runtime, disk: Path, trap: str):
    async def story() -> None:
        async with busy(runtime, disk, f"({_TRAPS[trap]}) 2> /dev/null; echo set; sleep 300") as sandbox:
            terminal = await open_shell(sandbox, "/bin/bash", "-c", "test -t 0 && echo a terminal")
            assert await said(terminal) == "a terminal\n"
            assert (await ended(terminal)).code == 0

    asyncio.run(story())


def test_a_directory_that_is_gone_is_told(runtime: Runtime, disk: Path):
    async def story() -> None:
        async with busy(runtime, disk) as sandbox:
            terminal = await sandbox.open_terminal(Command(["/bin/pwd"], ENVIRONMENT, "/workspace/gone"), SIZE)
            assert "could not be started" in await said(terminal)
            assert (await ended(terminal)).code == 127

    asyncio.run(story())


def test_what_it_starts_counts_as_the_sandboxs(runtime: Runtime, disk: Path, limits: frozenset[str]):
    if "processes" not in limits:
        pytest.skip("no limit on processes on this machine")

    async def story() -> None:
        async with busy(runtime, disk, processes_max=24) as sandbox:
            script = "for n in $(seq 40); do sleep 300 & done; wait"
            terminal = await open_shell(sandbox, "/bin/bash", "-c", script)
            await read_until(terminal.output, b"fork")
            assert has_own_kernel(runtime) or (await sandbox.stats()).processes

    asyncio.run(story())
