"""The command `sandbox` with bubblewrap probes that fail or hang as defined by the environment variable FAILING_PROBES.

Example: "2 hangs" means that two probes fail, and the third creates a sandbox that does not end. Each probe adds a line
to the file FAILING_PROBES_LOG; the id of the hanging sandbox is in the file `made` in the same directory.
FAILING_PROBES_PAUSE is the first pause between probes, in seconds.
"""

import asyncio
import os
from pathlib import Path

from sandbox.bootstrap import runtime_selection
from sandbox.cli import main as cli_main
from sandbox.interfaces.runtime import SANDBOX_WORKSPACE, Command, RuntimeProbe, SandboxSpec
from sandbox.runtimes import probe as runtimes_probe
from sandbox.runtimes.bubblewrap import BubblewrapRuntime
from sandbox.server import placements

FAILURE_REASON = "the machine was busy"


class RuntimeWithFailingProbes(BubblewrapRuntime):
    async def probe(self):
        log = Path(os.environ["FAILING_PROBES_LOG"])
        with log.open("a") as lines:
            lines.write("probe\n")
        count = len(log.read_text().splitlines())
        failing, _, outcome = os.environ["FAILING_PROBES"].partition(" ")
        if failing == "always" or count <= int(failing):
            return RuntimeProbe("bubblewrap", is_available=False, tier="namespaces", strength=10, remedy=FAILURE_REASON)
        if outcome == "hangs":
            runtimes_probe._run_true = self._hang
        return await super().probe()

    async def _hang(self, _, handle, disk, *__):
        spec = SandboxSpec(handle.attempt_id, disk, 1, 2**26, processes_max=16)
        sandbox = await self.create(handle, spec)
        await sandbox.start(Command(["/usr/bin/sleep", "60"], {}, SANDBOX_WORKSPACE))
        Path(os.environ["FAILING_PROBES_LOG"]).with_name("made").write_text(handle.attempt_id)
        await asyncio.sleep(60)


def main():
    runtime_selection._MAKERS["bubblewrap"] = lambda run_dir, _: RuntimeWithFailingProbes(run_dir)
    if "FAILING_PROBES_PAUSE" in os.environ:
        placements.PROBE_PAUSE_SECONDS = float(os.environ["FAILING_PROBES_PAUSE"])
    cli_main.main()
