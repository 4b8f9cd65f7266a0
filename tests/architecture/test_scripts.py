"""What stands in script/ explains itself, and setting up again is cheap, whoever's python3 is first on PATH."""

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.name for path in (ROOT / "script").iterdir())
FAKE_UV = """#!/bin/sh
[ "$1" != --version ] || exit 0
echo "uv $* UV_SYSTEM_CERTS=${UV_SYSTEM_CERTS-} UV_NATIVE_TLS=${UV_NATIVE_TLS-}" >>"$CALLS"
[ "$1" != venv ] || "$BASE_PYTHON" -m venv --without-pip .venv
"""
FOUND_ALREADY = ("bwrap", "chromium", "curl", "ip", "mkfs.ext4", "runsc", "strace", "zstd")


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_tells_what_a_script_does_and_does_nothing(name: str, tmp_path: Path):
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    command = [str(ROOT / "script" / name), "--help"]
    asked = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert (asked.returncode, asked.stderr) == (0, "")
    assert len(asked.stdout) > 60
    assert list(tmp_path.iterdir()) == []


class Checkout:
    """A checkout that is set up by the real script, where all that it would install is there already."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "checkout"
        self.calls = directory / "calls"
        shutil.copytree(ROOT / "script", self.root / "script")
        shutil.copytree(ROOT / "requirements", self.root / "requirements")
        shutil.copy(ROOT / "pyproject.toml", self.root)
        self.programs = directory / "programs"
        self.programs.mkdir()
        for name in FOUND_ALREADY:
            self._write(name, "#!/bin/sh\n")
        for name in ("apt-cache", "apt-get"):
            self._write(name, "#!/bin/sh\nexit 100\n")
        self._write("uv", FAKE_UV)

    def _write(self, name: str, text: str) -> None:
        (self.programs / name).write_text(text)
        (self.programs / name).chmod(0o755)

    def set_up(
        self, *options: str, before_path: tuple[Path, ...] = (), index: str = "https://pypi.example/simple"
    ) -> tuple[str, list[str]]:
        """What it says, and the calls of uv. index: of packages; where it is empty, pip is asked for it."""
        self.calls.write_text("")
        base_python = Path(sys.base_prefix) / "bin" / "python3"
        path = [*before_path, self.programs, base_python.parent, "/usr/bin", "/bin"]
        environment = {"PATH": ":".join(map(str, path)), "HOME": str(self.root.parent), "CALLS": str(self.calls)}
        done = subprocess.run(
            [str(self.root / "script" / "setup"), *options],
            env=environment | {"BASE_PYTHON": str(base_python), "PIP_INDEX_URL": index},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return done.stderr, self.calls.read_text().splitlines()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_setting_up_says_what_it_does_and_again_installs_nothing_also_with_the_own_environment_on_path(
    checkout: Checkout,
):
    own = (checkout.root / ".venv" / "bin",)
    said, calls = checkout.set_up(index="")
    assert "npm packages" in said
    assert said.splitlines()[-1] == "script/setup: done; .venv/bin/sandbox is the command"
    assert [call.split()[1] for call in calls] == ["venv", "pip", "pip"]
    assert "--compile-bytecode" in calls[1]
    # By these newer and older versions of uv believe the certificates of the system.
    assert [call for call in calls if not call.endswith("UV_SYSTEM_CERTS=1 UV_NATIVE_TLS=1")] == []
    assert checkout.set_up()[1] == []
    assert checkout.set_up(before_path=own)[1] == []
    (checkout.root / "pyproject.toml").write_text("changed\n")
    assert checkout.set_up(before_path=own)[1] != [], "it would never install anything"


SYSTEM_PYTHON = shutil.which("python3", path="/usr/bin")
IS_COMPLETE = "import ensurepip, venv, sys; sys.exit(not 11 <= sys.version_info[1] <= 13)"


@pytest.mark.skipif(
    SYSTEM_PYTHON is None or subprocess.run([SYSTEM_PYTHON, "-c", IS_COMPLETE], check=False).returncode != 0,
    reason="the system has no Python that makes virtual environments",
)
@pytest.mark.parametrize(("minor", "is_taken"), [(1, False), (99, True)])
def test_the_newer_of_the_first_python_and_the_systems_own_is_taken(checkout: Checkout, minor: int, is_taken: bool):
    first = checkout.programs / f"python3.{minor}"
    checkout._write(first.name, f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    checkout._write("python3", f'#!/bin/sh\ncase $2 in *base_prefix*) echo {first} ;; *) exec {first} "$@" ;; esac\n')
    _, calls = checkout.set_up()
    taken = calls[0].split("--python ")[1].split()[0]
    assert taken == str(first if is_taken else Path(str(SYSTEM_PYTHON)).resolve())


def test_what_was_set_up_for_development_stays_so(checkout: Checkout):
    checkout.set_up("--dev")
    (checkout.root / "pyproject.toml").write_text("changed\n")
    _, calls = checkout.set_up()
    assert "requirements/dev.txt" in calls[0]
    assert checkout.set_up("--dev")[1] == []


def image_of_a_kernel(packed: bytes) -> bytes:
    """As for x86: the head tells where in the rest what is packed stands, with the length of the unpacked behind it."""
    head = bytearray(3 * 512)
    head[0x1F1] = 2
    struct.pack_into("<II", head, 0x248, 7, len(packed) + 4)
    return bytes(head) + b"loader " + packed + b"size" + b"more"


@pytest.mark.skipif(
    os.uname().machine != "x86_64" or not Path("/usr/libexec/virtiofsd").exists(), reason="guests have no parts here"
)
def test_the_kernel_of_guests_is_unpacked_once_and_what_cannot_be_leaves_nothing(checkout: Checkout):
    kernel = checkout.root / ".venv" / "share" / "sandbox" / "kernel"
    checkout.set_up()
    kernel.mkdir(parents=True)
    checkout._write("qemu-system-x86_64", "#!/bin/sh\n")
    (kernel / "vmlinuz").write_bytes(image_of_a_kernel(b"a packed kernel"))
    checkout._write("zstd", "#!/bin/sh\necho half; exit 1\n")
    checkout.set_up("--with-qemu")
    assert [path.name for path in kernel.iterdir()] == ["vmlinuz"]
    checkout._write("zstd", "#!/bin/sh\ntr a-z A-Z\n")
    checkout.set_up("--with-qemu")
    assert (kernel / "vmlinux").read_bytes() == b"A PACKED KERNEL"
    checkout._write("zstd", "#!/bin/sh\nexit 1\n")
    checkout.set_up("--with-qemu")
    assert (kernel / "vmlinux").read_bytes() == b"A PACKED KERNEL"
