"""The runtimes there are, by name."""

from pathlib import Path

from sandbox.contracts.runtime import Runtime
from sandbox.runtimes.bubblewrap import BubblewrapRuntime


def make_runtime(name: str, run_dir: Path) -> Runtime:
    """The runtime of this name. Raises ValueError for an unknown one."""
    if name == "bubblewrap":
        return BubblewrapRuntime(run_dir)
    raise ValueError(f"There is no runtime {name!r}; choose auto or bubblewrap.")
