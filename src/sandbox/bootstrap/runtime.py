"""The runtimes there are, by name, and the one that a server works with."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from subprocess import SubprocessError

import msgspec

from sandbox.images.build import Component
from sandbox.interfaces.images import ProfileCatalog
from sandbox.interfaces.runtime import Runtime, RuntimeProbe
from sandbox.model.errors import SandboxError
from sandbox.model.tier import is_strong_enough
from sandbox.runtimes import node, rootfs

AUTO = "auto"


class UnknownRuntimeError(SandboxError):
    """No runtime has this name."""

    code = "unknown_runtime"


def make_runtime(name: str, run_dir: Path, *, auto: bool = False) -> Runtime:
    """The runtime of this name; auto: nobody asked for it by that. Raises UnknownRuntimeError."""
    maker = (_AUTO_MAKERS if auto else _MAKERS).get(name)
    if maker is None:
        names = ", ".join((AUTO, *_MAKERS))
        raise UnknownRuntimeError(f"There is no runtime {name!r}; choose one of {names}.")
    return maker(run_dir)


# A runner needs one of them only, and starts faster without the others.


def _make_bubblewrap(run_dir: Path) -> Runtime:
    from sandbox.runtimes.bubblewrap import BubblewrapRuntime

    return BubblewrapRuntime(run_dir)


def _make_gvisor(run_dir: Path) -> Runtime:
    from sandbox.runtimes.gvisor import GvisorRuntime

    return GvisorRuntime(run_dir)


def _make_qemu(run_dir: Path) -> Runtime:
    from sandbox.runtimes.qemu import QemuRuntime

    return QemuRuntime(run_dir)


def _make_qemu_unless_emulated(run_dir: Path) -> Runtime:
    from sandbox.runtimes.qemu import QemuRuntime

    return QemuRuntime(run_dir, only_kvm=True)


_MAKERS: Mapping[str, Callable[[Path], Runtime]] = {
    "bubblewrap": _make_bubblewrap,
    "gvisor": _make_gvisor,
    "qemu": _make_qemu,
}
_AUTO_MAKERS = {**_MAKERS, "qemu": _make_qemu_unless_emulated}
"""An emulated guest is never taken unasked, and to find out that it boots takes seconds."""


class RuntimeChoice(msgspec.Struct, frozen=True):
    """The runtime that was chosen, and what all that were looked at can do here, strongest first."""

    chosen: RuntimeProbe
    probes: Sequence[RuntimeProbe]

    @property
    def tier(self) -> str:
        """Of the chosen one; where none works, of the strongest that may work later."""
        return self.chosen.tier if self.chosen.is_available else self.probes[0].tier


async def choose_runtime(requested: str, run_dir: Path) -> RuntimeChoice:
    """`auto` is the strongest that works, but for those that must be asked for by name. Raises UnknownRuntimeError.

    A name is that runtime, working or not; then no other is looked at, because looking makes sandboxes.
    """
    runtimes = (
        [make_runtime(name, run_dir, auto=True) for name in _MAKERS]
        if requested == AUTO
        else [make_runtime(requested, run_dir)]
    )
    # Cancelling waits until all probes have cleaned up.
    async with asyncio.TaskGroup() as group:
        probes = [group.create_task(runtime.probe()) for runtime in runtimes]
    return select_strongest([probe.result() for probe in probes])


def select_strongest(probes: Sequence[RuntimeProbe]) -> RuntimeChoice:
    """Where none works it is the weakest, which asks the least of a machine."""
    by_strength = sorted(probes, key=lambda probe: probe.strength, reverse=True)
    candidates = [
        probe for probe in by_strength if probe.is_available and not (probe.is_explicit_only and len(probes) > 1)
    ]
    return RuntimeChoice((*candidates, by_strength[-1])[0], by_strength)


def describe_failure(choice: RuntimeChoice) -> str | None:
    """Why no sandbox can be made, and what to mend; None where one can be."""
    if choice.chosen.is_available:
        return None
    if len(choice.probes) == 1:
        return f"The runtime {choice.chosen.runtime} does not work here. {choice.chosen.remedy}"
    mends = " ".join(f"{probe.runtime}: {probe.remedy}" for probe in reversed(choice.probes) if not probe.is_available)
    return f"No runtime works, and nothing runs without one. {mends}"


def image_components() -> Mapping[str, Component]:
    """By the name that a declarative file calls each."""
    try:
        version = node.node_version()
    except (OSError, SubprocessError):
        version = None
    versions = {"node": version} if version else {}
    configuration = rootfs.etc_files("")[node.NPM_CONFIGURATION]
    return {
        "node": Component(
            paths=node.find_mounts(),
            links=node.LINKS,
            files={node.NPM_CONFIGURATION: configuration},
            versions={**versions, **node.pinned_packages()},
        )
    }


def make_offered_profiles(profiles: ProfileCatalog, find_tier: Callable[[], str]) -> Callable[[], Mapping[str, str]]:
    """Gives the names of all profiles with what is in the way of each, as manifests are held against them."""

    def tell() -> Mapping[str, str]:
        tier = find_tier()
        return {
            name: ""
            if is_strong_enough(tier, minimum)
            else f"takes a runtime of the tier {minimum} or a stronger one; this server's is of the tier {tier}"
            for name, minimum in profiles.list_profiles().items()
        }

    return tell
