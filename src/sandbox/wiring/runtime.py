"""The runtimes there are, by name."""

from pathlib import Path

from sandbox.contracts.runtime import Runtime
from sandbox.model.errors import SandboxError
from sandbox.runtimes.bubblewrap import BubblewrapRuntime
from sandbox.runtimes.gvisor import GvisorRuntime


class UnknownRuntimeError(SandboxError):
    """No runtime has this name."""

    code = "unknown_runtime"


def make_runtime(name: str, run_dir: Path) -> Runtime:
    """The runtime of this name. Raises UnknownRuntimeError."""
    if name == "bubblewrap":
        return BubblewrapRuntime(run_dir)
    if name == "gvisor":
        return GvisorRuntime(run_dir)
    raise UnknownRuntimeError(f"There is no runtime {name!r}; choose auto or bubblewrap.")


def choose_runtime_name(wish: str) -> str:
    """`auto` is the strongest that there is."""
    return "bubblewrap" if wish == "auto" else wish
