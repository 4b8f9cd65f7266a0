"""The servers of `sandbox demo --keep`, which run in the background until `sandbox demo --stop`.

One detached process starts and stops the git server, the scripted model and the Sandbox server. It locks the file that
contains its process id, so the process id is valid while the file is locked.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from sandbox.demo.git_server import DEFAULT_PORT
from sandbox.demo.walkthrough import (
    CANCEL_TIMEOUT_SECONDS,
    REPOSITORY_NAME,
    exit_on_signals,
    has_model_key,
    make_example_repository,
    print_model,
    read_first_line,
    run_task,
    scripted_model_variables,
    start_module,
    start_server,
)
from sandbox.model.default_server_address import DEFAULT_API_PORT, DEFAULT_WEBSOCKET_PORT
from sandbox.model.errors import SandboxError

START_TIMEOUT_SECONDS = 90.0
STOP_TIMEOUT_SECONDS = 90.0
_POLL_SECONDS = 0.1
_LOG_BYTES_MAX = 2000

PORTS = {"port": DEFAULT_API_PORT, "ws_port": DEFAULT_WEBSOCKET_PORT, "git_port": DEFAULT_PORT}
"""The default ports, which `sandbox serve` and the git server also use; 0 means any free port."""


def demo_directory() -> Path:
    """Return the directory that contains the demo's files."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "sandbox" / "demo"


def run_and_keep_servers(ports: Mapping[str, int]) -> int:
    """Run the demo with servers that stay in the background. Return the exit code: 0 if the task completed."""
    from sandbox.cli.output.console import stdout_console

    console = stdout_console(has_color="NO_COLOR" not in os.environ)
    print_model(console)
    with exit_on_signals():
        addresses = start_background_servers(ports)
        try:
            is_completed = run_task(addresses["server"], addresses["repository"], console)
        except BaseException:
            stop_background_servers()
            raise
    console.print(f"\n{closing_text(addresses)}", soft_wrap=True)
    return 0 if is_completed else 1


def closing_text(addresses: Mapping[str, str]) -> str:
    """Return what the command prints at its end: the addresses and the next commands."""
    return (
        f"The servers keep running in the background:\n\n  Dashboard   {addresses['server']}\n"
        f"  Repository  {addresses['repository']}\n\nRun a task in a clone of the repository:\n\n"
        f"  git clone {addresses['repository']} && cd {Path(REPOSITORY_NAME).stem}\n"
        f'  sandbox{_server_option(addresses["server"])} run "Fix the failing test."\n\n'
        "Stop the servers and remove their files: sandbox demo --stop"
    )


def _server_option(server: str) -> str:
    """Return the option that selects the server; empty for the default address, which needs no option."""
    return (
        ""
        if server in {f"http://{host}:{DEFAULT_API_PORT}" for host in ("localhost", "127.0.0.1")}
        else f" --server {server}"
    )


def start_background_servers(ports: Mapping[str, int]) -> dict[str, str]:
    """Start the servers in the background and return their addresses. Raises SandboxError."""
    directory = demo_directory()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    options = [f"--{name.replace('_', '-')}={number}" for name, number in ports.items()]
    with (directory / "log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-I", "-m", "sandbox.demo.background_servers", f"--directory={directory}", *options],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
        )  # fmt: skip
    assert process.stdout is not None
    try:
        with process.stdout as stdout:
            addresses: dict[str, str] = json.loads(read_first_line(stdout, "the demo", START_TIMEOUT_SECONDS))
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if "error" in addresses:
        process.wait()
        raise SandboxError(addresses["error"])
    process.returncode = 0  # avoids Popen's ResourceWarning: the process keeps running
    return addresses


def stop_background_servers() -> bool:
    """Stop the servers, cancel their tasks and remove all files; return False if none were running."""
    with _open_lock(demo_directory()) as lock:
        if lock is None:
            return False
        if _try_lock(lock):
            shutil.rmtree(demo_directory(), ignore_errors=True)  # leftovers of a crash
            return False
        process_id = lock.read()
        if not process_id:  # the process that holds the lock has not yet written its id
            return False
        os.kill(int(process_id), signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_SECONDS
        while not _try_lock(lock):
            if time.monotonic() > deadline:
                raise SandboxError(f"The demo's server did not stop within {STOP_TIMEOUT_SECONDS:.0f} s; try again.")
            time.sleep(_POLL_SECONDS)
    return True


@contextlib.contextmanager
def _open_lock(directory: Path) -> Iterator[IO[str] | None]:
    try:
        with (directory / "lock").open() as lock:
            yield lock
    except FileNotFoundError:
        yield None


def _try_lock(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _serve(directory: Path, ports: Mapping[str, int]) -> None:
    """Run the servers until SIGTERM. Prints the addresses, or the error, as one JSON line."""
    with (directory / "lock").open("a+") as lock:
        if not _try_lock(lock):
            _announce(error="The demo's server is running already; stop it: sandbox demo --stop")
            return
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        try:
            with exit_on_signals():
                _serve_locked(directory, ports)
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def _serve_locked(directory: Path, ports: Mapping[str, int]) -> None:
    for name in ("git", "data"):  # leftovers of a crash
        shutil.rmtree(directory / name, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        try:
            make_example_repository(directory / "git")
            arguments = ("--directory", str(directory / "git"), "--port", str(ports["git_port"]))
            git = stack.enter_context(start_module("sandbox.demo.git_server", *arguments))
            model = {} if has_model_key() else stack.enter_context(scripted_model_variables())
            server = stack.enter_context(
                start_server(directory / "data", model, port=ports["port"], ws_port=ports["ws_port"])
            )
        except SandboxError as error:
            log = (directory / "log").read_bytes()[-_LOG_BYTES_MAX:].decode(errors="replace").strip()
            _announce(error=f"{error.message}\n{log}" if log else error.message)
            return
        stack.callback(_cancel_tasks, server["http"])
        _announce(server=server["http"], repository=f"{git['url']}/{REPOSITORY_NAME}")
        while True:
            signal.pause()


def _announce(**fields: Any) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()
    with Path(os.devnull).open("wb") as null:  # the command that reads stdout exits once the servers run
        os.dup2(null.fileno(), sys.stdout.fileno())


def _cancel_tasks(server: str) -> None:
    """Cancel unfinished tasks, which would otherwise continue without a server."""
    from sandbox.client import Client, ClientError
    from sandbox.model.task_state import FINAL_STATES, TaskState

    with contextlib.suppress(ClientError), Client(server, "") as client:
        unfinished = [task["id"] for task in client.all_tasks(states=sorted(set(TaskState) - FINAL_STATES))]
        for action in (
            lambda task_id: client.cancel(task_id, reason="The demo was stopped.", force=True),
            lambda task_id: client.wait(task_id, timeout_seconds=CANCEL_TIMEOUT_SECONDS),
        ):
            for task_id in unfinished:
                with contextlib.suppress(ClientError):  # the task has already ended
                    action(task_id)


def main() -> None:
    """Run the servers in this process."""
    parser = argparse.ArgumentParser(description="Run the servers of `sandbox demo --keep` until SIGTERM.")
    parser.add_argument("--directory", type=Path, required=True, help="directory for all files")
    for name, port in PORTS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=port, help="0 means any free port")
    options = parser.parse_args()
    _serve(options.directory, {name: getattr(options, name) for name in PORTS})


if __name__ == "__main__":
    main()
