"""On a server with tokens somebody signs in with one, once."""

import subprocess
import sys

import pytest

from doubles.live import says


@pytest.fixture
def guarded(empty_world):
    """A server with a viewer's token; gives its address and the token."""
    empty_world.start_model(says())
    command = [sys.executable, "-m", "sandbox", "token", "create", "--role", "viewer", "--name", "bob", "--data-dir"]
    made = subprocess.run([*command, str(empty_world.data_dir)], capture_output=True, text=True, timeout=30, check=True)
    empty_world.bearer = made.stdout.split()[-1]
    empty_world.start_server()
    return empty_world


def test_a_token_is_shown_once_and_signing_out_ends_it(guarded, browser):
    place = guarded.server.said["http"]
    page = browser.open(f"{place}/?state=failed")
    assert page.url == f"{place}/sign-in?to=%2F%3Fstate%3Dfailed"
    page.get_by_label("Token").fill("sbx_wrong")
    page.get_by_role("button", name="Sign in").click()
    page.get_by_text("This token is not known here.").wait_for()
    browser.forgive("status of 401")
    page.get_by_label("Token").fill(guarded.bearer)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_text("No task fits these filters").wait_for()
    assert page.url == f"{place}/?state=failed"
    assert page.get_by_role("link", name="New task").count() == 0
    assert guarded.bearer not in page.content() + str(page.context.cookies())
    page.get_by_role("button", name="Sign out").click()
    page.get_by_label("Token").wait_for()
    page.goto(place)
    assert page.url.startswith(f"{place}/sign-in")
    assert browser.complaints == []
