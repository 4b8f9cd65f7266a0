"""Subprocesses that end with the demo."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from sandbox.model.errors import SandboxError

START_TIMEOUT_SECONDS = 30.0
STOP_TIMEOUT_SECONDS = 5.0


@contextlib.contextmanager
def start_server(data_dir: Path, model: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Start a server on free ports. model: environment variables that configure its model."""
    # Ignore the user's server configuration. Log only errors, so that the log does not mix with the demo's output; the
    # task's status contains its errors.
    model = {"SANDBOX_CONFIG": os.devnull, "SANDBOX_LOG_LEVEL": "error", "SANDBOX_LOG_FORMAT": "text", **model}
    arguments = (
        "serve",
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--ws-port",
        "0",
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
    """Run `python -m module`; yield its first output line as JSON. Raises SandboxError if it does not start."""
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
        yield json.loads(_first_line(process.stdout, module))
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _first_line(stdout: IO[bytes], module: str) -> bytes:
    ready, _, _ = select.select([stdout], [], [], START_TIMEOUT_SECONDS)
    line = stdout.readline() if ready else b""
    if not line:
        raise SandboxError(f"{module} did not start within {START_TIMEOUT_SECONDS:.0f} s; run: sandbox doctor")
    return line
