"""Without confinement, git runs with the rights of the server's user. Restricted redirects remain restricted."""

import pytest

from sandbox.model.failure import AttemptError


@pytest.fixture
def unconfined_env(env):
    env.confined = False
    return env


def test_patch_of_an_unconfined_clone_applies(unconfined_env):
    base = unconfined_env.stage()
    (unconfined_env.workspace / "src" / "app.py").write_text("print(2)\n")
    (unconfined_env.workspace / "new").write_text("new\n")

    assert b"+print(2)\n" in unconfined_env.verify_patch(base)


def test_abbreviated_commit_is_resolved(unconfined_env):
    second = unconfined_env.upstream.commit({"README.md": b"# Second\n"})
    unconfined_env.upstream.commit({"README.md": b"# Third\n"})

    assert unconfined_env.stage(commit=second[:9]) == second


def test_credentials_come_from_the_users_helper(unconfined_env):
    unconfined_env.server.credentials = "me:let-me-in"
    host = unconfined_env.server.url.removeprefix("http://")
    store = unconfined_env.root / "credentials"
    store.write_text(f"http://me:let-me-in@{host}\n")
    with pytest.raises(AttemptError, match="needs credentials"):
        unconfined_env.stage()
    unconfined_env.configure(f"[credential]\n\thelper = store --file={store}")

    unconfined_env.stage()

    assert (unconfined_env.workspace / "README.md").exists()


def test_redirects_are_refused_when_hosts_are_restricted(unconfined_env):
    unconfined_env.follow_redirects = False
    unconfined_env.server.redirect = "http://127.0.0.1:1/"

    with pytest.raises(AttemptError, match="redirects to another URL"):
        unconfined_env.stage()


def test_ssh_command_of_the_user_is_used(unconfined_env):
    ssh = unconfined_env.root / "ssh"
    ssh.write_text('#!/bin/sh\nfor command; do :; done\nexec sh -c "$command"\n')
    ssh.chmod(0o755)
    unconfined_env.configure(f"[core]\n\tsshCommand = {ssh}\n[ssh]\n\tvariant = ssh")

    unconfined_env.stage(f"git@git.example:{unconfined_env.upstream.bare}")

    assert (unconfined_env.workspace / "README.md").exists()
