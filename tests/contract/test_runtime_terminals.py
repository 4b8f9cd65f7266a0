"""The contract of terminals: each is an additional command in a sandbox, with the same confinement."""

import asyncio
import os
import re
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from doubles.sandbox_lifecycle import (
    TIMEOUT_SECONDS,
    has_own_kernel,
    new_attempt_id,
    read_until,
    ready_sandbox,
    run_once,
    sandbox_spec,
)
from doubles.sandbox_scripts import IDENTITY_SCRIPT
from sandbox.interfaces.runtime import Command, ExitStatus, Runtime, Sandbox, Terminal, TerminalSize
from sandbox.model.failure import AttemptError
from sandbox.runner.terminals import PAUSE_COMMAND, SandboxTerminals

SIZE = TerminalSize(rows=24, columns=80)
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "TERM": "dumb", "PS1": "ready$ "}


@asynccontextmanager
async def sandbox_with_running_command(
    runtime: Runtime, disk: Path, script: str = "sleep 300 & wait", **changes: object
) -> AsyncIterator[Sandbox]:
    """Yield a sandbox with a running command."""
    async with ready_sandbox(runtime, disk, **changes) as sandbox:
        output, _ = await sandbox.start(Command(["/bin/bash", "-c", f"echo up; {script}"], {}, "/workspace"))
        await read_until(output, b"up")
        yield sandbox


async def open_shell(sandbox: Sandbox, *argv: str) -> Terminal:
    """Open a terminal with a shell that shows its prompt, or with another command."""
    command = Command(argv or ["/bin/bash", "--norc", "--noprofile"], ENVIRONMENT, "/workspace")
    terminal = await sandbox.open_terminal(command, SIZE)
    if not argv:
        await read_until(terminal.output, b"ready$ ")
    return terminal


async def wait_exit(terminal: Terminal) -> ExitStatus:
    async with asyncio.timeout(TIMEOUT_SECONDS):
        return await terminal.wait()


async def read_output(terminal: Terminal) -> str:
    """Return the complete output of a terminal."""
    async with asyncio.timeout(TIMEOUT_SECONDS):
        return (await terminal.output.read()).decode(errors="replace").replace("\r\n", "\n")


def process_resources() -> tuple[list[str], int]:
    """Return the children of this process and the number of its open descriptors."""
    children = [pid for listing in Path("/proc/self/task").glob("*/children") for pid in listing.read_text().split()]
    return children, len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("true", "/workspace/sub"),
        ("rmdir sub", "/"),
        ("rmdir sub; touch sub", "/"),
        ("chmod 0 sub", "/"),
        ("chmod 0 /workspace /home/agent /tmp", "/"),
    ],
)
async def test_shell_of_a_reused_disk_starts_although_the_agent_locked_its_directories(
    runtime: Runtime, disk: Path, change: str, expected: str
):
    script = ["/bin/sh", "-c", f"mkdir sub; {change}"]
    assert (await run_once(runtime, disk, script)).code == 0
    async with ready_sandbox(runtime, disk, is_disk_reused=True) as sandbox:
        await sandbox.start(PAUSE_COMMAND)
        environment = {**ENVIRONMENT, "BASH_ENV": "/dev/no-such-file", "HOME": "/home/agent"}
        shell = await SandboxTerminals(sandbox, environment, "/workspace/sub").open_shell("dumb", SIZE)
        await shell.write(b"pwd; echo $PWD; exit\n")
        output = await read_output(shell)
        assert output.count(f"\n{expected}\n") == 1, output
        assert f"\n{expected}\n{expected}\n" in output
        assert (await wait_exit(shell)).code == 0


# A terminal and its process


async def test_input_is_echoed_and_executed(runtime: Runtime, disk: Path):
    async with sandbox_with_running_command(runtime, disk) as sandbox:
        terminal = await open_shell(sandbox)
        await terminal.write(b"echo $((40 + 2)); tty; test -t 0 -a -t 1 -a -t 2 && echo three\n")
        output = await read_until(terminal.output, b"three\r\nready$ ")
        assert b"echo $((40 + 2))" in output
        # In gVisor, the terminal has no name.
        name = b"not a tty" if runtime.name == "gvisor" else rb"/dev/pts/\d+"
        assert re.search(rb"\r\n42\r\n" + name + rb"\r\n", output), output
        await terminal.hang_up()


@pytest.mark.parametrize("code", [0, 7])
async def test_exit_code_is_returned_and_the_sandbox_continues(runtime: Runtime, disk: Path, code: int):
    async with sandbox_with_running_command(runtime, disk) as sandbox:
        terminal = await open_shell(sandbox)
        await terminal.write(b"exit %d\n" % code)
        assert (await wait_exit(terminal)).code == code
        assert (await wait_exit(terminal)).code == code
        await terminal.write(b"not read\n")
        echo = await open_shell(sandbox, "/bin/echo", "still here")
        assert await read_output(echo) == "still here\n"


async def test_exit_code_after_a_signal_is_128_plus_its_number(runtime: Runtime, disk: Path):
    async with sandbox_with_running_command(runtime, disk) as sandbox:
        terminal = await open_shell(sandbox, "/bin/bash", "-c", "kill -TERM $$")
        assert (await wait_exit(terminal)).code == 128 + signal.SIGTERM


async def test_missing_program_exits_with_127_and_a_message(runtime: Runtime, disk: Path):
    async with sandbox_with_running_command(runtime, disk) as sandbox:
        terminal = await open_shell(sandbox, "/usr/bin/no-such-program")
        assert "no-such-program" in await read_output(terminal)
        assert (await wait_exit(terminal)).code == 127


async def test_environment_and_directory_are_as_requested(
    runtime: Runtime, disk: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOST_SECRET", "of-the-host")
    async with sandbox_with_running_command(runtime, disk) as sandbox:
        environment = {"GREETING": "two words, a \u00fc and\na line", "EMPTY": "", "HOME": "/home/agent"}
        command = Command(["/usr/bin/env", "-0"], environment, "/home/agent")
        terminal = await sandbox.open_terminal(command, SIZE)
        actual = dict(pair.split("=", 1) for pair in (await read_output(terminal)).split("\0") if pair)
        assert actual == {**environment, "PWD": "/home/agent"}
        terminal = await open_shell(sandbox, "/bin/bash", "-c", 'echo $# "$2" $PWD; pwd', "name", "", "last")
        assert await read_output(terminal) == "2 last /workspace\n/workspace\n"


async def test_terminal_has_the_requested_size_and_can_be_resized(runtime: Runtime, disk: Path):
    async with sandbox_with_running_command(runtime, disk) as sandbox:
        script = "stty size; trap 'stty size; exit 0' WINCH; echo waits; while :; do sleep 0.1; done"
        terminal = await open_shell(sandbox, "/bin/bash", "-c", script)
        assert (await read_until(terminal.output, b"waits")).startswith(b"24 80\r\n")
        await terminal.resize(TerminalSize(rows=50, columns=132))
        assert "50 132" in await read_output(terminal)
        assert (await wait_exit(terminal)).code == 0


async def test_last_of_several_resizes_takes_effect(runtime: Runtime, disk: Path):
    async with sandbox_with_running_command(runtime, disk) as sandbox:
        terminal = await open_shell(sandbox)
        await asyncio.gather(*(terminal.resize(TerminalSize(30 + number, 100)) for number in range(20)))
        await terminal.write(b"stty size\n")
        assert b"49 100" in await read_until(terminal.output, b"49 100")


async def test_control_c_interrupts_only_the_foreground_process(runtime: Runtime, disk: Path):
    async with sandbox_with_running_command(runtime, disk) as sandbox:
        terminal = await open_shell(sandbox)
        await terminal.write(b"sh -c 'trap \"exit 130\" INT; echo be''gun; while :; do sleep 0.05; done'\n")
        await read_until(terminal.output, b"begun\r\n")
        await terminal.write(b"\x03")
        await read_until(terminal.output, b"ready$ ")
        await terminal.write(b"echo code $?; exit 0\n")
        assert "code 130" in await read_output(terminal)
        assert (await wait_exit(terminal)).code == 0


async def test_hang_up_ends_the_processes_on_the_terminal(runtime: Runtime, disk: Path):
    async with sandbox_with_running_command(runtime, disk) as sandbox:
        terminal = await open_shell(sandbox)
        await terminal.hang_up()
        assert (await wait_exit(terminal)).code in {0, 1, 128 + signal.SIGHUP}
        await read_output(terminal)
        await terminal.hang_up()
        await terminal.resize(SIZE)


async def test_large_output_and_input_are_complete(runtime: Runtime, disk: Path):
    async with sandbox_with_running_command(runtime, disk) as sandbox:
        flood = await open_shell(sandbox, "/bin/bash", "-c", "head -c 3000000 /dev/zero | tr '\\0' x; sleep 0.2")
        assert len(await read_output(flood)) == 3_000_000
        script = "stty raw -echo; echo go; head -c 200000 | sha256sum"
        reader, text = await open_shell(sandbox, "/bin/bash", "-c", script), os.urandom(200_000)
        await read_until(reader.output, b"go")
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await reader.write(text)
        import hashlib

        assert hashlib.sha256(text).hexdigest() in await read_output(reader)


async def test_concurrent_terminals_are_independent(runtime: Runtime, disk: Path):
    async with sandbox_with_running_command(runtime, disk) as sandbox:

        async def open_one(number: int) -> tuple[str, int | None]:
            terminal = await open_shell(sandbox, "/bin/bash", "-c", f"tty; exit {number}")
            return await read_output(terminal), (await wait_exit(terminal)).code

        results = await asyncio.gather(*(open_one(number) for number in range(5)))
        assert [code for _, code in results] == list(range(5))
        shells = [await open_shell(sandbox) for _ in range(3)]
        names = []
        for shell in shells:
            await shell.write(b"tty\n")
            names.append((await read_until(shell.output, b"ready$ ")).split()[1])
            await shell.hang_up()
        assert len(set(names)) == (1 if runtime.name == "gvisor" else 3)


# Exit


async def test_terminal_ends_with_the_command(runtime: Runtime, disk: Path):
    async with sandbox_with_running_command(
        runtime,
        disk,
        "read -t 60 < /tmp/end || sleep 1",
    ) as sandbox:
        terminal = await open_shell(
            sandbox, "/bin/bash", "-c", "trap '' HUP TERM INT; echo stays; sleep 300; sleep 300"
        )
        await read_until(terminal.output, b"stays")
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await sandbox.wait()
        assert (await wait_exit(terminal)).code in {None, 128 + signal.SIGKILL}
        await read_output(terminal)


async def test_terminal_that_nobody_reads_does_not_delay_the_exit(runtime: Runtime, disk: Path):
    script = "until [ -e /tmp/started ]; do sleep 0.1; done; sleep 2; echo done; exit 7"
    async with ready_sandbox(runtime, disk) as sandbox:
        output, _ = await sandbox.start(Command(["/bin/bash", "-c", script], ENVIRONMENT, "/workspace"))
        terminal = await open_shell(sandbox, "/bin/bash", "-c", "touch /tmp/started; yes")
        async with asyncio.timeout(TIMEOUT_SECONDS):
            assert await output.read() == b"done\n"
            assert (await sandbox.wait()).code == 7
        assert "y\ny\n" in await read_output(terminal)


async def test_terminal_ends_with_a_killed_sandbox(runtime: Runtime, disk: Path):
    async with sandbox_with_running_command(runtime, disk) as sandbox:
        terminals = [await open_shell(sandbox) for _ in range(3)]
        await sandbox.kill()
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await sandbox.wait()
        for terminal in terminals:
            assert (await wait_exit(terminal)).code in {None, 1, 128 + signal.SIGHUP, 128 + signal.SIGKILL}
            assert "could not be started" not in await read_output(terminal)


async def test_terminal_is_unavailable_before_start_and_after_exit(runtime: Runtime, disk: Path):
    async with ready_sandbox(runtime, disk) as sandbox:
        with pytest.raises(AttemptError) as caught:
            await open_shell(sandbox, "/bin/true")
        assert caught.value.code == "sandbox_lost"
        await sandbox.start(Command(["/bin/true"], {}, "/workspace"))
        await sandbox.wait()
        with pytest.raises(AttemptError) as caught:
            await open_shell(sandbox, "/bin/true")
        assert caught.value.code == "sandbox_lost"


async def test_terminals_leave_no_processes_or_descriptors(runtime: Runtime, disk: Path):
    async def scenario() -> None:
        async with sandbox_with_running_command(runtime, disk) as sandbox:
            open_terminal_ = await open_shell(sandbox)
            hung_up = await open_shell(sandbox)
            await hung_up.hang_up()
            await wait_exit(await open_shell(sandbox, "/bin/true"))
            opening = asyncio.create_task(open_shell(sandbox, "/bin/sleep", "300"))
            await asyncio.sleep(0.02)
            opening.cancel()
            await asyncio.gather(opening, return_exceptions=True)
        await wait_exit(open_terminal_)
        await wait_exit(hung_up)

    before = process_resources()
    await scenario()
    assert process_resources() == before


async def test_sandbox_with_terminals_can_be_destroyed(runtime: Runtime, disk: Path):
    handle = runtime.prepare(new_attempt_id())
    sandbox = await runtime.create(handle, sandbox_spec(disk, handle.attempt_id))
    try:
        await sandbox.start(Command(["/bin/sleep", "300"], {}, "/workspace"))
        await open_shell(sandbox)
    finally:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await runtime.destroy(handle, disk)
    assert handle.attempt_id not in runtime.attempt_ids()


# Confinement


async def test_terminal_has_the_confinement_of_the_command(runtime: Runtime, disk: Path):
    async with ready_sandbox(runtime, disk) as sandbox:
        script = f"exec 2>&1; {IDENTITY_SCRIPT}\necho the end; sleep 300"
        output, _ = await sandbox.start(Command(["/bin/bash", "-c", script], ENVIRONMENT, "/workspace"))
        command_output = (await read_until(output, b"the end\n")).decode().removesuffix("the end\n")
        terminal = await open_shell(sandbox, "/bin/bash", "-c", IDENTITY_SCRIPT)
        terminal_output = await read_output(terminal)
        assert "NoNewPrivs" in terminal_output or runtime.name == "gvisor"
        assert "CapEff:\t0000000000000000" in terminal_output
        # gVisor renumbers the user namespace on each query.
        outputs = (terminal_output, command_output)
        if runtime.name == "gvisor":
            outputs = tuple(re.sub(r"user:\[\d+\]", "user", lines) for lines in outputs)
        assert outputs[0].splitlines() == outputs[1].splitlines()


_PRIVILEGED_CALLS = r"""
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


async def test_terminal_has_no_more_privileges_than_the_command(runtime: Runtime, disk: Path):
    async with sandbox_with_running_command(runtime, disk) as sandbox:
        results = dict(
            line.split()
            for line in (
                await read_output(await open_shell(sandbox, "/usr/bin/python3", "-c", _PRIVILEGED_CALLS))
            ).splitlines()
        )
        assert (results.pop("size"), results.pop("session"), results.pop("parent")) == ("works", "True", "True")
        assert results.pop("sti") in {"EPERM", "EIO", "ENOTTY"}
        if has_own_kernel(runtime):
            results.pop("unshare")  # the sandbox's kernel allows it, as for the command
        assert results
        assert not [name for name, outcome in results.items() if outcome == "works"], results


async def test_opening_terminals_reveals_nothing_about_the_host(
    runtime: Runtime, disk: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SERVER_SECRET", "server-secret-value")
    inspect_script = r"""
while [ ! -e /tmp/enough ]; do
    cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2> /dev/null
    for fd in /proc/[0-9]*/fd/* /proc/[0-9]*/exe /proc/[0-9]*/cwd; do readlink $fd; done
done | tr '\0' '\n' | sort -u > /tmp/seen; echo done; sleep 300
"""
    async with ready_sandbox(runtime, disk) as sandbox:
        output, _ = await sandbox.start(
            Command(["/bin/bash", "-c", f"echo up; {inspect_script}"], ENVIRONMENT, "/workspace")
        )
        await read_until(output, b"up")
        for _ in range(5):
            await wait_exit(await open_shell(sandbox, "/bin/true"))
        await wait_exit(await open_shell(sandbox, "/usr/bin/touch", "/tmp/enough"))
        await read_until(output, b"done")
        visible = await read_output(await open_shell(sandbox, "/bin/cat", "/tmp/seen"))
        assert "TERM=dumb" in visible
        checkout = str(Path(__file__).parents[2])
        for secret in ("server-secret-value", str(disk), "site-packages", "namespace_exec", "SANDBOX", checkout):
            assert secret not in visible, secret


_TRAPS = {
    "symlink to a file": "rm /dev/ptmx; ln -s /workspace/trap /dev/ptmx; touch /workspace/trap",
    "pipe": "rm /dev/ptmx; mkfifo /dev/ptmx",
    "missing name": "rm -f /dev/ptmx /dev/tty /dev/pts/ptmx; mv /dev/pts /dev/elsewhere",
    "other /proc": "mv /proc /elsewhere; rm -rf /workspace/../proc/self",
}


@pytest.mark.parametrize("trap", _TRAPS)
async def test_terminal_works_with_manipulated_device_files(runtime: Runtime, disk: Path, trap: str):
    async with sandbox_with_running_command(
        runtime, disk, f"({_TRAPS[trap]}) 2> /dev/null; echo set; sleep 300"
    ) as sandbox:
        terminal = await open_shell(sandbox, "/bin/bash", "-c", "test -t 0 && echo a terminal")
        assert await read_output(terminal) == "a terminal\n"
        assert (await wait_exit(terminal)).code == 0


async def test_missing_directory_is_reported(runtime: Runtime, disk: Path):
    async with sandbox_with_running_command(runtime, disk) as sandbox:
        terminal = await sandbox.open_terminal(Command(["/bin/pwd"], ENVIRONMENT, "/workspace/gone"), SIZE)
        assert "could not be started" in await read_output(terminal)
        assert (await wait_exit(terminal)).code == 127


async def test_processes_of_a_terminal_count_towards_the_limit(
    runtime: Runtime, disk: Path, enforced_limits: frozenset[str]
):
    if "processes" not in enforced_limits:
        pytest.skip("no limit on processes on this machine")
    async with sandbox_with_running_command(runtime, disk, processes_max=24) as sandbox:
        script = "for n in $(seq 40); do sleep 300 & done; wait"
        terminal = await open_shell(sandbox, "/bin/bash", "-c", script)
        await read_until(terminal.output, b"fork")
        assert has_own_kernel(runtime) or (await sandbox.stats()).processes


# Programs that get too little CPU time cannot block the runner


_STARVE_FUNCTION = """
import ctypes, mmap, os, signal, threading, time, tty
signal.signal(signal.SIGHUP, signal.SIG_IGN)
def starve(doublings):
    "Use up the CPU time of the sandbox as soon as the file `prepared` exists."
    if os.fork(): return
    while not os.path.exists("/workspace/prepared"): time.sleep(0.1)
    for _ in range(doublings): os.fork()
    while True: pass
"""

_MANY_WRITERS = (
    _STARVE_FUNCTION
    + """
def write():
    try:
        while True: os.write(1, bytes(65536))
    except OSError: time.sleep(600)
starve(7)
tty.setraw(0)
threading.stack_size(65536)
for _ in range(200): threading.Thread(target=write).start()
open("/workspace/prepared", "w").close()
"""
)

_LOCKED_MEMORY = (
    _STARVE_FUNCTION
    + """
starve(8)
size, libc = 1 << 30, ctypes.CDLL(None)
memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(15)  # MADV_NOHUGEPAGE
for place in range(0, size, 4096): memory[place] = 1
address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
open("/workspace/prepared", "w").close()
while True:
    for protection in (1, 3): libc.mprotect(address, ctypes.c_size_t(size), protection)
"""
)


@asynccontextmanager
async def starved_sandbox(
    runtime: Runtime, disk: Path, enforced_limits: frozenset[str], source: str = ""
) -> AsyncIterator[Sandbox]:
    if has_own_kernel(runtime):
        pytest.skip("the sandbox has its own kernel")
    if not {"cpus", "memory"} <= enforced_limits:
        pytest.skip("no control group limits CPU time")
    async with ready_sandbox(runtime, disk, cpus=1, processes_max=512, memory_bytes=3 * 1024**3) as sandbox:
        argv = ["/usr/bin/python3", "-c", source] if source else ["/bin/sleep", "300"]
        await sandbox.start(Command(argv, ENVIRONMENT, "/workspace"))
        yield sandbox


async def wait_for_processes(sandbox: Sandbox, count: int) -> None:
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while ((await sandbox.stats()).processes or 0) < count:
            await asyncio.sleep(0.1)


async def test_hangup_does_not_wait_for_writers_that_get_no_cpu_time(
    runtime: Runtime, disk: Path, enforced_limits: frozenset[str]
):
    async with starved_sandbox(runtime, disk, enforced_limits) as sandbox:
        terminal = await open_shell(sandbox, "/usr/bin/python3", "-c", _MANY_WRITERS)
        await wait_for_processes(sandbox, 2**7 + 200)
        started_at = time.monotonic()
        await terminal.hang_up()
        assert time.monotonic() - started_at < 2


_SIZE_READERS = (
    _STARVE_FUNCTION
    + """
starve(7)
signal.signal(signal.SIGWINCH, signal.SIG_IGN)
size, libc, TIOCGWINSZ, MADV_DONTNEED = 1 << 29, ctypes.CDLL(None), 0x5413, 4
memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(15)  # MADV_NOHUGEPAGE
for place in range(0, size, 4096): memory[place] = 1
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
def lock():
    while True:
        for protection in (1, 3): libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), protection)
def read(place):
    "Read the size of the terminal into missing pages. The kernel holds the size's lock until it has written them."
    while True:
        place = (place * 1103515245 + 12345) % (size >> 12)
        page = ctypes.c_void_p(address + (place << 12))
        libc.madvise(page, ctypes.c_size_t(4096), MADV_DONTNEED)
        libc.ioctl(0, TIOCGWINSZ, page)
threading.stack_size(65536)
for number in range(20): threading.Thread(target=read, args=[number]).start()
for _ in range(4): threading.Thread(target=lock).start()
open("/workspace/prepared", "w").close()
"""
)


async def test_resize_does_not_wait_for_readers_of_the_size_that_get_no_cpu_time(
    runtime: Runtime, disk: Path, enforced_limits: frozenset[str]
):
    async with starved_sandbox(runtime, disk, enforced_limits) as sandbox:
        terminal = await open_shell(sandbox, "/usr/bin/python3", "-c", _SIZE_READERS)
        await wait_for_processes(sandbox, 2**7 + 24)
        for number in range(30):
            started_at = time.monotonic()
            await terminal.resize(TerminalSize(24 + number, 80))
            assert time.monotonic() - started_at < 2
            await asyncio.sleep(0.3)


async def test_signal_does_not_wait_for_memory_locks_of_the_command(
    runtime: Runtime, disk: Path, enforced_limits: frozenset[str]
):
    async with starved_sandbox(runtime, disk, enforced_limits, _LOCKED_MEMORY) as sandbox:
        await wait_for_processes(sandbox, 2**8)
        for _ in range(20):
            started_at = time.monotonic()
            await sandbox.signal(signal.SIGCONT)
            assert time.monotonic() - started_at < 2
            await asyncio.sleep(0.3)
