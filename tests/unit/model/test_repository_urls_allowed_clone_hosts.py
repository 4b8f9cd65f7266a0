"""A server with tokens clones only from the hosts that its operator allows."""

import json

import pytest

from doubles.manifests import parse_manifest
from sandbox.model.manifest.parser import InvalidManifestError
from sandbox.model.repository_urls import is_clone_allowed


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
def test_clone_from_a_listed_host_is_allowed(url, entry):
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
def test_clone_from_another_host_is_denied(url, entry):
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


def errors_of(url: str, clone_hosts) -> list[tuple[str, str]]:
    try:
        parse_manifest(manifest(url), is_json=True, clone_hosts=clone_hosts)
    except InvalidManifestError as error:
        return [(field_error.field, field_error.rule) for field_error in error.errors]
    return []


def test_repository_on_an_unlisted_host_is_rejected():
    assert errors_of("https://evil.example/repo.git", ["github.com"]) == [("repository.url", "not_offered")]
    assert errors_of("https://evil.example/repo.git", []) == [("repository.url", "not_offered")]
    assert errors_of("https://github.com/org/repo.git", ["github.com"]) == []
    assert errors_of("https://evil.example/repo.git", None) == []


@pytest.mark.parametrize(("clone_hosts", "offered"), [([], "none"), (["github.com"], "github.com")])
def test_error_names_the_setting_that_allows_a_host(clone_hosts, offered):
    with pytest.raises(InvalidManifestError) as caught:
        parse_manifest(manifest("https://git.example/repo.git"), is_json=True, clone_hosts=clone_hosts)
    (error,) = caught.value.errors
    assert f"clones: {offered};" in error.message
    assert "git.allowed_hosts (sandbox.toml)" in error.message
    assert "SANDBOX_GIT_ALLOWED_HOSTS" in error.message


@pytest.mark.parametrize("user", ["evil.example%2Fx", "%2DoProxyCommand=x", "me%3Apw", "%00", "%0A"])
def test_percent_escapes_in_the_url_user_are_rejected(user):
    """Git decodes percent-escapes before it splits off the host."""
    assert errors_of(f"ssh://{user}@github.com/org/repo.git", ["github.com"]) == [("repository.url", "format")]


def test_escaped_at_sign_in_the_url_user_is_accepted():
    assert errors_of("ssh://me%40corp.example@github.com/org/repo.git", ["github.com"]) == []


def test_invalid_url_is_reported_once():
    assert errors_of("file:///etc", ["github.com"]) == [("repository.url", "format")]
