"""The URLs for opening pull requests."""

import pytest

from sandbox.cli.checkout.branch_commit import pull_request_url


@pytest.mark.parametrize(
    ("remote", "url"),
    [
        ("https://github.com/org/app.git", "https://github.com/org/app/pull/new/fix/two"),
        ("git@github.com:org/app.git", "https://github.com/org/app/pull/new/fix/two"),
        ("ssh://git@ssh.github.com:443/org/app.git", "https://github.com/org/app/pull/new/fix/two"),
        ("https://ada:token@github.com/org/app", "https://github.com/org/app/pull/new/fix/two"),
        ("https://github.example.org/org/app", "https://github.example.org/org/app/pull/new/fix/two"),
        (
            "https://gitlab.com/group/sub/app.git",
            "https://gitlab.com/group/sub/app/-/merge_requests/new?merge_request%5Bsource_branch%5D=fix%2Ftwo",
        ),
        (
            "ssh://git@gitlab.example.org:2222/group/app.git",
            "https://gitlab.example.org/group/app/-/merge_requests/new?merge_request%5Bsource_branch%5D=fix%2Ftwo",
        ),
        ("https://example.org/org/app.git", None),
        ("https://github.com.evil.example/org/app.git", "https://github.com.evil.example/org/app/pull/new/fix/two"),
        ("/srv/git/app.git", None),
        ("github.com", None),
    ],
)
def test_url_that_opens_a_pull_request_depends_on_the_git_host(remote, url):
    assert pull_request_url(remote, "fix/two") == url


@pytest.mark.parametrize("branch", ["fix#1", "a?b", "a&x=y", "grün", "a%2fb"])
def test_branch_in_a_pull_request_url_is_percent_encoded(branch):
    for remote in ("https://github.com/org/app", "https://gitlab.com/org/app"):
        url = pull_request_url(remote, branch)
        assert url is not None
        assert url.isascii()
        assert not {"#", "&x", "?b"} & set(url.partition("app/")[2])
