"""bubblewrap's command line.

Everything but the command's own argv goes through a file in memory, so that no value of the environment is ever in
an argument list.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from sandbox.contracts.inside import UID
from sandbox.contracts.runtime import Command, SandboxSpec
from sandbox.runtimes import bwrap, launch, launcher
from sandbox.runtimes.image import Root, describe_root
from sandbox.runtimes.payload import Payload, refuse_nul
from sandbox.runtimes.places import PLACES


def staged_paths(spec: SandboxSpec) -> dict[str, Path]:
    """Names below the launcher's stage, and the host paths that are laid there."""
    paths: dict[str, Path] = {name: spec.disk / name for name in PLACES}
    paths.update({f"program-{index}": path for index, path in enumerate(describe_root(spec).parts)})
    return paths if spec.image is None else {**paths, "image": spec.image}


def build_payload(program: str, spec: SandboxSpec, command: Command, status: int) -> Payload:
    """Everything for one start. `status` is the descriptor of bubblewrap's reports, taken over.

    Raises AttemptError (provision_failed) for NUL characters.
    """
    payload = Payload()
    try:
        words = list(_arguments(payload, spec, command, payload.place(status)))
        refuse_nul([*words, *command.argv])
        text = "".join(f"{word}\0" for word in words).encode(errors="surrogateescape")
        number = payload.place(launch.write_memory("arguments", text))
    except BaseException:
        payload.close()
        raise
    payload.argv = [program, launch.mark_attempt(spec.attempt_id), "--args", number, "--", *command.argv]
    return payload


def _arguments(payload: Payload, spec: SandboxSpec, command: Command, status: str) -> Iterator[str]:
    yield from ("--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try")
    yield from ("--disable-userns", "--uid", str(UID), "--gid", str(UID), "--hostname", spec.attempt_id)
    yield from ("--new-session", "--die-with-parent", "--cap-drop", "ALL")
    yield from ("--json-status-fd", status)
    yield from bwrap.filter_arguments(payload)
    root = describe_root(spec)
    yield from _root(root)
    yield from _system(spec)
    yield from _writable_places()
    yield from _files(payload, root)
    for index, inside in enumerate(root.parts.values()):
        yield from ("--ro-bind", f"{launcher.STAGE}/program-{index}", inside)
    for place in ("/", *root.covered):
        yield from ("--remount-ro", place)
    yield from ("--chdir", command.directory, "--clearenv")
    for name, value in command.environment.items():
        yield from ("--setenv", name, value)


def _root(root: Root) -> Iterator[str]:
    if root.image is not None:
        yield from ("--ro-bind", f"{launcher.STAGE}/image", "/")
    for place in root.covered:
        yield from ("--perms", "0755", "--tmpfs", place)
    for directory in root.directories:
        yield from ("--perms", "0755", "--dir", directory)
    for link, target in root.links.items():
        yield from ("--symlink", target, link)
    for path in root.host_paths:
        yield from ("--ro-bind-try", path, path)


def _system(spec: SandboxSpec) -> Iterator[str]:
    # A uid of 0 could write /proc/sys even without capabilities; ours is never 0, so this is the second lock.
    yield from bwrap.PROC
    # pid 1 is bubblewrap, of the agent's uid: whoever can write its memory can forge the command's exit code.
    yield from ("--perms", "0555", "--tmpfs", "/proc/1", "--remount-ro", "/proc/1", *bwrap.READ_ONLY_PROC)
    yield from (*bwrap.DEVICES, "--size", str(spec.memory_bytes // 2), "--perms", "1777", "--tmpfs", "/dev/shm")  # noqa: S108


def _writable_places() -> Iterator[str]:
    for name, inside in PLACES.items():
        yield from ("--bind", f"{launcher.STAGE}/{name}", inside)


def _files(payload: Payload, root: Root) -> Iterator[str]:
    """An image is read-only, so a file is mounted over the one that it has there."""
    how = "--file" if root.image is None else "--ro-bind-data"
    for path, content in root.files.items():
        number = payload.place(launch.write_memory(PurePosixPath(path).name, content))
        yield from ("--perms", "0644", how, number, path)
