"""Without confinement, git runs with the privileges of the server's user. Restrictions on redirects still apply."""

import pytest

from sandbox.model.failure import AttemptError


@pytest.fixture
def unconfined_harness(harness):
    harness.confined = False
    return harness


def test_patch_of_an_unconfined_clone_applies(unconfined_harness):
    base = unconfined_harness.stage()
    (unconfined_harness.workspace / "src" / "app.py").write_text("print(2)\n")
    (unconfined_harness.workspace / "new").write_text("new\n")

    assert b"+print(2)\n" in unconfined_harness.verify_patch(base)


def test_abbreviated_commit_is_resolved(unconfined_harness):
    second = unconfined_harness.upstream.commit({"README.md": b"# Second\n"})
    unconfined_harness.upstream.commit({"README.md": b"# Third\n"})

    assert unconfined_harness.stage(commit=second[:9]) == second


def test_credentials_come_from_the_helper_of_the_user(unconfined_harness):
    unconfined_harness.server.credentials = "me:let-me-in"
    host = unconfined_harness.server.url.removeprefix("http://")
    store = unconfined_harness.root / "credentials"
    store.write_text(f"http://me:let-me-in@{host}\n")
    with pytest.raises(AttemptError, match="needs credentials"):
        unconfined_harness.stage()
    unconfined_harness.configure(f"[credential]\n\thelper = store --file={store}")

    unconfined_harness.stage()

    assert (unconfined_harness.workspace / "README.md").exists()


def test_redirects_are_refused_when_hosts_are_restricted(unconfined_harness):
    unconfined_harness.follow_redirects = False
    unconfined_harness.server.redirect = "http://127.0.0.1:1/"

    with pytest.raises(AttemptError, match="redirects to another URL"):
        unconfined_harness.stage()


def test_ssh_command_of_the_user_is_used(unconfined_harness):
    ssh = unconfined_harness.root / "ssh"
    ssh.write_text('#!/bin/sh\nfor command; do :; done\nexec sh -c "$command"\n')
    ssh.chmod(0o755)
    unconfined_harness.configure(f"[core]\n\tsshCommand = {ssh}\n[ssh]\n\tvariant = ssh")

    unconfined_harness.stage(f"git@git.example:{unconfined_harness.upstream.bare}")

    assert (unconfined_harness.workspace / "README.md").exists()
