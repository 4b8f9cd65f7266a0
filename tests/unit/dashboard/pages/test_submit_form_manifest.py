"""The manifests in the submit form and on a task's pages."""

import asyncio
import html
import re
from urllib.parse import quote

import pytest

from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING
from doubles.fake_token_store import FakeTokenStore
from doubles.manifests import manifest, parse_manifest
from sandbox.agents.claude_code.agent import ClaudeCode
from sandbox.dashboard.pages.submit_form import ADDED_HOSTS_MAX, RECENT_REPOSITORIES_MAX
from sandbox.model import events as e
from sandbox.model.errors import InvalidManifestError
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.manifest.schema import Repository, Secret


def test_form_is_filled_with_the_manifest_of_an_earlier_task(pages):
    pages.tasks.add("task-001")
    page = pages.get("/submit?from=task-001")
    assert "Run again: My Task" in page.text
    assert "Your instructions here" in page.text


def manifest_of(page):
    text = html.unescape(re.search(r'id="manifest"[^>]*>\n(.*?)</textarea>', page.text, re.DOTALL)[1])
    return parse_manifest(text.encode(), is_json=False)


def test_refused_host_can_be_allowed_in_a_new_run(pages):
    pages.tasks.add("task-001")
    page = pages.get("/submit?from=task-001&allow=hooks.example.com:8443")
    assert (vm := manifest_of(page).vm).network_mode == "outbound"
    assert vm.allowed_hosts == ("hooks.example.com:8443",)
    notice = re.search(r'id="allowed">(.*?)</p>', page.text)[1]
    assert [re.sub("<[^>]*>", "", each) for each in re.findall(r'<span class="mono">.*?</span>', notice)] == [
        "hooks.example.com:8443",
        "isolated",
        "outbound",
    ]
    again = pages.get("/submit?from=task-001")
    assert (manifest_of(again).vm.network_mode, 'id="allowed"' in again.text) == ("isolated", False)
    assert 'id="allowed"' not in pages.get("/submit?allow=hooks.example.com").text


FAILED = (*TO_RUNNING, e.AgentExited(1, None, Failure(FailureCode.AGENT_FAILED, "It broke.")), e.TaskFinished())


LIMITS = {"timeout": "90m", "hang_timeout": "5m", "budget_usd": 0.05, "budget_tokens": 1000}


def add_failed_task(pages, code, message):
    asyncio.run(pages.tasks.submit(manifest("task-001", lifecycle=LIMITS)))
    failure = Failure(FailureCode(code), message)
    pages.tasks.record("task-001", *TO_RUNNING, e.AgentExited(1, None, failure), e.TaskFinished())


@pytest.mark.parametrize(
    ("code", "message", "field", "raised"),
    [
        ("out_of_memory", "vm.memory (8G) was used up; raise it.", "vm.memory", "the memory from 8G to 16G"),
        ("disk_full", "The disk is full: vm.disk is 40G; raise it.", "vm.disk", "the disk size from 40G to 80G"),
        ("timeout", "It took 90m; raise lifecycle.timeout.", "lifecycle.timeout", "the timeout from 90m to 180m"),
        (
            "budget_exceeded",
            "lifecycle.budget_usd (0.05 USD) is spent.",
            "lifecycle.budget_usd",
            "the budget in USD from 0.05 to 0.1",
        ),
        (
            "budget_exceeded",
            "lifecycle.budget_tokens (1,000 tokens) is spent.",
            "lifecycle.budget_tokens",
            "the token budget from 1000 to 2000",
        ),
    ],
)
def test_button_of_the_task_page_opens_the_form_with_twice_the_limit(pages, code, message, field, raised):
    add_failed_task(pages, code, message)
    button = re.search(r'id="fix" href="([^"]+)"', pages.get("/tasks/task-001").text)[1]
    assert html.unescape(button) == f"/submit?from=task-001&field={field}"
    page = pages.get(html.unescape(button))
    assert re.search(r'id="raised">This form raises ([^<]+)\.</span>', page.text)[1] == raised
    marked = re.findall(r'<div class="field raised">.*?data-path="([^"]+)"', page.text, re.DOTALL)
    assert marked == [field]
    section, _, name = field.partition(".")
    assert raised.endswith(f" to {getattr(getattr(manifest_of(page), section), name)}")


def test_limit_that_the_form_lacks_is_raised_in_the_yaml(pages):
    add_failed_task(pages, "hang", "The agent produced no output for 5m; raise lifecycle.hang_timeout or retry.")
    page = pages.get("/submit?from=task-001&field=lifecycle.hang_timeout")
    assert "This form raises the hang timeout from 5m to 10m." in page.text
    assert manifest_of(page).lifecycle.hang_timeout == "10m"
    assert 'class="field raised"' not in page.text


def test_limit_of_the_agent_is_raised_in_the_yaml(pages):
    asyncio.run(pages.tasks.submit(manifest("task-001", claude={"prompt": "Work.", "max_turns": 5})))
    failure = Failure(FailureCode.AGENT_FAILED, "Turns; raise claude.max_turns.", reason="max_turns")
    pages.tasks.record("task-001", *TO_RUNNING, e.AgentExited(1, None, failure), e.TaskFinished())
    button = re.search(r'id="fix" href="([^"]+)">([^<]+)<', pages.get("/tasks/task-001").text)
    assert button[2] == "Run again with more turns"
    page = pages.get(html.unescape(button[1]))
    assert "This form raises the maximum number of turns from 5 to 10." in page.text
    assert manifest_of(page).agent.settings["max_turns"] == 10
    assert manifest_of(page).agent.prompt == "Work."


@pytest.mark.parametrize(
    ("code", "message", "field"),
    [
        ("timeout", "It took 90m; raise lifecycle.timeout.", "vm.memory"),
        ("timeout", "It took 90m; raise lifecycle.timeout.", "lifecycle.nothing"),
        ("timeout", "It took 90m; raise lifecycle.timeout.", ""),
        ("agent_failed", "It needs more vm.memory.", "vm.memory"),
        ("clone_failed", "It has no branch 'a'; check repository.branch.", "repository.branch"),
    ],
)
def test_link_to_another_field_changes_nothing(pages, code, message, field):
    add_failed_task(pages, code, message)
    page = pages.get(f"/submit?from=task-001&field={field}")
    assert manifest_of(page) == manifest_of(pages.get("/submit?from=task-001"))
    assert "This form raises" not in page.text


def test_limit_that_is_not_set_is_not_raised(pages):
    pages.tasks.add("task-001", *FAILED)
    assert "This form raises" not in pages.get("/submit?from=task-001&field=lifecycle.budget_usd").text


def test_form_shows_why_the_earlier_task_failed(pages):
    pages.tasks.add("failed", *FAILED)
    pages.tasks.add("done", *TO_RUNNING, *TO_COMPLETED)
    text = pages.get("/submit?from=failed").text
    assert "<strong>The agent failed.</strong> It broke." in text
    assert 'href="/errors#agent_failed"' in text
    assert 'id="failure"' not in pages.get("/submit?from=done").text
    assert 'id="failure"' not in pages.get("/submit").text


def test_several_refused_hosts_can_be_allowed_in_a_new_run(pages):
    pages.tasks.add("task-001")
    hosts = [f"h{number}.example.com" for number in range(ADDED_HOSTS_MAX + 10)]
    page = pages.get(f"/submit?from=task-001&allow=*&allow={hosts[0]}&allow={'&allow='.join(hosts[:3])}")
    assert manifest_of(page).vm.allowed_hosts == tuple(hosts[:3])
    notice = re.sub("<[^>]*>", "", re.search(r'id="allowed">(.*?)</p>', page.text)[1])
    assert "adds h0.example.com, h1.example.com and h2.example.com to the hosts" in notice
    page = pages.get(f"/submit?from=task-001&allow={'&allow='.join(hosts)}")
    assert manifest_of(page).vm.allowed_hosts == tuple(hosts[:ADDED_HOSTS_MAX])


def test_models_with_a_price_are_suggested(pages):
    text = pages.get("/submit").text
    options = re.findall(
        r'<option value="([^"]+)">', text[text.index('<datalist id="models"') :].partition("</data")[0]
    )
    assert "claude-sonnet-4-5" in options
    assert all(ClaudeCode().has_price(model) for model in options)


@pytest.mark.parametrize(
    "host", ["*", "a b", "</textarea><script>alert(1)</script>", "x" * 5000, "10.0.0.1\n  y: 1", "a.org\nb.org", " "]
)
def test_invalid_host_in_the_allow_parameter_is_ignored(pages, host):
    pages.tasks.add("task-001")
    page = pages.get(f"/submit?from=task-001&allow={quote(host)}")
    assert 'id="allowed"' not in page.text
    assert "<script>alert" not in page.text
    assert manifest_of(page).vm.allowed_hosts == ()


def test_empty_manifest_has_the_required_fields(pages):
    text = html.unescape(re.search(r'id="manifest"[^>]*>\n(.*?)</textarea>', pages.get("/submit").text, re.DOTALL)[1])
    with pytest.raises(InvalidManifestError) as error:
        parse_manifest(text.encode(), is_json=False)
    assert {each.field for each in error.value.errors} == {"metadata.name", "repository.url", "claude.prompt"}
    for name, value in (("name", "a"), ("url", "https://example.org/r.git"), ("prompt", "b")):
        text = text.replace(f'{name}: ""', f"{name}: {value}")
    parse_manifest(text.encode(), is_json=False)


def test_recent_repositories_are_suggested_once_and_their_number_is_limited(pages):
    for number in range(3 * RECENT_REPOSITORIES_MAX):
        repository = Repository(url=f"git@example.org:org/{number // 2}.git", branch="main")
        asyncio.run(pages.tasks.submit(manifest(f"task-{number:03}").replace(repository=repository)))
    text = pages.get("/submit").text
    options = text[text.index('id="repositories"') : text.index('id="branches"')]
    suggested = re.findall(r'<option value="([^"]+)" data-branches="main">', options)
    assert len(suggested) == len(set(suggested)) == RECENT_REPOSITORIES_MAX
    assert pages.tasks.queries[-1].limit <= 100
    assert re.search(r'data-repository="git@example.org:org/0.git" data-branch="main">org/0@main<', text)


def test_branches_of_each_recent_repository_are_suggested(pages):
    for number, (name, branch) in enumerate([("a", "main"), ("a", "next"), ("b", "stable"), ("a", "main")]):
        repository = Repository(url=f"https://example.org/{name}.git", branch=branch)
        asyncio.run(pages.tasks.submit(manifest(f"task-{number:03}").replace(repository=repository)))
    text = pages.get("/submit").text
    suggested = re.findall(r'<option value="https://example.org/(.).git" data-branches="([^"]+)">', text)
    assert suggested == [("a", "main next"), ("b", "stable")]


def test_branch_that_could_not_be_cloned_is_not_suggested(pages):
    failure = Failure(FailureCode.CLONE_FAILED, "Cannot clone it: there is no such branch.")
    for number, (name, branch, is_cloned) in enumerate(
        [("a", "mian", False), ("a", "main", True), ("b", "main", False), ("c", "next", False), ("c", "next", True)]
    ):
        repository = Repository(url=f"https://example.org/{name}.git", branch=branch)
        asyncio.run(pages.tasks.submit(manifest(f"task-{number:03}").replace(repository=repository)))
        if not is_cloned:
            pages.tasks.record(f"task-{number:03}", e.AttemptFailed(failure))
    text = pages.get("/submit").text
    suggested = re.findall(r'<option value="https://example.org/(.).git" data-branches="([^"]+)">', text)
    assert suggested == [("a", "main"), ("c", "next")]


def test_hostile_repository_is_escaped(pages):
    hostile = Repository(url="https://example.org/r.git", branch='"><script>alert(1)</script>')
    asyncio.run(pages.tasks.submit(manifest("task-001").replace(repository=hostile)))
    text = pages.get("/submit").text
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_secret_sources_are_shown_to_operators_only(pages_with_tokens):
    pages = pages_with_tokens(FakeTokenStore(ann="operator", bob="viewer"))
    secret = Secret(name="GITHUB_TOKEN", source="vault", key="teams/platform#token")
    asyncio.run(pages.tasks.submit(manifest("task-001").replace(secrets=(secret,))))
    for path in ("/tasks/task-001", "/submit?from=task-001", "/tasks/task-001/proof"):
        for name, is_visible in (("ann", True), ("bob", False)):
            text = pages.get(path, authorization=f"Bearer {name}").text
            assert "- name: GITHUB_TOKEN" in text
            assert ("vault" in text, "teams/platform#token" in text) == (is_visible, is_visible), (path, name)
