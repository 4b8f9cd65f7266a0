"""Where nothing can be confined, git clones and compares with the rights of whoever runs it, and the same bounds."""

import pytest

from sandbox.model.errors import AttemptError


@pytest.fixture
def open_house(house):
    house.confined = False
    return house


def test_a_clone_is_compared(open_house):
    base = open_house.stage()
    (open_house.workspace / "src" / "app.py").write_text("print(2)\n")
    (open_house.workspace / "new").write_text("new\n")

    assert b"+print(2)\n" in open_house.patch_applies_whole(base)


def test_a_commit_is_found_by_the_beginning_of_its_name(open_house):
    second = open_house.upstream.commit({"README.md": b"# Second\n"})
    open_house.upstream.commit({"README.md": b"# Third\n"})

    assert open_house.stage(commit=second[:9]) == second


def test_credentials_come_from_the_users_helper(open_house):
    open_house.server.credentials = "me:let-me-in"
    host = open_house.server.url.removeprefix("http://")
    store = open_house.root / "credentials"
    store.write_text(f"http://me:let-me-in@{host}\n")
    with pytest.raises(AttemptError, match="needs credentials"):
        open_house.stage()
    open_house.configure(f"[credential]\n\thelper = store --file={store}")

    open_house.stage()

    assert (open_house.workspace / "README.md").exists()


def test_no_redirect_is_followed_where_hosts_are_named(open_house):
    open_house.follow_redirects = False
    open_house.server.redirect = "http://127.0.0.1:1/"

    with pytest.raises(AttemptError, match="redirects to somewhere else"):
        open_house.stage()


def test_ssh_goes_by_the_command_of_the_user(open_house):
    ssh = open_house.root / "ssh"
    ssh.write_text('#!/bin/sh\nfor command; do :; done\nexec sh -c "$command"\n')
    ssh.chmod(0o755)
    open_house.configure(f"[core]\n\tsshCommand = {ssh}\n[ssh]\n\tvariant = ssh")

    open_house.stage(f"git@git.example:{open_house.upstream.bare}")

    assert (open_house.workspace / "README.md").exists()
