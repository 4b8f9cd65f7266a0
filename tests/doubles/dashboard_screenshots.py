"""Takes pictures of the dashboard from a real run, for docs/images: script/screenshots [DIRECTORY]."""

import subprocess
import sys
import tempfile
from pathlib import Path

from doubles.browser import open_chromium
from doubles.live_server import ORGANISATION, World, make_repository, until
from sandbox.demo.model_script import Text, ToolUse, Turn

VIEWS = ("conversation", "output", "changes", "artifacts", "figures", "network")
LOOKS = (
    ("light", 1120, 700, VIEWS),
    ("dark", 1120, 700, ("conversation", "changes")),
    ("light", 390, 844, ("conversation", "changes")),
)
"""Of the system's choice, of width and height in CSS pixels, and the views of a task that are taken then."""
PAGES = (
    ("tasks", "/", 200),
    ("submit", "/submit?from=fix-greeting", 200),
    ("server", "/server", 200),
    ("no-such-task", "/tasks/nobody", 404),
)
"""Their pictures' names, where they are, and what is answered there; beside them the views of a task."""

APP = '''"""Greets people."""


def greet(name):
    return "hello " + name
'''
PLAN = """I looked at the repository first. `greet` fails for `None` and greets nobody for an empty name:

1. **Test first**: there are none at all, so I add `tests/test_app.py`
2. **Then the fix**: an empty name greets the world

| input | now | wanted |
| --- | --- | --- |
| `"Ada"` | hello Ada | hello Ada |
| `""` | hello | hello world |
"""
FIX = r"""mkdir -p tests out && cat > tests/test_app.py <<'END'
from app import greet


def test_an_empty_name_greets_the_world():
    assert greet("") == "hello world"
END
cat > src/app.py <<'END'
"Greets people."


def greet(name: str) -> str:
    # Nobody in particular is everybody.
    return f"hello {name or 'world'}"
END
printf '# What was done\n\nAn empty name greets the **world**; a test says so.\n' > report.md
printf '\033[32mPASS\033[0m tests/test_app.py::test_an_empty_name_greets_the_world\n\033[33m1 passed\033[0m in 0.01s\n'
"""
BUSY = "import time\nend = time.time() + 12\nwhile time.time() < end: sum(range(100000))\n"


def shell(command, description):
    return ToolUse("Bash", {"command": command, "description": description})


TURNS = (
    Turn((Text(PLAN), shell("python3 -m pytest -q tests", "Run the tests"))),
    Turn((Text("As expected: there is nothing to run yet."), shell(FIX, "Write the test and the fix"))),
    Turn((shell("curl -sS -m 5 https://telemetry.example.com/ping; true", "Report to telemetry"),)),
    Turn((shell(f"python3 -c '{BUSY}'", "Try it with large inputs"),)),
    Turn((Text("Done: an empty name greets the world now, and **a test says so**. Nothing else was touched."),)),
)


def main(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        world = World(scratch)
        try:
            play(world)
            place = world.server.ready_message["http"]
            with open_chromium() as chromium, chromium.browser() as browser:
                take(browser, place, directory)
                close_the_door(world)
                take_sign_in(browser, place, directory)
                browser.ignore_errors("404 (Not Found)")
                assert browser.console_errors == [], browser.console_errors
        finally:
            world.close()


def play(world):
    """Six tasks: two done, one failed, one cancelled, one at work and one that waits for its room."""
    make_repository(world.repositories / "app.git", {"README.md": "# App\n", "src/app.py": APP})
    world.start_git()
    world.start_model(*TURNS)
    world.start_server()
    submit(world, "fix-greeting", "Fix the greeting for an empty name", team="platform", kind="bug")
    world.wait("fix-greeting", 120)
    submit(world, "upgrade-build", "Upgrade the build to the new toolchain", branch="next", team="build")
    world.wait("upgrade-build", 60)
    submit(world, "audit-payments", "Security audit of the payment service", team="security")
    world.wait("audit-payments", 120)
    submit(world, "rename-api", "Rename the API to what it does", team="platform")
    world.wait_for_state("running", "rename-api")
    world.http.delete("/api/v1/tasks/rename-api?force=true&reason=the+name+stays")
    world.wait("rename-api", 60)
    submit(world, "import-data", "Import the large data set", cpus=14)
    until(lambda: world.status("import-data")["progress"]["tool_calls"] >= 3, 60, "the work to be under way")
    submit(world, "train-model", "Train the model anew", cpus=14)
    until(lambda: "CPUs" in world.status("train-model")["state_message"], 20, "it to wait")


def submit(world, task_id, name, *, branch="main", cpus=2, **labels):
    manifest = {
        "version": "1",
        "kind": "Task",
        "metadata": {"name": name, "id": task_id, "labels": labels},
        "repository": {"url": f"{ORGANISATION}app.git", "branch": branch},
        "claude": {"prompt": "An empty name greets nobody. Fix that and add a test; leave everything else alone."},
        "vm": {"cpus": cpus, "memory": "2G"},
        "lifecycle": {"artifact_patterns": ["report.md"], "timeout": "1h"},
    }
    answer = world.http.post("/api/v1/tasks", json=manifest)
    assert answer.status_code == 202, answer.text


def close_the_door(world):
    """Whoever comes now needs a token."""
    command = [sys.executable, "-m", "sandbox", "token", "create", "--role", "operator", "--name", "visitor"]
    made = subprocess.run([*command, "--data-dir", str(world.data_dir)], capture_output=True, timeout=30, check=True)
    world.bearer = made.stdout.split()[-1].decode()


def take(browser, place, directory):
    for scheme, width, height, views in LOOKS:
        look = look_of(scheme, width)
        for name, path, status in PAGES:
            page = browser.open(f"{place}{path}", width=width, scheme=scheme, status=status)
            save(page, directory / f"{name}-{look}.png", height)
            page.close()
        page = browser.open(f"{place}/tasks/fix-greeting", width=width, scheme=scheme)
        page.locator(".says").first.wait_for()
        for view in views:
            page.locator(f"#tab-{view}").click()
            if view == "changes":
                page.locator(".file").first.wait_for()
            if view == "artifacts":
                page.get_by_role("button", name="report.md").click()
                page.locator(".preview:visible strong").wait_for()
            page.evaluate("scrollTo(0, 0)")
            save(page, directory / f"task-{view}-{look}.png", height)
        page.close()


def take_sign_in(browser, place, directory):
    for scheme, width, height, _ in LOOKS:
        page = browser.open(f"{place}/sign-in", width=width, scheme=scheme)
        save(page, directory / f"sign-in-{look_of(scheme, width)}.png", height)
        page.close()


def look_of(scheme, width):
    return f"{scheme}-{'phone' if width < 500 else 'wide'}"


def save(page, file, height):
    page.set_viewport_size({"width": page.viewport_size["width"], "height": height})
    page.wait_for_timeout(1200)  # two ticks of the clocks and a drawing
    page.screenshot(path=file, animations="disabled")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "docs" / "images")
