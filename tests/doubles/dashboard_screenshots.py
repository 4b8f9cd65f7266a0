"""Takes screenshots of the dashboard from a real run, for docs/images. Usage: script/screenshots [DIRECTORY]."""

import subprocess
import sys
import tempfile
from pathlib import Path

from doubles.browser import open_chromium
from doubles.deployment import ORGANIZATION, Deployment, make_repository, wait_until
from sandbox.demo.scripted_model import Text, ToolUse, Turn

VIEWS = ("conversation", "output", "changes", "artifacts", "metrics", "network")
LAYOUTS = (
    ("light", 1120, 700, VIEWS),
    ("dark", 1120, 700, ("conversation", "changes")),
    ("light", 390, 844, ("conversation", "changes")),
)
"""Color scheme, width and height in CSS pixels, and the task views to capture."""
PAGES = (
    ("tasks", "/", 200),
    ("submit", "/submit?from=fix-greeting", 200),
    ("server", "/server", 200),
    ("hosts", "/hosts", 200),
    ("no-such-task", "/tasks/nobody", 404),
)
"""The other pages: screenshot name, path and status code."""

APP_SOURCE = '''"""Greets people."""


def greet(name):
    return "hello " + name
'''
PLAN_MESSAGE = """I looked at the repository first. `greet` fails for `None` and greets nobody for an empty name:

1. **Test first**: there are none at all, so I add `tests/test_app.py`
2. **Then the fix**: an empty name greets the world

| input | now | wanted |
| --- | --- | --- |
| `"Ada"` | hello Ada | hello Ada |
| `""` | hello | hello world |
"""
FIX_SCRIPT = r"""mkdir -p tests out && cat > tests/test_app.py <<'END'
from app import greet


def test_an_empty_name_greets_the_world():
    assert greet("") == "hello world"
END
cat > src/app.py <<'END'
"Greets people."


def greet(name: str) -> str:
    # An empty name greets the world.
    return f"hello {name or 'world'}"
END
printf '# What was done\n\nAn empty name greets the **world**, and a test checks this.\n' > report.md
printf '\033[32mPASS\033[0m tests/test_app.py::test_an_empty_name_greets_the_world\n\033[33m1 passed\033[0m in 0.01s\n'
"""
CPU_LOAD_SCRIPT = "import time\nend = time.time() + 12\nwhile time.time() < end: sum(range(100000))\n"


def shell(command, description):
    return ToolUse("Bash", {"command": command, "description": description})


TURNS = (
    Turn((Text(PLAN_MESSAGE), shell("python3 -m pytest -q tests", "Run the tests"))),
    Turn((Text("As expected: there is nothing to run yet."), shell(FIX_SCRIPT, "Write the test and the fix"))),
    Turn((shell("curl -sS -m 5 https://telemetry.example.com/ping; true", "Report to telemetry"),)),
    Turn((shell(f"python3 -c '{CPU_LOAD_SCRIPT}'", "Try it with large inputs"),)),
    Turn((Text("Done: an empty name greets the world now, and **a test checks this**. Nothing else has changed."),)),
)


def main(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        deployment = Deployment(scratch)
        try:
            run_tasks(deployment)
            base_url = deployment.server.ready_message["http"]
            with open_chromium() as chromium, chromium.browser() as browser:
                take_screenshots(browser, base_url, directory)
                require_token(deployment)
                take_sign_in_screenshots(browser, base_url, directory)
                browser.ignore_errors("404 (Not Found)")
                assert browser.console_errors == [], browser.console_errors
        finally:
            deployment.close()


def run_tasks(deployment):
    """Run six tasks. In the end, two are completed, one failed, one cancelled, one running and one pending."""
    make_repository(deployment.repositories / "app.git", {"README.md": "# App\n", "src/app.py": APP_SOURCE})
    deployment.start_git()
    deployment.start_model(*TURNS)
    deployment.start_server()
    submit(deployment, "fix-greeting", "Fix the greeting for an empty name", team="platform", kind="bug")
    deployment.wait("fix-greeting", 120)
    submit(deployment, "upgrade-build", "Upgrade the build to the new toolchain", branch="next", team="build")
    deployment.wait("upgrade-build", 60)
    submit(deployment, "audit-payments", "Security audit of the payment service", team="security")
    deployment.wait("audit-payments", 120)
    submit(deployment, "rename-api", "Rename the API after its purpose", team="platform")
    deployment.wait_for_state("running", "rename-api")
    deployment.http.delete("/api/v1/tasks/rename-api?force=true&reason=the+name+stays")
    deployment.wait("rename-api", 60)
    submit(deployment, "import-data", "Import the large data set", cpus=14)
    wait_until(lambda: deployment.status("import-data")["progress"]["tool_calls"] >= 3, 60, "three tool calls")
    submit(deployment, "train-model", "Train the model again", cpus=14)
    wait_until(lambda: "CPUs" in deployment.status("train-model")["state_message"], 20, "the task to be pending")


def submit(deployment, task_id, name, *, branch="main", cpus=2, **labels):
    manifest = {
        "version": "1",
        "kind": "Task",
        "metadata": {"name": name, "id": task_id, "labels": labels},
        "repository": {"url": f"{ORGANIZATION}app.git", "branch": branch},
        "claude": {"prompt": "An empty name greets nobody. Fix that and add a test; leave everything else alone."},
        "vm": {"cpus": cpus, "memory": "2G"},
        "lifecycle": {"artifact_patterns": ["report.md"], "timeout": "1h"},
    }
    response = deployment.http.post("/api/v1/tasks", json=manifest)
    assert response.status_code == 202, response.text


def require_token(deployment):
    """Create a token; from then on, the server requires one."""
    command = [sys.executable, "-m", "sandbox", "token", "create", "--role", "operator", "--name", "visitor"]
    created = subprocess.run(
        [*command, "--data-dir", str(deployment.data_dir)], capture_output=True, timeout=30, check=True
    )
    deployment.bearer = created.stdout.split()[-1].decode()


def take_screenshots(browser, base_url, directory):
    for scheme, width, height, views in LAYOUTS:
        layout = layout_name(scheme, width)
        for name, path, status in PAGES:
            page = browser.open(f"{base_url}{path}", width=width, scheme=scheme, status=status)
            save(page, directory / f"{name}-{layout}.png", height)
            page.close()
        page = browser.open(f"{base_url}/tasks/fix-greeting", width=width, scheme=scheme)
        page.locator(".says").first.wait_for()
        for view in views:
            page.locator(f"#tab-{view}").click()
            if view == "changes":
                page.locator(".file .tx").first.wait_for()
            if view == "artifacts":
                page.get_by_role("button", name="report.md").click()
                page.locator(".preview:visible strong").wait_for()
            page.evaluate("scrollTo(0, 0)")
            save(page, directory / f"task-{view}-{layout}.png", height)
        page.close()


def take_sign_in_screenshots(browser, base_url, directory):
    for scheme, width, height, _ in LAYOUTS:
        page = browser.open(f"{base_url}/sign-in", width=width, scheme=scheme)
        save(page, directory / f"sign-in-{layout_name(scheme, width)}.png", height)
        page.close()


def layout_name(scheme, width):
    return f"{scheme}-{'phone' if width < 500 else 'wide'}"


def save(page, file, height):
    page.set_viewport_size({"width": page.viewport_size["width"], "height": height})
    page.wait_for_timeout(1200)  # long enough for the page to update the displayed times and to render
    page.screenshot(path=file, animations="disabled")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "docs" / "images")
