"""Plays the battery on tiers and writes the outcomes into docs/security.md; `script/escape-battery` runs it."""

import asyncio
import os
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

from escape import table, verdicts
from escape.attack import Outcome
from escape.attack_runner import Battlefield
from sandbox.bootstrap.runtime import make_runtime
from sandbox.runtimes.bwrap import find_bwrap as find_bubblewrap
from sandbox.runtimes.gvisor.runtime import find_runsc
from sandbox.runtimes.qemu.parts import QEMU


def main(wanted):
    """Exit code: 0 when every row was asserted and nothing escaped."""
    unknown = set(wanted) - set(table.TIERS)
    if unknown:
        print(f"There is no tier {', '.join(sorted(unknown))}; there are {', '.join(table.TIERS)}.", file=sys.stderr)
        return 2
    # Each for itself: what comes later may take long.
    return max([play(tier, is_asked_for=bool(wanted)) for tier in wanted or table.TIERS])


def play(tier, *, is_asked_for):
    """One tier. What does not work here keeps its column, and is a failure only where it was asked for."""
    with tempfile.TemporaryDirectory(prefix="escape-") as directory:
        probe = asyncio.run(make_runtime(tier, Path(directory, "probe")).probe())
        if not probe.is_available:
            print(f"{tier} does not work here: {probe.remedy}")
            return int(is_asked_for)
        Path(directory, "field").mkdir()
        with Battlefield(Path(directory, "field"), tier) as field:
            found = verdicts.judge(field)
    suffix = " without KVM" if tier == "qemu" and probe.is_explicit_only else ""
    versions = f"{version(tier)}{suffix}, Linux {os.uname().release}"
    text = table.DOCUMENT.read_text()
    whole = table.read(text)
    try:
        whole.put(tier, found, datetime.now(UTC).date(), versions)
    except table.UnprovenError as error:
        print(f"{tier}: not written, since these rows have no asserted outcome:\n{error}", file=sys.stderr)
        return 1
    table.DOCUMENT.write_text(table.written(text, whole))
    return tell(tier, found)


def tell(tier, found):
    """Print the escapes, and a count of each outcome."""
    verdicts = [(kind, name, *verdict) for kind, rows in found.items() for name, verdict in rows.items()]
    escapes = [(kind, name, why) for kind, name, outcome, why in verdicts if outcome is Outcome.ESCAPED]
    for kind, name, why in escapes:
        print(f"{tier} ✗ {kind}: {name}: {why}")
    counts = Counter(outcome for _, _, outcome, _ in verdicts)
    print(f"{tier}: {', '.join(f'{count} {outcome}' for outcome, count in counts.items())}")
    return int(bool(escapes))


def version(tier):
    """The name and version of what makes the tier's sandboxes."""
    program = {"bubblewrap": find_bubblewrap(), "gvisor": find_runsc(), "qemu": QEMU}[tier]
    ran = subprocess.run([program, "--version"], check=True, capture_output=True, text=True, timeout=20)
    first = ran.stdout.splitlines()[0].partition(" (")[0]
    return first.replace(" version", "").replace("QEMU emulator", "QEMU")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
