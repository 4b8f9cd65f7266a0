"""Since when the machine is up. A module of its own, because runners load nothing that only the server needs."""

from pathlib import Path


def read_boot_id() -> str:
    """Changes at every boot (proc(5), random/boot_id)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
