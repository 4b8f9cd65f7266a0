"""The manifests in the submit form and on a task's pages."""

import asyncio
import html
import re
from urllib.parse import quote

import pytest

from doubles.fake_tasks import manifest
from doubles.fake_token_store import FakeTokenStore
from doubles.manifests import parse_manifest
from sandbox.agents.claude_code.agent import ClaudeCode
from sandbox.dashboard.pages.forms import ADDED_HOSTS_MAX, RECENT_REPOSITORIES_MAX
from sandbox.model.errors import InvalidManifestError
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


@pytest.mark.parametrize(
    ("query", "memory"),
    [("&field=vm.memory", "16G"), ("&field=vm.disk", "8G"), ("", "8G")],
)
def test_link_to_more_memory_doubles_it(pages, query, memory):
    pages.tasks.add("task-001")
    vm = manifest_of(pages.get(f"/submit?from=task-001{query}")).vm
    assert (vm.memory, vm.disk) == (memory, "40G")


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
def test_invalid_host_to_allow_is_ignored(pages, host):
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
