"""`sandbox task open` opens a task in the dashboard and prints the task's URL."""

import json

import pytest

from doubles.fake_api import json_response
from doubles.sample_task import TASK_ID, task_status


@pytest.fixture
def url(api):
    """The URL of a task's page."""
    api.on("GET", f"/tasks/{TASK_ID}", json_response(task_status("running")))
    return f"{api.url}/tasks/{TASK_ID}"


@pytest.fixture
def opened(environment, tmp_path):
    """Install a fake browser; return a function that returns the URL that the browser opened, or None."""
    browser, log = tmp_path / "browser", tmp_path / "opened"
    browser.write_text(f'#!/bin/sh\nprintf %s "$1" >{log}\n')
    browser.chmod(0o755)
    environment["BROWSER"] = str(browser)
    return lambda: log.read_text() if log.exists() else None


def test_page_is_opened_and_its_url_is_printed(run_cli, url, opened):
    result = run_cli("task", "open", TASK_ID)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{url}\n".encode(), b"")
    assert opened() == url


def test_url_is_printed_but_not_opened_without_a_display(run_cli, environment, url, tmp_path):
    text_browser = tmp_path / "w3m"
    text_browser.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    text_browser.chmod(0o755)
    environment |= {"PATH": f"{tmp_path}:{environment['PATH']}", "TERM": "xterm"}
    result = run_cli("task", "open", TASK_ID)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{url}\n".encode(), b"")
    assert not (tmp_path / "started").exists()


def test_no_browser_option_prevents_the_browser_from_starting(run_cli, url, opened):
    result = run_cli("task", "open", TASK_ID, "--no-browser", "--format", "json")
    assert json.loads(result.stdout) == {"task_id": TASK_ID, "url": url}
    assert opened() is None


def test_failed_browser_start_is_reported(run_cli, environment, url):
    environment["BROWSER"] = "/no/such/browser"
    result = run_cli("task", "open", TASK_ID)
    assert (result.returncode, result.stdout) == (0, f"{url}\n".encode())
    assert result.stderr == b"The browser could not be started; open the URL above.\n"


def test_unknown_task_is_not_opened(run_cli, api, opened):
    assert run_cli("task", "open", "nope").returncode == 3
    assert opened() is None


def test_id_is_encoded_in_the_url(run_cli, api, opened):
    api.on("GET", "/tasks/a%3Fb", json_response(task_status("running", task_id="a?b")))
    assert run_cli("task", "open", "a?b").stdout.decode() == f"{api.url}/tasks/a%3Fb\n"
    assert opened() == f"{api.url}/tasks/a%3Fb"
