"""The QEMU `Runtime`, which uses KVM if KVM works.

The existence of the device does not prove that KVM works, so KVM is tested. A failure is stored.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from stat import S_IROTH
from typing import Protocol

from msgspec.structs import replace

from sandbox.interfaces.runtime import Listeners, Runtime, RuntimeProbe, SandboxHandle, SandboxSpec
from sandbox.model.errors import SandboxError
from sandbox.model.failure import AttemptError, FailureCode
from sandbox.model.fixed_limits import KILL_TIMEOUT_SECONDS
from sandbox.runtimes import seccomp_filter
from sandbox.runtimes.base_runtime import BaseRuntime
from sandbox.runtimes.bubblewrap_confinement import require_bwrap
from sandbox.runtimes.kernel_uid_pool import SANDBOX_UIDS
from sandbox.runtimes.launcher_client import LauncherProcess, start_launcher
from sandbox.runtimes.limits import cgroups
from sandbox.runtimes.limits.cgroups import ControlGroup
from sandbox.runtimes.probe import RuntimeProperties, is_machine_busy, run_probe
from sandbox.runtimes.qemu import command_lines
from sandbox.runtimes.qemu.command_lines import Accelerator
from sandbox.runtimes.qemu.guest_components import find_components
from sandbox.runtimes.qemu.sandbox import BootError, QemuSandbox

_FAILURE_FILE = "kvm-does-not-work"
_SELFTEST_PROGRAM = Path(__file__).with_name("kvm_selftest.py")
_SELFTEST_SECONDS = 20.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class KvmStatus:
    """Stores whether KVM failed, for all processes with this run directory, until a reboot or the next probe."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / _FAILURE_FILE

    def is_accessible(self) -> bool:
        """Return whether there is a usable device."""
        return os.access("/dev/kvm", os.R_OK | os.W_OK)

    def is_usable(self) -> bool:
        """Return whether there is a usable device and KVM has not failed since the machine booted."""
        if not self.is_accessible():
            return False
        try:
            return self._file.read_text() != _BOOT_ID.read_text()
        except OSError:
            return True

    async def fails_speed_selftest(self, *arguments: str) -> bool:
        """Return whether a guest that runs a counting loop is too slow twice in a row. Takes up to 40 s.

        arguments: see `kvm_selftest.py`. The guest runs twice, because a pause of the whole machine can look like CPU
        use. A self-test that times out without using its CPU time is not considered too slow.
        """
        return await _is_selftest_too_slow(arguments) and await _is_selftest_too_slow(arguments)

    def record_failure(self) -> None:
        """Record a failure of KVM: no guest boots, even with more time, or guests are too slow."""
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(_BOOT_ID.read_text())

    def reset(self) -> None:
        """Remove a stored failure."""
        self._file.unlink(missing_ok=True)


async def _is_selftest_too_slow(arguments: Sequence[str]) -> bool:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-ISE", str(_SELFTEST_PROGRAM), *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        env={},
    )
    try:
        return await asyncio.wait_for(process.wait(), _SELFTEST_SECONDS) == -signal.SIGPROF
    except TimeoutError:
        return False
    finally:
        if process.returncode is None:
            process.kill()
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), KILL_TIMEOUT_SECONDS)


NAME = "qemu"
TIER = "vm"
_MEMORY_BYTES = 128 * 1024 * 1024
_EMULATED_PROBE_SECONDS = 60.0
_KVM_PROBE_SECONDS = 10.0
_KVM_REQUIRED = (
    "KVM does not work, so every instruction would be emulated; select the runtime explicitly: --runtime qemu."
)

_PROPERTIES = RuntimeProperties(
    NAME,
    TIER,
    strength=30,
    isolation_notes=(
        "kernel: a separate one; the host's is reachable only through QEMU and virtiofsd",
        "files: only the host's /usr (read-only), the workspace, a home directory and /tmp",
        "network: only QEMU's, which connects only to the gateway",
        "QEMU and virtiofsd: in a namespace sandbox, with a system call filter and without privileges",
    ),
    gaps=(
        "a vulnerability in QEMU or virtiofsd gives access only to a namespace sandbox, but on the host's kernel",
        "a task needs 544 MiB more of the host's memory than it requests",
    ),
)
_EMULATION_GAP = (
    "no KVM: everything is emulated, five to twenty times slower, and the QEMU project does not consider emulation "
    "(TCG) a security boundary"
)


class ProbeableRuntime(Runtime, Protocol):
    """The runtime to probe, with its control groups and the accelerator of its last guest."""

    hierarchies: cgroups.Hierarchies
    last_accelerator: Accelerator | None


async def probe_qemu(
    runtime: ProbeableRuntime, run_dir: Path, kvm: KvmStatus, *, excludes_emulation: bool
) -> RuntimeProbe:
    """Create a sandbox, run `true` in it and destroy it."""
    if os.uname().machine != "x86_64":
        return _PROPERTIES.unavailable_probe(
            "The qemu runtime supports only x86_64; use another runtime.", is_permanent=True
        )
    if os.getuid() != 0:
        remedy = (
            "Only root can make the agent's program readable for a guest; "
            "use another runtime, or run the server as root."
        )
        return _PROPERTIES.unavailable_probe(remedy, is_permanent=True)
    try:
        find_components()
        kvm.reset()
        if kvm.is_accessible() and await kvm.fails_speed_selftest():
            kvm.record_failure()
        if excludes_emulation and not kvm.is_usable():
            return _PROPERTIES.unavailable_probe(_KVM_REQUIRED, is_explicit_only=True)
        seconds = _KVM_PROBE_SECONDS if excludes_emulation else _EMULATED_PROBE_SECONDS
        limits = await run_probe(
            runtime, run_dir, runtime.hierarchies, memory_bytes=_MEMORY_BYTES, timeout_seconds=seconds
        )
    except (SandboxError, OSError, TimeoutError) as error:
        has_not_booted = isinstance(error, TimeoutError) or isinstance(error.__cause__, BootError)
        if excludes_emulation and has_not_booted:
            return _PROPERTIES.unavailable_probe(_KVM_REQUIRED, is_explicit_only=True)
        return _PROPERTIES.unavailable_probe(str(error))
    has_kvm = runtime.last_accelerator is Accelerator.KVM
    more_gaps = () if has_kvm else (_EMULATION_GAP,)
    return _PROPERTIES.available_probe(limits, more_gaps=more_gaps, is_explicit_only=not has_kvm)


BOOTS_MAX = 3
BOOT_SECONDS = 30.0
KVM_BOOT_SECONDS = 3.0
KVM_RETRY_BOOT_SECONDS = 12.0
KVM_BUSY_BOOT_SECONDS = 48.0
"""A busy machine may need longer than KVM_BOOT_SECONDS. A boot shows that KVM does not work only if it times out after
KVM_RETRY_BOOT_SECONDS and the machine is not busy. Otherwise, busy tasks could disable KVM for all later tasks.
"""

_KVM_FALLBACK_MESSAGE = (
    "The machine has KVM, but no guest booted with it, so this one is emulated, five to twenty times slower. KVM "
    "is tried again when the server restarts."
)


class QemuDriver:
    """Starts the launcher that execs a guest's jail. The caller must add the attempt to `guest_specs` first."""

    name = NAME

    def __init__(self) -> None:
        self.guest_specs: dict[str, command_lines.GuestSpec] = {}

    def find_program(self) -> str:
        """Return bubblewrap's path."""
        return require_bwrap()

    def files_uid(self, kernel_uid: int) -> int:
        """Return the kernel uid itself."""
        return kernel_uid

    def host_threads_max(self, processes_max: int) -> int:
        """Return the jail's number of threads, which does not depend on the programs inside."""
        return command_lines.JAIL_THREADS

    def start_launcher(self, spec: SandboxSpec, kernel_uid: int | None) -> LauncherProcess:
        """Start the launcher, which exposes the disk, the image, the programs and the guest's kernel for bubblewrap."""
        guest_spec = self.guest_specs[spec.attempt_id]
        return start_launcher(
            spec.attempt_id,
            kernel_uid,
            command_lines.exposed_paths(guest_spec),
            entries=command_lines.exposed_program_entries(guest_spec),
            seccomp_filter=seccomp_filter.assemble_socket_and_extent_filter(os.uname().machine),
            transparent_ports=spec.transparent_ports,
        )

    def create_sandbox(
        self,
        handle: SandboxHandle,
        spec: SandboxSpec,
        group: ControlGroup,
        launcher: LauncherProcess,
        listeners: Listeners,
    ) -> QemuSandbox:
        """Create the sandbox object for a launcher that is ready. Its guest is not booted yet."""
        return QemuSandbox(handle, self.guest_specs[spec.attempt_id], self.find_program(), group, launcher, listeners)


class QemuRuntime(BaseRuntime):
    """Sandboxes with their own kernel. They are emulated if KVM does not work.

    run_dir: private directory with a short path, for the probe's files and the state of KVM.
    excludes_emulation: require KVM.
    last_accelerator: the accelerator that the last guest booted with.
    """

    name = NAME
    tier = TIER

    def __init__(self, run_dir: Path, uid_range: range = SANDBOX_UIDS, *, excludes_emulation: bool = False) -> None:
        driver = QemuDriver()
        super().__init__(driver, uid_range)
        self._guest_specs = driver.guest_specs
        self._run_dir = run_dir
        self._kvm = KvmStatus(run_dir)
        self._excludes_emulation = excludes_emulation
        self.last_accelerator: Accelerator | None = None

    async def probe(self) -> RuntimeProbe:
        """Boot a guest, run `true` in it and destroy it. If emulation is allowed, the time limit is longer."""
        return await probe_qemu(self, self._run_dir, self._kvm, excludes_emulation=self._excludes_emulation)

    async def create(self, handle: SandboxHandle, spec: SandboxSpec) -> QemuSandbox:
        """Boot a guest. Booting is retried, because an emulated guest can hang during boot for unknown reasons."""
        try:
            execute_only_programs = {path: inside for path, inside in spec.programs.items() if not _is_readable(path)}
        except OSError as error:
            raise AttemptError(FailureCode.PROVISION_FAILED, f"A program cannot be installed: {error}.") from error
        components = find_components()
        try:
            return await self._boot_with_fallback(
                handle, command_lines.GuestSpec(spec, components, execute_only_programs, Accelerator.KVM, self._run_dir)
            )
        except BootError as error:
            raise AttemptError(FailureCode.PROVISION_FAILED, f"The guest did not boot: {error}") from error
        finally:
            self._guest_specs.pop(handle.attempt_id, None)

    async def _boot_with_fallback(self, handle: SandboxHandle, guest_spec: command_lines.GuestSpec) -> QemuSandbox:
        """Boot with the first accelerator that works. Raises the last BootError."""
        for accelerator, timeout_seconds in self._boot_tries():
            is_fallback = accelerator is Accelerator.TCG and self._kvm.is_accessible()
            slow_reason = _KVM_FALLBACK_MESSAGE if is_fallback else None
            self._guest_specs[handle.attempt_id] = replace(guest_spec, accelerator=accelerator, slow_reason=slow_reason)
            try:
                sandbox = await self._boot(handle, guest_spec.spec, timeout_seconds)
            except BootError as error:
                problem = error
            else:
                self.last_accelerator = accelerator
                return sandbox
            if problem.has_timed_out and timeout_seconds == KVM_RETRY_BOOT_SECONDS and not is_machine_busy():
                self._kvm.record_failure()
        raise problem

    def _boot_tries(self) -> Iterator[tuple[Accelerator, float]]:
        """Yield accelerators and timeouts. Each emulated boot gets twice as much time as the previous one."""
        if self._excludes_emulation or self._kvm.is_usable():
            yield Accelerator.KVM, KVM_BOOT_SECONDS
            yield Accelerator.KVM, KVM_RETRY_BOOT_SECONDS
            if is_machine_busy():
                yield Accelerator.KVM, KVM_BUSY_BOOT_SECONDS
        if not self._excludes_emulation:
            yield from ((Accelerator.TCG, BOOT_SECONDS * 2**number) for number in range(BOOTS_MAX))

    async def _boot(self, handle: SandboxHandle, spec: SandboxSpec, timeout_seconds: float) -> QemuSandbox:
        sandbox = await super().create(
            handle, replace(spec, memory_bytes=spec.memory_bytes + command_lines.JAIL_OVERHEAD_BYTES)
        )
        assert isinstance(sandbox, QemuSandbox)
        try:
            await sandbox.boot(timeout_seconds)
        except BaseException:
            await self._discard(handle, spec.disk)
            raise
        return sandbox

    async def _discard(self, handle: SandboxHandle, disk: Path) -> None:
        """Destroy the sandbox but keep the attempt's kernel uid."""
        sandbox = self._sandboxes.pop(handle.attempt_id)
        await sandbox.close()
        await self._kill_all(handle)
        await self._restore_disk(handle, disk)
        self._subreaper.release(handle.attempt_id)


def _is_readable(path: Path) -> bool:
    return bool(path.stat().st_mode & S_IROTH)
