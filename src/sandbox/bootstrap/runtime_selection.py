"""The available runtimes, and the selection of the runtime that a server uses."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path

import msgspec

from sandbox.interfaces.runtime import Runtime, RuntimeProbe
from sandbox.model.errors import SandboxError

AUTO = "auto"


class UnknownRuntimeError(SandboxError):
    """No runtime has this name."""

    code = "unknown_runtime"


def make_runtime(name: str, run_dir: Path, *, excludes_emulation: bool = False) -> Runtime:
    """Create the runtime with this name. Raises UnknownRuntimeError.

    excludes_emulation: set for the automatic choice, which never selects emulation. Booting an emulated guest just to
    probe it would take seconds.
    """
    maker = _MAKERS.get(name)
    if maker is None:
        names = ", ".join((AUTO, *_MAKERS))
        raise UnknownRuntimeError(f"There is no runtime {name!r}; choose one of {names}.")
    return maker(run_dir, excludes_emulation)


# Imports are local: a runner needs only one runtime and starts faster without the others.


def _make_bubblewrap(run_dir: Path, _excludes_emulation: bool) -> Runtime:
    from sandbox.runtimes.bubblewrap import BubblewrapRuntime

    return BubblewrapRuntime(run_dir)


def _make_gvisor(run_dir: Path, _excludes_emulation: bool) -> Runtime:
    from sandbox.runtimes.gvisor import GvisorRuntime

    return GvisorRuntime(run_dir)


def _make_qemu(run_dir: Path, excludes_emulation: bool) -> Runtime:
    from sandbox.runtimes.qemu import QemuRuntime

    return QemuRuntime(run_dir, excludes_emulation=excludes_emulation)


_MAKERS: Mapping[str, Callable[[Path, bool], Runtime]] = {
    "bubblewrap": _make_bubblewrap,
    "gvisor": _make_gvisor,
    "qemu": _make_qemu,
}


def import_runtime(name: str) -> None:
    """Import the modules of the runtime with this name, if there is one."""
    if name in _MAKERS:
        import_module(f"sandbox.runtimes.{name}")


class RuntimeChoice(msgspec.Struct, frozen=True):
    """The chosen runtime, and the probes of all runtimes that were examined, strongest first."""

    chosen: RuntimeProbe
    probes: Sequence[RuntimeProbe]

    @property
    def tier(self) -> str:
        """The tier of the chosen runtime. If no runtime works, the tier of the strongest one, which may work later."""
        return self.chosen.tier if self.chosen.is_available else self.probes[0].tier


async def choose_runtime(requested: str, run_dir: Path) -> RuntimeChoice:
    """Probe and choose a runtime. `auto` selects the strongest runtime that works and is not explicit-only.

    Any other name selects the runtime with that name, even if it does not work. No other runtime is then probed,
    because a probe creates sandboxes. Raises UnknownRuntimeError.
    """
    runtimes = (
        [make_runtime(name, run_dir, excludes_emulation=True) for name in _MAKERS]
        if requested == AUTO
        else [make_runtime(requested, run_dir)]
    )
    # Cancellation waits until all probes have cleaned up.
    async with asyncio.TaskGroup() as group:
        probes = [group.create_task(runtime.probe()) for runtime in runtimes]
    return select_runtime([probe.result() for probe in probes])


def select_runtime(probes: Sequence[RuntimeProbe]) -> RuntimeChoice:
    """Choose the strongest runtime that works; if none works, choose the weakest, which has the fewest requirements.

    Explicit-only runtimes are ignored unless all are explicit-only.
    """
    by_strength = sorted(probes, key=lambda probe: probe.strength, reverse=True)
    candidates = [probe for probe in by_strength if not probe.is_explicit_only] or by_strength
    working = [probe for probe in candidates if probe.is_available]
    return RuntimeChoice((*working, candidates[-1])[0], by_strength)


def describe_failure(choice: RuntimeChoice) -> str | None:
    """Return why no sandbox can be created and what to do about it; None if sandboxes can be created."""
    if choice.chosen.is_available:
        return None
    if len(choice.probes) == 1:
        return f"The runtime {choice.chosen.runtime} does not work here. {choice.chosen.remedy}"
    remedies = " ".join(
        f"{probe.runtime}: {probe.remedy}" for probe in reversed(choice.probes) if not probe.is_available
    )
    return f"No runtime works, so no task can run. {remedies}"
