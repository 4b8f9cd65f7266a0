"""Scripts have a help text, and a repeated setup is fast with any python3 on PATH."""

import shutil
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
INSTALLED_PROGRAMS = ("bwrap", "chromium", "curl", "ip", "mkfs.ext4", "runsc", "strace", "zstd")


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_prints_a_description_and_changes_nothing(name: str, tmp_path: Path):
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    command = [str(ROOT / "script" / name), "--help"]
    completed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert (completed.returncode, completed.stderr) == (0, "")
    assert len(completed.stdout) > 60
    assert list(tmp_path.iterdir()) == []


class Checkout:
    """A checkout in which to run the real setup script, with all system packages already installed."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "checkout"
        self.calls = directory / "calls"
        shutil.copytree(ROOT / "script", self.root / "script")
        shutil.copytree(ROOT / "requirements", self.root / "requirements")
        shutil.copy(ROOT / "pyproject.toml", self.root)
        self.programs = directory / "programs"
        self.programs.mkdir()
        for name in INSTALLED_PROGRAMS:
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
        """Run the setup; return its output and the calls to uv.

        If `index` is empty, the setup reads the index URL from pip's configuration.
        """
        self.calls.write_text("")
        base_python = Path(sys.base_prefix) / "bin" / "python3"
        path = [*before_path, self.programs, base_python.parent, "/usr/bin", "/bin"]
        environment = {"PATH": ":".join(map(str, path)), "HOME": str(self.root.parent), "CALLS": str(self.calls)}
        completed = subprocess.run(
            [str(self.root / "script" / "setup"), *options],
            env=environment | {"BASE_PYTHON": str(base_python), "PIP_INDEX_URL": index},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return completed.stderr, self.calls.read_text().splitlines()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_repeated_setup_installs_nothing(
    checkout: Checkout,
):
    venv_path = (checkout.root / ".venv" / "bin",)
    output, calls = checkout.set_up(index="")
    assert "npm packages" in output
    assert output.splitlines()[-1] == "script/setup: done; .venv/bin/sandbox is the command"
    assert [call.split()[1] for call in calls] == ["venv", "pip", "pip"]
    assert "--compile-bytecode" in calls[1]
    # These variables make newer and older versions of uv trust the system's certificates.
    assert [call for call in calls if not call.endswith("UV_SYSTEM_CERTS=1 UV_NATIVE_TLS=1")] == []
    assert checkout.set_up()[1] == []
    assert checkout.set_up(before_path=venv_path)[1] == []
    (checkout.root / "pyproject.toml").write_text("changed\n")
    assert checkout.set_up(before_path=venv_path)[1] != [], "a changed project is not installed"


SYSTEM_PYTHON = shutil.which("python3", path="/usr/bin")
PYTHON_CHECK_PROGRAM = "import ensurepip, venv, sys; sys.exit(not 11 <= sys.version_info[1] <= 13)"


@pytest.mark.skipif(
    SYSTEM_PYTHON is None or subprocess.run([SYSTEM_PYTHON, "-c", PYTHON_CHECK_PROGRAM], check=False).returncode != 0,
    reason="the system's Python cannot make virtual environments",
)
@pytest.mark.parametrize(("minor", "is_selected"), [(1, False), (99, True)])
def test_setup_selects_the_newer_of_first_python_and_system_python(checkout: Checkout, minor: int, is_selected: bool):
    first = checkout.programs / f"python3.{minor}"
    checkout._write(first.name, f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    checkout._write("python3", f'#!/bin/sh\ncase $2 in *base_prefix*) echo {first} ;; *) exec {first} "$@" ;; esac\n')
    _, calls = checkout.set_up()
    selected = calls[0].split("--python ")[1].split()[0]
    assert selected == str(first if is_selected else Path(str(SYSTEM_PYTHON)).resolve())


def test_repeated_setup_remains_a_development_setup(checkout: Checkout):
    checkout.set_up("--dev")
    (checkout.root / "pyproject.toml").write_text("changed\n")
    _, calls = checkout.set_up()
    assert "requirements/dev.txt" in calls[0]
    assert checkout.set_up("--dev")[1] == []
