"""The components of a guest: the files of this machine that it needs, and the code of its agent."""

import marshal
import os
import re
import sys
from collections.abc import Sequence
from functools import cache
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

_GUEST_PACKAGE = Path(__file__).parent / "guest"
_GUEST_MODULES = ("frames", "guest_setup", "commands", "streams", "agent")
"""Modules of the guest agent. Each module comes after the modules that it imports."""

GUEST_AGENT_PATH = "/agent"
"""Path of the agent's code in the guest."""

_START_SCRIPT = f"""#!{{interpreter}} -ISE
import marshal, sys
with open({GUEST_AGENT_PATH!r}, "rb") as file:
    for name, code in marshal.load(file):
        module = sys.modules[name] = type(sys)(name)
        module.__package__, module.__path__ = "guest", []
        exec(code, module.__dict__)
sys.modules["guest.agent"].main()
"""


class GuestComponents(msgspec.Struct, frozen=True):
    """Host paths of the components. python: directory of a Python installation that contains `interpreter`."""

    virtiofsd: str
    kernel: Path
    modules: Sequence[Path]
    python: Path
    interpreter: Path


def find_components() -> GuestComponents:
    """Locate all components. Raises AttemptError (provision_failed), which names the missing components."""
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
    return GuestComponents(virtiofsd, *kernel, python, interpreter)


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


def build_start_script(interpreter: Path) -> bytes:
    """Return the script that starts the agent's code in the guest."""
    return _START_SCRIPT.format(interpreter=interpreter).encode()


@cache
def compile_guest_agent() -> bytes:
    """Compile the agent for the Python version that runs here, because the guest uses the same version."""
    code = [("guest", compile("", "guest", "exec")), *((f"guest.{name}", _compile(name)) for name in _GUEST_MODULES)]
    return marshal.dumps(code)


def _compile(name: str) -> object:
    source = (_GUEST_PACKAGE / f"{name}.py").read_bytes()
    return compile(source, f"guest/{name}.py", "exec", dont_inherit=True, optimize=2)
