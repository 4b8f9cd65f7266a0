"""An interrupted demo stops its task and its processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from doubles.deployment import wait_until
from sandbox.demo.walkthrough import next_steps, start_module


@pytest.fixture
def demo(tmp_path):
    """The demo as started by a terminal: the leader of a process group that receives ^C."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "LANG": "C.UTF-8",
        "TMPDIR": str(tmp_path),
        "SANDBOX_RUNTIME": "bubblewrap",
    }
    with (tmp_path / "screen").open("wb") as screen:
        process = subprocess.Popen(
            [sys.executable, "-m", "sandbox", "demo"],
            stdin=subprocess.DEVNULL, stdout=screen, stderr=screen, env=environment, start_new_session=True,
        )  # fmt: skip
    yield process
    if process.poll() is None:
        process.terminate()
        process.wait(30)
    for pid in processes_of(tmp_path):
        os.kill(pid, signal.SIGKILL)


def processes_of(home: Path) -> list[int]:
    """Return all descendants of the demo, including detached ones."""
    home_variable, pids = f"HOME={home}".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if home_variable in (entry / "environ").read_bytes().split(b"\0"):
                pids.append(int(entry.name))
        except OSError:
            continue
    return pids


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_signal_ends_the_demo_its_task_and_all_processes(demo, tmp_path, number, code):
    screen = tmp_path / "screen"
    wait_until(lambda: "running" in screen.read_text() or demo.poll() is not None, 60, "the task to run")
    assert demo.poll() is None, screen.read_text()
    assert len(processes_of(tmp_path)) >= 4
    os.killpg(demo.pid, number)
    assert demo.wait(30) == code
    assert "Traceback" not in screen.read_text()
    wait_until(lambda: not processes_of(tmp_path), 5, f"the end of {processes_of(tmp_path)}")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("sandbox-demo-")] == []


def test_next_steps_set_path_only_if_the_command_is_not_found_on_path(monkeypatch, tmp_path):
    installed = Path(sys.executable).parent / "sandbox"
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "sandbox").symlink_to(installed)
    monkeypatch.setenv("PATH", str(tmp_path / "links"))
    assert "export PATH" not in next_steps()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert f"  export PATH={installed.parent}:$PATH\n" in next_steps()
    assert "export ANTHROPIC_API_KEY" in next_steps()


def test_demo_does_not_import_from_the_current_directory(tmp_path, monkeypatch):
    """The user may run it in a checkout whose files come from anyone."""
    (tmp_path / "sandbox").mkdir()
    (tmp_path / "sandbox" / "__init__.py").write_text("raise SystemExit('imported from the current directory')\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "git").mkdir()
    with start_module("sandbox.demo.git_server", "--directory", str(tmp_path / "git")) as message:
        assert message["url"].startswith("http://127.0.0.1:")
