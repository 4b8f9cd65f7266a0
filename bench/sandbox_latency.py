"""Measures a sandbox's lifetime in each runtime (prepare, create, run `true`, destroy), and `true` without a sandbox.

Usage: python bench/sandbox_latency.py [RUNS] [RUNTIME ...]
"""

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sandbox.bootstrap.runtime_selection import make_runtime
from sandbox.interfaces.runtime import SANDBOX_WORKSPACE, Command, Runtime, SandboxSpec

MEMORY_BYTES = 512 * 1024 * 1024
RUNTIMES = ("bubblewrap", "gvisor")


def time_bare() -> float:
    """Return the duration of `true` without a sandbox, in milliseconds."""
    began = time.perf_counter()
    subprocess.run(["/usr/bin/true"], check=True, timeout=10)
    return (time.perf_counter() - began) * 1000


async def time_sandbox(runtime: Runtime, disk: Path, number: int) -> tuple[float, float]:
    """Return the time until a command prints its first byte and until the sandbox is destroyed, in milliseconds."""
    attempt_id = f"bench{os.getpid() % 1000:03}{number:04}"
    disk.mkdir()
    began = time.perf_counter()
    handle = runtime.prepare(attempt_id)
    try:
        sandbox = await runtime.create(handle, SandboxSpec(attempt_id, disk, 2, MEMORY_BYTES, 64))
        output, _ = await sandbox.start(Command(["/bin/sh", "-c", "echo; exec true"], {}, SANDBOX_WORKSPACE))
        await output.readexactly(1)
        first_byte = time.perf_counter()
        assert (await sandbox.wait()).code == 0
    finally:
        await runtime.destroy(handle, disk)
    return (first_byte - began) * 1000, (time.perf_counter() - began) * 1000


def describe(times: list[float]) -> str:
    """Format the median and the 99th percentile."""
    return f"{statistics.median(times):.0f} ms (p99 {statistics.quantiles(times, n=100, method='inclusive')[98]:.0f})"


async def measure(runs: int, names: list[str]) -> None:
    """Print one line per runtime."""
    bare = [time_bare() for _ in range(runs)]
    print(f"bare true: {statistics.median(bare):.2f} ms (median of {runs})")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            runtime = make_runtime(name, Path(folder))
            probe = await runtime.probe()
            if not probe.is_available:
                print(f"{name}: does not work here. {probe.remedy}")
                continue
            times = [await time_sandbox(runtime, Path(folder, str(number)), number) for number in range(runs)]
        first, whole = zip(*times, strict=True)
        print(f"{name}: first byte {describe(list(first))}, until destroyed {describe(list(whole))}")


if __name__ == "__main__":
    asyncio.run(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 50, sys.argv[2:] or list(RUNTIMES)))
