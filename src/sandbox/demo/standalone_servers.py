"""Serves the demo's repository and model for use with any server: `python -m sandbox.demo.standalone_servers`."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
from pathlib import Path

from sandbox.demo.example_repository import REPOSITORY_NAME, make_example_repository
from sandbox.demo.git_server import DEFAULT_PORT, git_service
from sandbox.demo.model_script import example_script
from sandbox.demo.scripted_model import ScriptedModel

MODEL_PORT = 8131


async def serve_demo(directory: Path, *, git_port: int, model_port: int) -> None:
    """Serve the repository and the model until SIGTERM or SIGINT. Raises OSError if a port is in use."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with (
        git_service(directory, port=git_port) as git,
        ScriptedModel(example_script(), port=model_port) as model,
    ):
        sys.stdout.write(f"Repository  {git.url}/{REPOSITORY_NAME}\nModel       {model.url}\nPress ^C to stop both.\n")
        sys.stdout.flush()
        await stop.wait()


def main() -> int:
    """Create the repository, and serve it with the scripted model. Return the exit code."""
    parser = argparse.ArgumentParser(description="Serve the demo's repository and scripted model on loopback.")
    parser.add_argument("--git-port", type=int, default=DEFAULT_PORT, help="0 means any free port")
    parser.add_argument("--model-port", type=int, default=MODEL_PORT, help="0 means any free port")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sandbox-demo-") as directory:
        make_example_repository(Path(directory))
        try:
            asyncio.run(serve_demo(Path(directory), git_port=options.git_port, model_port=options.model_port))
        except OSError as error:
            sys.stderr.write(f"{error.strerror}; choose other ports with --git-port and --model-port.\n")
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
