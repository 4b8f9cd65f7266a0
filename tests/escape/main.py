"""Runs the attacks with each runtime and writes the outcomes to docs/security.md; run by `script/escape-battery`."""

import asyncio
import os
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

from escape import results_table, run_verdicts
from escape.attack import Outcome
from escape.attack_run import AttackRun
from sandbox.bootstrap.runtime_selection import make_runtime
from sandbox.runtimes.bubblewrap_confinement import find_bwrap as find_bubblewrap
from sandbox.runtimes.gvisor.runtime import find_runsc
from sandbox.runtimes.qemu.guest_components import QEMU


def main(requested):
    """Return exit code 0 if every row has a proven outcome and no attack escaped."""
    unknown = set(requested) - set(results_table.RUNTIMES)
    if unknown:
        print(
            f"Unknown runtime {', '.join(sorted(unknown))}; the runtimes are {', '.join(results_table.RUNTIMES)}.",
            file=sys.stderr,
        )
        return 2
    # Each result is written immediately, since the following runs may take a long time.
    return max(
        [
            run_attacks_and_update_table(runtime, is_requested=bool(requested))
            for runtime in requested or results_table.RUNTIMES
        ]
    )


def run_attacks_and_update_table(runtime, *, is_requested):
    """Run the attacks with one runtime.

    If the runtime is unavailable, keep its column. Fail only if the runtime was requested.
    """
    with tempfile.TemporaryDirectory(prefix="escape-") as directory:
        probe = asyncio.run(make_runtime(runtime, Path(directory, "probe")).probe())
        if not probe.is_available:
            print(f"{runtime} does not work here: {probe.remedy}")
            return int(is_requested)
        Path(directory, "run").mkdir()
        with AttackRun(Path(directory, "run"), runtime) as attack_run:
            outcomes = run_verdicts.judge(attack_run)
    suffix = " without KVM" if runtime == "qemu" and probe.is_explicit_only else ""
    versions = f"{version(runtime)}{suffix}, Linux {os.uname().release}"
    text = results_table.DOCUMENT.read_text()
    updated = results_table.parse(text)
    try:
        updated.put(runtime, outcomes, datetime.now(UTC).date(), versions)
    except results_table.UnprovenError as error:
        print(f"{runtime}: not written: rows without a proven outcome:\n{error}", file=sys.stderr)
        return 1
    results_table.DOCUMENT.write_text(results_table.replace_table(text, updated))
    return print_summary(runtime, outcomes)


def print_summary(runtime, outcomes):
    """Print the escapes, and the number of attacks with each outcome."""
    verdicts = [(kind, name, *verdict) for kind, rows in outcomes.items() for name, verdict in rows.items()]
    escapes = [(kind, name, why) for kind, name, outcome, why in verdicts if outcome is Outcome.ESCAPED]
    for kind, name, why in escapes:
        print(f"{runtime} ✗ {kind}: {name}: {why}")
    counts = Counter(outcome for _, _, outcome, _ in verdicts)
    print(f"{runtime}: {', '.join(f'{count} {outcome}' for outcome, count in counts.items())}")
    return int(bool(escapes))


def version(runtime):
    """Return the name and version of the runtime's program."""
    program = {"bubblewrap": find_bubblewrap(), "gvisor": find_runsc(), "qemu": QEMU}[runtime]
    result = subprocess.run([program, "--version"], check=True, capture_output=True, text=True, timeout=20)
    first = result.stdout.splitlines()[0].partition(" (")[0]
    return first.replace(" version", "").replace("QEMU emulator", "QEMU")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
