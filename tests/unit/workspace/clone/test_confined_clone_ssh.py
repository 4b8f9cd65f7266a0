"""ssh URLs are split as git splits them."""

import pytest

from sandbox.workspace.clone.confined_clone import SshRemote, parse_ssh_url


@pytest.mark.parametrize(
    ("url", "remote"),
    [
        ("ssh://git@git.example/a/b.git", SshRemote("git@git.example", "", "/a/b.git")),
        ("ssh://git.example:2222/a", SshRemote("git.example", "2222", "/a")),
        ("ssh://git@[2001:db8::1]:22/a", SshRemote("git@2001:db8::1", "22", "/a")),
        ("ssh://git.example/~me/a", SshRemote("git.example", "", "~me/a")),
        ("ssh://me%40corp@git.example/my%20work.git", SshRemote("me@corp@git.example", "", "/my work.git")),
        ("ssh://git.example/%7Eme/a", SshRemote("git.example", "", "~me/a")),
        ("ssh://git.example/a%FFb", SshRemote("git.example", "", "/a\udcffb")),
        ("ssh://git.example%2F@other.example/a", SshRemote("git.example/@other.example", "", "/a")),
        ("git@git.example:a%20b", SshRemote("git@git.example", "", "a%20b")),
        ("git@git.example:a/b", SshRemote("git@git.example", "", "a/b")),
        ("git.example:/srv/a", SshRemote("git.example", "", "/srv/a")),
        ("https://git.example/a", None),
        ("/srv/odd:name", None),
        ("ext::sh -c x", None),
        ("ssh://-oProxyCommand=x/a", None),
        ("-oProxyCommand=x:a", None),
        ("ssh://%2DoProxyCommand=x/a", None),
        ("ssh://%2DoProxyCommand=x@git.example/a", None),
        ("ssh://%60id%60/a", None),
        ("ssh://%0Aid@git.example/a", None),
        ("ssh://git.example/a%00b", None),
        ("ssh://git.example/a%0Ab", None),
    ],
)
def test_ssh_url_is_parsed(url, remote):
    assert parse_ssh_url(url) == remote
