"""Measures how floods from a sandbox affect its gateway and model requests: `python bench/gateway_floods.py`.

Each flood lasts `--seconds`; `--only TEXT` selects floods by name. Prints the CPU usage of the gateway in cores, in
total and in the second half; the duration of model requests during the flood in milliseconds, over a persistent
connection and over new connections, median and maximum (60000 means that a request failed); the number of events that
the gateway reported; and its memory.
"""

import argparse
import statistics
import sys
import time
from http.client import HTTPConnection, HTTPException
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from doubles import floods
from doubles.flood_harness import FloodHarness, flood_harness, send_model_request


def main() -> None:
    """Run the floods one after the other, each against a new gateway."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--seconds", type=float, default=20)
    options = parser.parse_args()
    print(f"{'flood':<36} {'cores':>6} {'later':>6}   kept: median, max ms   fresh: median, max ms   events  MiB")
    for name in floods.flood_names():
        if options.only in name:
            with flood_harness() as harness:
                measured = measure(harness, name, options.seconds)
            print(
                f"{measured} {harness.final_report['events']:>6} {harness.final_report['peak_memory_bytes'] >> 20:>4}",
                flush=True,
            )


def measure(harness: FloodHarness, name: str, seconds: float) -> str:
    """Run one flood; return the start of its result line."""
    durations: dict[str, list[float]] = {"kept": [], "fresh": []}
    samples = [(time.monotonic(), harness.cpu_seconds)]
    with harness.connected() as kept, harness.flooded(name):
        while len(samples) < 3:
            durations["kept"].append(timed(kept))
            with harness.connected() as fresh:
                durations["fresh"].append(timed(fresh))
            time.sleep(0.1)
            now = time.monotonic()
            if now > samples[0][0] + seconds / 2 * len(samples):
                samples.append((now, harness.cpu_seconds))
    (began, before), (middle, between), (end, after) = samples
    cores, later = (after - before) / (end - began), (after - between) / (end - middle)
    times = "   ".join(f"{statistics.median(one):>9.1f} {max(one):>9.1f}  " for one in durations.values())
    return f"{name:<36} {cores:6.2f} {later:6.2f}   {times}"


def timed(connection: HTTPConnection) -> float:
    """Return the duration of a model request in milliseconds."""
    began = time.perf_counter()
    try:
        send_model_request(connection)
    except (OSError, HTTPException):
        connection.close()
        return 60_000
    return (time.perf_counter() - began) * 1000


if __name__ == "__main__":
    main()
