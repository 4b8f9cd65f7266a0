"""Programs of the host's that are confined: the launcher stays, and starts bubblewrap for each of them.

They have the kernel uid and the control group of a sandbox but are in none: each is in namespaces of its own, with
the host's /usr, a few directories of the attempt, and the network namespace of the launcher, in which nothing is but
one door.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from socket import socket

from sandbox.interfaces.images import IMAGE_FILES
from sandbox.interfaces.layout import UID
from sandbox.interfaces.runtime import CERTIFICATES, ConfinedCommand, ConfinementSpec
from sandbox.runtimes import bwrap, launcher_client, rootfs
from sandbox.runtimes.launcher_client import Launch, Payload, mark_attempt, refuse_nul
from sandbox.runtimes.limits.cgroups import ControlGroup
from sandbox.runtimes.programs import launcher

_ROOT = PurePosixPath("/attempt")
"""Where the directories are inside, by their names, so that no path of the host's is told."""

_HOST_PATHS = dict.fromkeys((*rootfs.HOST_PATHS, *CERTIFICATES, "/etc/crypto-policies"))
_MEMORY_FILES_BYTES = 64 * 1024 * 1024


class ConfinedPrograms:
    """Implements `contracts.confinement.Confinement`. program: bubblewrap's path."""

    def __init__(
        self,
        attempt_id: str,
        program: str,
        started: Launch,
        door: socket,
        spec: ConfinementSpec,
        group: ControlGroup,
    ) -> None:
        self.door: socket | None = door
        self.memory_bytes = spec.memory_bytes if "memory" in group.limits() else None
        self._group = group
        self._memory_kills_before = group.memory_kills()
        self._attempt_id = attempt_id
        self._program = program
        self._launch = started
        self._spec = spec

    def has_killed_for_memory(self) -> bool:
        """The group may have been a sandbox's before, whose programs do not count."""
        return self._group.memory_kills() > self._memory_kills_before

    async def run(self, command: ConfinedCommand) -> int:
        """Its exit code, 128+n after signal n. Raises OSError, AttemptError (provision_failed) for NUL characters."""
        payload = self._build_payload(command)
        try:
            low = (command.stdin, command.stdout, command.stderr, *command.descriptors)
            code = await self._launch.run(payload.argv, low, payload.descriptors)
        finally:
            payload.close()
        return code if code >= 0 else 128 - code

    def _build_payload(self, command: ConfinedCommand) -> Payload:
        payload = Payload()
        try:
            words = list(self._arguments(payload, command))
            refuse_nul([*words, *command.argv])
            text = "".join(f"{word}\0" for word in words).encode(errors="surrogateescape")
            number = payload.place(launcher_client.write_memory("arguments", text))
        except BaseException:
            payload.close()
            raise
        payload.argv = [self._program, mark_attempt(self._attempt_id), "--args", number, "--", *command.argv]
        return payload

    def _arguments(self, payload: Payload, command: ConfinedCommand) -> Iterator[str]:
        yield from ("--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try")
        yield from ("--disable-userns", "--uid", str(UID), "--gid", str(UID), "--hostname", self._attempt_id)
        yield from ("--new-session", "--die-with-parent", "--cap-drop", "ALL")
        yield from bwrap.filter_arguments(payload)
        yield from self._root()
        etc = rootfs.etc_files(self._attempt_id)
        files = {**{path: etc[path] for path in IMAGE_FILES}, **command.files}
        for path, content in files.items():
            yield from ("--perms", "0444", "--file", payload.place(launcher_client.write_memory("file", content)), path)
        yield from ("--remount-ro", "/", "--chdir", self._inside(command.directory), "--clearenv")
        for name, value in command.environment.items():
            yield from ("--setenv", name, value)

    def _root(self) -> Iterator[str]:
        for directory in rootfs.DIRECTORIES:
            yield from ("--perms", "0755", "--dir", directory)
        yield from ("--ro-bind", "/usr", "/usr")
        for link, target in rootfs.LINKS.items():
            yield from ("--symlink", target, link)
        for path in _HOST_PATHS:
            yield from ("--ro-bind-try", path, path)
        yield from (*bwrap.PROC, *bwrap.READ_ONLY_PROC, *bwrap.DEVICES)
        yield from ("--size", str(_MEMORY_FILES_BYTES), "--perms", "1777", "--tmpfs", "/tmp")  # noqa: S108
        for number, place in enumerate(_places(self._spec)):
            how = "--ro-bind" if place in self._spec.read_only else "--bind"
            yield from (how, f"{launcher.STAGE}/{_name(number)}", str(_ROOT / place.name))

    def _inside(self, directory: Path) -> str:
        for one in _places(self._spec):
            if directory.is_relative_to(one):
                return str(_ROOT / one.name / directory.relative_to(one))
        raise ValueError(f"{directory} is not in sight of the confinement")


def staged_paths(spec: ConfinementSpec) -> dict[str, Path]:
    """Names below the launcher's stage, and the host paths that are laid there."""
    return {_name(number): path for number, path in enumerate(_places(spec))}


def _places(spec: ConfinementSpec) -> Sequence[Path]:
    return (*spec.directories, *spec.read_only)


def _name(number: int) -> str:
    return f"place-{number}"
