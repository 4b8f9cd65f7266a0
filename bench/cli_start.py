"""Measures the CPU time of `sandbox --help` and of a bare interpreter. Run: python bench/cli_start.py [RUNS]"""

import os
import statistics
import subprocess
import sys

COMMANDS = {
    "python -c pass": (sys.executable, "-c", "pass"),
    "sandbox --help": (sys.executable, "-c", "from sandbox.cli.main import main; main()", "--help"),
    "sandbox task --help": (sys.executable, "-c", "from sandbox.cli.main import main; main()", "task", "--help"),
    "sandbox task list --help": (
        sys.executable, "-c", "from sandbox.cli.main import main; main()", "task", "list", "--help",
    ),
}  # fmt: skip


def cpu_ms(command: tuple[str, ...]) -> float:
    """Return the user and system time of one run, in milliseconds."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command} ended with {process.returncode}")
    return (usage.ru_utime + usage.ru_stime) * 1000


def main() -> None:
    """Print the median and the maximum for each command."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    for name, command in COMMANDS.items():
        times = sorted(cpu_ms(command) for _ in range(runs))
        print(f"{name:<26} median {statistics.median(times):6.1f} ms CPU   worst {times[-1]:6.1f} ms   ({runs} runs)")


if __name__ == "__main__":
    main()
