"""How long a sandbox takes: planned, created, `true` run in it, destroyed; against a bare `true` in the same run.

Usage: python bench/sandbox_latency.py [RUNS]
"""

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sandbox.contracts.runtime import Command, SandboxSpec
from sandbox.runtimes.bubblewrap import BubblewrapRuntime

MEMORY_BYTES = 512 * 1024 * 1024


def time_bare() -> float:
    """Milliseconds of a `true` of its own."""
    began = time.perf_counter()
    subprocess.run(["/usr/bin/true"], check=True, timeout=10)
    return (time.perf_counter() - began) * 1000


async def time_sandbox(runtime: BubblewrapRuntime, disk: Path, number: int) -> float:
    """Milliseconds of a sandbox's whole life around a `true`."""
    attempt_id = f"bench{os.getpid() % 1000:03}{number:04}"
    disk.mkdir()
    began = time.perf_counter()
    handle = runtime.plan(attempt_id)
    try:
        sandbox = await runtime.create(handle, SandboxSpec(attempt_id, disk, 2, MEMORY_BYTES, 64))
        output, _ = await sandbox.start(Command(["/usr/bin/true"], {}, "/workspace"))
        await output.read()
        assert (await sandbox.wait()).code == 0
    finally:
        await runtime.destroy(handle, disk)
    return (time.perf_counter() - began) * 1000


async def measure(runs: int) -> None:
    """Print both medians and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        runtime = BubblewrapRuntime(Path(folder))
        bare, sandboxed = [], []
        for number in range(runs):
            bare.append(time_bare())
            sandboxed.append(await time_sandbox(runtime, Path(folder, str(number)), number))
    one, other = statistics.median(bare), statistics.median(sandboxed)
    print(f"bare true {one:.2f} ms, in a sandbox {other:.2f} ms (medians of {runs}), ratio {other / one:.1f}")


if __name__ == "__main__":
    asyncio.run(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 50))
