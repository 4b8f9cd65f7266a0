"""A server with tokens clones from the hosts that its operator names, and from no others."""

import json

import pytest

from sandbox.model.egress import is_clone_allowed
from sandbox.model.manifest.parser import InvalidManifestError, parse_manifest


@pytest.mark.parametrize(
    ("url", "entry"),
    [
        ("https://github.com/org/repo.git", "github.com"),
        ("https://GitHub.com/org/repo.git", "github.COM"),
        ("https://github.com:443/org/repo.git", "github.com"),
        ("http://github.com/org/repo.git", "github.com"),
        ("ssh://git@github.com/org/repo.git", "github.com"),
        ("git@github.com:org/repo.git", "github.com"),
        ("git@github.com:org/repo.git", "github.com:22"),
        ("https://github.com:8443/org/repo.git", "github.com:8443"),
        ("https://a.example.org/repo.git", "*.example.org"),
        ("https://a.b.example.org/repo.git", "*.example.org"),
        ("https://[2001:db8::1]/repo.git", "[2001:DB8::1]"),
        ("https://[2001:db8::1]:8443/repo.git", "[2001:db8::1]:8443"),
        ("https://192.0.2.7/repo.git", "192.0.2.7"),
    ],
)
def test_a_named_host_is_cloned_from(url, entry):
    assert is_clone_allowed(url, [entry])


@pytest.mark.parametrize(
    ("url", "entry"),
    [
        ("https://evil.example/github.com/repo.git", "github.com"),
        ("https://github.com.evil.example/repo.git", "github.com"),
        ("https://notgithub.com/repo.git", "github.com"),
        ("https://github.com:8443/org/repo.git", "github.com"),
        ("https://github.com/org/repo.git", "github.com:8443"),
        ("https://example.org/repo.git", "*.example.org"),
        ("https://evilexample.org/repo.git", "*.example.org"),
        ("ssh://github.com@evil.example/repo.git", "github.com"),
        ("git@evil.example:github.com/repo.git", "github.com"),
        ("https://github.com/repo.git", ""),
        ("file:///github.com/repo.git", "github.com"),
        ("ext::sh -c id", "github.com"),
    ],
)
def test_another_host_is_not(url, entry):
    assert not is_clone_allowed(url, [entry])


def manifest(url: str) -> bytes:
    return json.dumps(
        {
            "version": "1",
            "kind": "Task",
            "metadata": {"name": "A task"},
            "repository": {"url": url, "branch": "main"},
            "claude": {"prompt": "Do it."},
        }
    ).encode()


def mistakes(url: str, clone_hosts) -> list[tuple[str, str]]:
    try:
        parse_manifest(manifest(url), is_json=True, clone_hosts=clone_hosts)
    except InvalidManifestError as error:
        return [(mistake.field, mistake.rule) for mistake in error.errors]
    return []


def test_a_repository_elsewhere_is_a_mistake_in_the_manifest():
    assert mistakes("https://evil.example/repo.git", ["github.com"]) == [("repository.url", "not_offered")]
    assert mistakes("https://evil.example/repo.git", []) == [("repository.url", "not_offered")]
    assert mistakes("https://github.com/org/repo.git", ["github.com"]) == []
    assert mistakes("https://evil.example/repo.git", None) == []


@pytest.mark.parametrize(("clone_hosts", "offered"), [([], "none"), (["github.com"], "github.com")])
def test_the_mistake_names_the_setting_that_allows_a_host(clone_hosts, offered):
    with pytest.raises(InvalidManifestError) as refused:
        parse_manifest(manifest("https://git.example/repo.git"), is_json=True, clone_hosts=clone_hosts)
    (mistake,) = refused.value.errors
    assert f"clones from: {offered};" in mistake.message
    assert "git.allowed_hosts in sandbox.toml" in mistake.message
    assert "SANDBOX_GIT_ALLOWED_HOSTS" in mistake.message


@pytest.mark.parametrize("user", ["evil.example%2Fx", "%2DoProxyCommand=x", "me%3Apw", "%00", "%0A"])
def test_a_user_in_whom_another_host_or_an_option_is_hidden_is_a_mistake(user):
    """Git reads what is escaped before it looks for the host."""
    assert mistakes(f"ssh://{user}@github.com/org/repo.git", ["github.com"]) == [("repository.url", "format")]


def test_a_user_with_an_at_sign_is_none():
    assert mistakes("ssh://me%40corp.example@github.com/org/repo.git", ["github.com"]) == []


def test_a_url_that_is_none_is_told_once():
    assert mistakes("file:///etc", ["github.com"]) == [("repository.url", "format")]
