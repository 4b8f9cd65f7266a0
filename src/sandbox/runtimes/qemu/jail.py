"""The command line of a guest's cage: bubblewrap around QEMU and virtiofsd.

What breaks out of the guest stands in a sandbox like those of the bubblewrap runtime: without privileges, without a
network but the gateway's, with the files that the guest has anyway. The guest sees SHARE, which has the tools that its
agent runs with, and in INSIDE what the command sees.
"""

import marshal
import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path, PurePosixPath

import msgspec

from sandbox.interfaces.layout import MODEL_PORT, PROXY_PORT, UID
from sandbox.interfaces.runtime import SandboxSpec
from sandbox.runtimes import bwrap, launcher_client, rootfs
from sandbox.runtimes.disk_layout import PLACES
from sandbox.runtimes.launcher_client import Payload, refuse_nul
from sandbox.runtimes.limits import seccomp
from sandbox.runtimes.programs import launcher, process_limits
from sandbox.runtimes.qemu import machine
from sandbox.runtimes.qemu.parts import Parts

_DIRECTORY = Path(__file__).parent / "guest"
_MODULES = ("frames", "redirection", "machine", "confinement", "streams", "agent")
"""Each after those that it imports."""

CODE = "/agent"
"""In the guest."""

_START = f"""#!{{interpreter}} -ISE
import marshal, sys
with open({CODE!r}, "rb") as file:
    for name, code in marshal.load(file):
        module = sys.modules[name] = type(sys)(name)
        module.__package__, module.__path__ = "guest", []
        exec(code, module.__dict__)
sys.modules["guest.agent"].main()
"""


def describe_start(interpreter: Path) -> bytes:
    """The script to start, which runs the code."""
    return _START.format(interpreter=interpreter).encode()


@cache
def compile_agent() -> bytes:
    """For the Python that runs here, which is the guest's too."""
    code = [("guest", compile("", "guest", "exec")), *((f"guest.{name}", _compile(name)) for name in _MODULES)]
    return marshal.dumps(code)


def _compile(name: str) -> object:
    source = (_DIRECTORY / f"{name}.py").read_bytes()
    return compile(source, f"guest/{name}.py", "exec", dont_inherit=True, optimize=2)


SHARE = "/share"
_INSIDE = f"{SHARE}/inside"
_PAIR = """
import os, sys
listener, files, channel, accelerator, count = map(int, sys.argv[1:6])
qemu, virtiofsd = sys.argv[6:6 + count], sys.argv[6 + count:]
if os.fork() == 0:
    os.close(listener)
    os.execv(qemu[0], qemu)
for one in (files, channel, accelerator):
    os.close(one)
os.execv(virtiofsd[0], virtiofsd)
"""
"""Two programs, each with its own ends only: virtiofsd ends when QEMU does, and the cage ends with virtiofsd."""

_TOOL_DIRECTORIES = ("/dev", "/modules", "/proc", "/programs", "/run", "/sys", "/tmp")  # noqa: S108


class Plan(msgspec.Struct, frozen=True):
    """One guest. hidden: those of its programs that may be executed and not read. run_dir: a private directory."""

    spec: SandboxSpec
    parts: Parts
    hidden: Mapping[Path, str]
    accelerator: machine.Accelerator
    run_dir: Path


def staged_paths(plan: Plan) -> dict[str, Path]:
    """Names below the launcher's stage, and the host paths that are laid there."""
    paths: dict[str, Path] = {name: plan.spec.disk / name for name in PLACES}
    parts = rootfs.describe_root(plan.spec).parts
    paths.update({f"part-{index}": path for index, path in enumerate(parts) if path not in plan.hidden})
    paths.update({f"module-{index}": path for index, path in enumerate(plan.parts.modules)})
    if plan.spec.image is not None:
        paths["image"] = plan.spec.image
    return {**paths, "kernel": _choose_kernel(plan), "python": plan.parts.python}


def _choose_kernel(plan: Plan) -> Path:
    """An emulated processor takes seconds to unpack one; KVM's does it at once, and lays it where nobody knows."""
    is_emulated = plan.accelerator is machine.Accelerator.TCG
    return plan.parts.unpacked if is_emulated and plan.parts.unpacked is not None else plan.parts.kernel


def staged_programs(plan: Plan) -> list[tuple[str, str, str]]:
    """The hidden ones, laid so that virtiofsd can read them."""
    return [("program", f"hidden-{index}", str(path)) for index, path in enumerate(plan.hidden)]


def build_payload(program: str, plan: Plan, ends: machine.Ends, status: int) -> Payload:
    """For one boot. `ends` and `status`, the descriptor of bubblewrap's reports, are taken over."""
    payload = Payload()
    try:
        numbers = machine.Ends(*(int(payload.place(one)) for one in ends))
        words = list(_arguments(payload, plan, payload.place(status)))
        refuse_nul(words)
        text = "".join(f"{word}\0" for word in words).encode(errors="surrogateescape")
        number = payload.place(launcher_client.write_memory("arguments", text))
    except BaseException:
        payload.close()
        raise
    qemu = machine.qemu_words(plan.spec, plan.accelerator, numbers)
    virtiofsd = machine.virtiofsd_words(plan.parts.virtiofsd, SHARE, numbers)
    pair = (str(plan.parts.interpreter), "-ISE", "-c", _PAIR, *map(str, (*numbers, len(qemu))), *qemu, *virtiofsd)
    payload.argv = [program, launcher_client.mark_attempt(plan.spec.attempt_id), "--args", number, "--", *pair]
    return payload


def _arguments(payload: Payload, plan: Plan, status: str) -> Iterator[str]:
    filter_ = seccomp.assemble_filter(os.uname().machine)
    yield from ("--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try")
    yield from ("--disable-userns", "--uid", str(UID), "--gid", str(UID), "--hostname", plan.spec.attempt_id)
    yield from ("--new-session", "--die-with-parent", "--cap-drop", "ALL")
    yield from ("--json-status-fd", status)
    yield from bwrap.filter_arguments(payload)
    yield from _host_programs(plan, "")
    yield from (*bwrap.PROC, *bwrap.READ_ONLY_PROC, *bwrap.DEVICES)
    yield from ("--ro-bind", f"{launcher.STAGE}/kernel", machine.KERNEL)
    yield from _tools(payload, plan, filter_)
    yield from _inside(payload, plan)
    yield from ("--remount-ro", "/", "--chdir", "/", "--clearenv")


def _host_programs(plan: Plan, root: str) -> Iterator[str]:
    yield from _usr(root)
    if not plan.parts.python.is_relative_to("/usr"):
        yield from ("--ro-bind", f"{launcher.STAGE}/python", f"{root}{plan.parts.python}")


def _usr(root: str) -> Iterator[str]:
    yield from ("--ro-bind", "/usr", f"{root}/usr")
    for link, target in rootfs.HOST_LINKS.items():
        yield from ("--symlink", target, f"{root}{link}")
    for path in rootfs.HOST_PATHS:
        yield from ("--ro-bind-try", path, f"{root}{path}")


def _tools(payload: Payload, plan: Plan, filter_: bytes) -> Iterator[str]:
    yield from ("--dir", SHARE)
    yield from _host_programs(plan, SHARE)
    for directory in _TOOL_DIRECTORIES:
        yield from ("--perms", "0755", "--dir", f"{SHARE}{directory}")
    for index, path in enumerate(plan.parts.modules):
        suffix = "".join(path.suffixes[-2:] if path.suffix == ".xz" else path.suffixes[-1:])
        yield from ("--ro-bind", f"{launcher.STAGE}/module-{index}", f"{SHARE}/modules/{index}{suffix}")
    for index in range(len(plan.hidden)):
        yield from ("--ro-bind", f"{launcher.STAGE}/hidden-{index}", f"{SHARE}/programs/{index}")
    files = {
        "/start": describe_start(plan.parts.interpreter),
        CODE: compile_agent(),
        "/filter": filter_,
        "/settings": _settings(plan),
    }
    for place, content in files.items():
        number = payload.place(launcher_client.write_memory(place.strip("/"), content))
        yield from ("--perms", "0755", "--file", number, f"{SHARE}{place}")


def _settings(plan: Plan) -> bytes:
    spec = plan.spec
    numbers = (spec.memory_bytes, spec.processes_max, spec.memory_bytes // 2)
    ports = f"{MODEL_PORT},{PROXY_PORT}"
    files = (machine.files_kept(), process_limits.OPEN_FILES_SOFT_MAX, process_limits.OPEN_FILES_MAX)
    words = (spec.attempt_id, *map(str, numbers), ports, *map(str, files), *plan.hidden.values())
    return "\0".join(words).encode(errors="surrogateescape")


def _inside(payload: Payload, plan: Plan) -> Iterator[str]:
    root = rootfs.describe_root(plan.spec)
    if root.image is not None:
        yield from ("--ro-bind", f"{launcher.STAGE}/image", _INSIDE)
    for place in root.covered:
        yield from ("--perms", "0755", "--tmpfs", f"{_INSIDE}{place}")
    for directory in (*root.directories, *(() if root.image else ("", "/dev", "/proc"))):
        yield from ("--perms", "0755", "--dir", f"{_INSIDE}{directory}")
    for link, target in root.links.items():
        yield from ("--symlink", target, f"{_INSIDE}{link}")
    for path in root.host_paths:
        yield from ("--ro-bind-try", path, f"{_INSIDE}{path}")
    for name, inside in PLACES.items():
        yield from ("--bind", f"{launcher.STAGE}/{name}", f"{_INSIDE}{inside}")
    yield from _files(payload, plan, root)
    for place in root.covered:
        yield from ("--remount-ro", f"{_INSIDE}{place}")


def _files(payload: Payload, plan: Plan, root: rootfs.Root) -> Iterator[str]:
    option = "--file" if root.image is None else "--ro-bind-data"
    for path, content in root.files.items():
        number = payload.place(launcher_client.write_memory(PurePosixPath(path).name, content))
        yield from ("--perms", "0644", option, number, f"{_INSIDE}{path}")
    for index, (part, inside) in enumerate(root.parts.items()):
        if part in plan.hidden:
            # Only a place: the guest lays the program there, so that it cannot be read.
            yield from (
                "--perms",
                "0755",
                "--file",
                payload.place(launcher_client.write_memory("place", b"")),
                _INSIDE + inside,
            )
        else:
            yield from ("--ro-bind", f"{launcher.STAGE}/part-{index}", f"{_INSIDE}{inside}")
