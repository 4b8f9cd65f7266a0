"""Locates the components of a guest on this machine."""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from sandbox.model.failure import AttemptError, FailureCode

QEMU = "/usr/bin/qemu-system-x86_64"
_VIRTIOFSD = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/lib/virtiofsd", "/usr/bin/virtiofsd")
_KERNEL_MODULES = (
    "net/core/failover.ko",
    "drivers/net/net_failover.ko",
    "drivers/net/virtio_net.ko",
    "fs/overlayfs/overlay.ko",
)
"""Modules that the guest loads, in dependency order."""

INSTALL_HINT = (
    "install them: script/setup --with-qemu (or apt-get install qemu-system-x86 virtiofsd linux-image-cloud-amd64)"
)


class GuestComponents(msgspec.Struct, frozen=True):
    """Host paths of the components.

    vmlinux: the unpacked kernel, if there is one. python: directory of a Python installation that contains
    `interpreter`.
    """

    virtiofsd: str
    kernel: Path
    modules: Sequence[Path]
    python: Path
    interpreter: Path
    vmlinux: Path | None = None


def find_components() -> GuestComponents:
    """Locate all components. Raises AttemptError (provision_failed) with the names of the missing ones."""
    virtiofsd = next((path for path in _VIRTIOFSD if os.access(path, os.X_OK)), None)
    kernel = next((kernel_modules for root in _kernels() if (kernel_modules := _find_modules(*root)) is not None), None)
    missing = [
        name
        for name, is_present in (
            ("QEMU", os.access(QEMU, os.X_OK)),
            ("virtiofsd", virtiofsd),
            ("a guest's kernel", kernel),
        )
        if not is_present
    ]
    if kernel is None or virtiofsd is None or missing:
        raise AttemptError(FailureCode.PROVISION_FAILED, f"Not found: {', '.join(missing)}; {INSTALL_HINT}.")
    python = Path(sys.base_prefix)
    interpreter = python / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    unpacked = _bundled_kernel() / "vmlinux"
    has_unpacked = kernel[0].parent == unpacked.parent and unpacked.is_file()
    return GuestComponents(virtiofsd, *kernel, python, interpreter, unpacked if has_unpacked else None)


def _kernels() -> list[tuple[Path, Path]]:
    """Return the kernels with their module directories: the one from script/setup, then those from apt, newest first.

    Only Debian's cloud kernel is known to include the drivers that a guest needs before it can load modules.
    """
    own = _bundled_kernel()
    installed = sorted(Path("/boot").glob("vmlinuz-*-cloud-amd64"), key=_version, reverse=True)
    return [
        (own / "vmlinuz", own),
        *((path, Path("/usr/lib/modules", path.name.removeprefix("vmlinuz-"), "kernel")) for path in installed),
    ]


def _bundled_kernel() -> Path:
    return Path(sys.prefix, "share", "sandbox", "kernel")


def _version(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", path.name)]


def _find_modules(kernel: Path, directory: Path) -> tuple[Path, list[Path]] | None:
    modules = [
        path for name in _KERNEL_MODULES for suffix in ("", ".xz") if (path := directory / f"{name}{suffix}").is_file()
    ]
    return (kernel, modules) if kernel.is_file() and len(modules) == len(_KERNEL_MODULES) else None
