"""Starts and stops the processes that the demo uses: the Sandbox server, the git server and the scripted model."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn

from sandbox.model.errors import SandboxError

START_TIMEOUT_SECONDS = 30.0
STOP_TIMEOUT_SECONDS = 5.0


@contextlib.contextmanager
def exit_on_signals() -> Iterator[None]:
    """Exit on SIGTERM and SIGHUP (closed terminal) as on ^C, so that every started process is stopped."""

    def exit_process(number: int, _: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, exit_process) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def scripted_model_variables() -> Iterator[dict[str, str]]:
    """Start the scripted model; yield the environment variables that make a server use it."""
    with start_module("sandbox.demo.scripted_model", "--port", "0") as model:
        # The server redacts the key in all output, so the key must not be a word.
        key = f"demo-{secrets.token_hex(16)}"
        yield {"ANTHROPIC_BASE_URL": model["url"], "ANTHROPIC_API_KEY": key, "ANTHROPIC_AUTH_TOKEN": ""}


@contextlib.contextmanager
def start_server(
    data_dir: Path, model: Mapping[str, str], *, port: int = 0, ws_port: int = 0
) -> Iterator[dict[str, Any]]:
    """Start a server, by default on free ports. model: environment variables that configure its model."""
    # Ignore the user's server configuration. Log only errors, so that log lines do not mix with the demo's output. The
    # task's errors are in its status.
    model = {"SANDBOX_CONFIG": os.devnull, "SANDBOX_LOG_LEVEL": "error", "SANDBOX_LOG_FORMAT": "text", **model}
    arguments = (
        "serve",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--ws-port",
        str(ws_port),
        "--data-dir",
        str(data_dir),
        "--format",
        "json",
    )
    with start_module("sandbox", *arguments, environment={**os.environ, **model}) as server:
        yield server


@contextlib.contextmanager
def start_module(
    module: str, *arguments: str, environment: Mapping[str, str] | None = None
) -> Iterator[dict[str, Any]]:
    """Run `python -m module`; yield the JSON in its first output line. Raises SandboxError if it does not start."""
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=environment,
        process_group=0,  # ^C is handled by the demo, which ends its processes in the right order
    )
    assert process.stdout is not None
    try:
        yield json.loads(read_first_line(process.stdout, module))
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def read_first_line(stdout: IO[bytes], name: str, timeout_seconds: float = START_TIMEOUT_SECONDS) -> bytes:
    """Return the line that a process prints once it has started. Raises SandboxError."""
    ready, _, _ = select.select([stdout], [], [], timeout_seconds)
    if not ready:
        raise SandboxError(f"{name} did not start within {timeout_seconds:.0f} s; run: sandbox doctor")
    line = stdout.readline()
    if not line:
        raise SandboxError(f"{name} exited during startup; run: sandbox doctor")
    return line
