"""The resources that tasks request and hosts have."""

import msgspec

from sandbox.model.formatting import format_gib
from sandbox.model.manifest.schema import Vm


class Resources(msgspec.Struct, frozen=True):
    """CPUs, memory and disk, in total or for one task."""

    cpus: int
    memory_bytes: int
    disk_bytes: int

    def __str__(self) -> str:
        return f"{self.cpus} CPUs, {format_gib(self.memory_bytes)} of memory and {format_gib(self.disk_bytes)} of disk"

    @classmethod
    def requested_by(cls, vm: Vm) -> "Resources":
        """Return the resources that a manifest requests."""
        return cls(vm.cpus, vm.memory_bytes, vm.disk_bytes)

    def fits_in(self, available: "Resources") -> bool:
        """Return whether all resources are available."""
        return (
            self.cpus <= available.cpus
            and self.memory_bytes <= available.memory_bytes
            and self.disk_bytes <= available.disk_bytes
        )

    def describe_shortfall(self, available: "Resources", qualifier: str = "free") -> list[str]:
        """Return which resources are missing, as text for people; empty if all are available."""
        shortfall = []
        if self.cpus > available.cpus:
            shortfall.append(f"{self.cpus} CPUs ({max(available.cpus, 0)} {qualifier})")
        for name, required, available_bytes in (
            ("memory", self.memory_bytes, available.memory_bytes),
            ("disk", self.disk_bytes, available.disk_bytes),
        ):
            if required > available_bytes:
                shortfall.append(
                    f"{format_gib(required)} of {name} ({format_gib(max(available_bytes, 0))} {qualifier})"
                )
        return shortfall
